// The operators on the CPU. Arguments are checked by the caller; see params.h for the formulas.
#pragma once

#include "params.h"

namespace mima::cpu {

void weighted_merge_forward(const WeightedMergeParams& params);
void weighted_merge_backward(WeightedMergeParams& params);
void adam_step_forward(const AdamStepParams& params);
void adam_step_backward(const AdamStepParams& params);
void combine(const CombineParams& params);
void token_outputs(const TokenParams& params);
void add_token_outputs(const TokenParams& params);
void token_sums(const TokenParams& params);
void group_norm_forward(const GroupNormParams& params);
void group_norm_backward(const GroupNormParams& params);
void group_norm_double_backward(const GroupNormParams& params);
void geglu_forward(const GegluParams& params);
void geglu_backward(const GegluParams& params);
void geglu_double_backward(const GegluParams& params);
void attention_forward(const AttentionParams& params);
void attention_backward(const AttentionParams& params);
void attention_double_backward(const AttentionParams& params);
void projected_merge_forward(const ProjectedMergeParams& params);
void projected_merge_backward(const ProjectedMergeParams& params);
// Whether adapters are merged into a float32 weight. A question of one sample's size, for its
// result not to depend on the samples beside it. Four times what the multiply-adds of a forward
// say: a backward merges once more, and forms x A^T anew.
bool merges_adapters(int64_t t, int64_t d, int64_t o);
void batched_lora_forward(const BatchedLoraParams& params);
void batched_lora_backward(BatchedLoraParams& params);
void merge_lora_forward(const MergeLoraParams& params);
void merge_lora_backward(MergeLoraParams& params);

}  // namespace mima::cpu
