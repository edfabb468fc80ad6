// weighted_merge: the table of a call, and its launches.
#include "cuda/weighted_merge_kernel.cuh"

#include <algorithm>

#include "cuda/launch.cuh"
#include "cuda/ops.h"

namespace mima::cuda {
namespace {

std::vector<uint64_t> addresses(const std::vector<void*>& pointers) {
  std::vector<uint64_t> result(pointers.size());
  for (size_t i = 0; i < pointers.size(); ++i) result[i] = reinterpret_cast<uint64_t>(pointers[i]);
  return result;
}

// Concepts whose sums fit the shared memory that every device grants: 8 doubles each.
constexpr int kConceptsPerLaunch = 256;

}  // namespace

WeightedMergeCall::WeightedMergeCall(const WeightedMergeParams& params)
    : dtype_(params.dtype),
      num_tensors_(static_cast<int64_t>(params.sizes.size())),
      num_concepts_(static_cast<int>(params.weights.size())) {
  int64_t piece = 0;
  with_type(dtype_, [&](auto type) { piece = kPieceTiles * kMergeTile<decltype(type)>; });
  std::vector<int64_t> pieces, aligned(params.sizes.size());
  int64_t elements = 0;
  for (int64_t p = 0; p < num_tensors_; ++p) {
    elements += params.sizes[p];
    for (int64_t start = 0; start < params.sizes[p]; start += piece)
      pieces.insert(pieces.end(), {p, start, std::min(piece, params.sizes[p] - start)});
    uint64_t low_bits = 0;
    const auto collect = [&](const std::vector<void*>& of, int64_t count) {
      for (int64_t n = 0; n < count && !of.empty(); ++n)
        low_bits |= reinterpret_cast<uint64_t>(of[n * num_tensors_ + p]);
    };
    for (const auto* of : {&params.base, &params.out, &params.d_out, &params.d_base})
      collect(*of, 1);
    for (const auto* of : {&params.thetas, &params.d_thetas}) collect(*of, num_concepts_);
    aligned[p] = low_bits % 16 == 0;
  }
  num_pieces_ = static_cast<int64_t>(pieces.size()) / 3;
  for (double w : params.weights) base_weight_ -= w;
  pieces_ = table_.add(pieces);
  aligned_ = table_.add(aligned);
  base_ = table_.add(addresses(params.base));
  thetas_ = table_.add(addresses(params.thetas));
  weights_ = table_.add(params.weights);
  out_ = table_.add_optional(addresses(params.out));
  d_out_ = table_.add_optional(addresses(params.d_out));
  d_base_ = table_.add_optional(addresses(params.d_base));
  d_thetas_ = table_.add_optional(addresses(params.d_thetas));
  shape_ = std::to_string(num_concepts_) + " concepts, " + std::to_string(num_tensors_) +
           " tensors, " + std::to_string(elements) + " elements";
}

void WeightedMergeCall::forward(uint64_t table, uint64_t stream) const {
  if (num_pieces_ == 0) return;
  const MergeTable arrays{.pieces = at<int64_t>(table, pieces_),
                          .aligned = at<int64_t>(table, aligned_),
                          .base = at<uint64_t>(table, base_),
                          .thetas = at<uint64_t>(table, thetas_),
                          .weights = at<double>(table, weights_),
                          .out = at<uint64_t>(table, out_),
                          .d_out = nullptr,
                          .d_base = nullptr,
                          .d_thetas = nullptr,
                          .partial = nullptr};
  with_type(dtype_, [&](auto type) {
    launch("weighted_merge forward", shape_, {dim3(num_pieces_), kMergeThreads, 0}, stream,
           &weighted_merge_fwd_kernel<decltype(type)>, arrays, num_tensors_, num_concepts_);
  });
}

void WeightedMergeCall::backward(uint64_t table, uint64_t partial, uint64_t stream) const {
  if (num_pieces_ == 0) return;
  const MergeTable arrays{.pieces = at<int64_t>(table, pieces_),
                          .aligned = at<int64_t>(table, aligned_),
                          .base = at<uint64_t>(table, base_),
                          .thetas = at<uint64_t>(table, thetas_),
                          .weights = at<double>(table, weights_),
                          .out = nullptr,
                          .d_out = at<uint64_t>(table, d_out_),
                          .d_base = at<uint64_t>(table, d_base_),
                          .d_thetas = at<uint64_t>(table, d_thetas_),
                          .partial = reinterpret_cast<double*>(partial)};
  // once where there is no concept: the base has a gradient all the same
  int first = 0;
  do {
    const int count = std::min(kConceptsPerLaunch, num_concepts_ - first);
    const int64_t shared = count * kMergeWarps * static_cast<int64_t>(sizeof(double));
    with_type(dtype_, [&](auto type) {
      launch("weighted_merge backward", shape_, {dim3(num_pieces_), kMergeThreads, shared}, stream,
             &weighted_merge_bwd_kernel<decltype(type)>, arrays, num_tensors_, first, count,
             num_concepts_, base_weight_);
    });
    first += kConceptsPerLaunch;
  } while (first < num_concepts_);
}

}  // namespace mima::cuda
