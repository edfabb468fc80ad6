// projected_merge: the table of a call, and its launches.
#include "cuda/projected_merge_kernel.cuh"

#include <algorithm>

#include "cuda/launch.cuh"
#include "cuda/ops.h"

namespace mima::cuda {
namespace {

// Shared memory that every device grants without asking.
constexpr int64_t kSharedBytes = 48 << 10;

// Rows of one partial sum of d_C and d_M.
constexpr int64_t kChunkRows = 256;

int64_t acc_size(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : 4;
}

std::vector<DeviceMatrix> device_matrices(const std::vector<Matrix>& matrices, DType dtype) {
  std::vector<DeviceMatrix> result(matrices.size());
  for (size_t i = 0; i < matrices.size(); ++i) {
    const uint64_t address = reinterpret_cast<uint64_t>(matrices[i].data);
    const uint64_t stride = static_cast<uint64_t>(matrices[i].ld) * item_size(dtype);
    if ((address | stride) % 16 != 0)
      throw std::invalid_argument("projected_merge: rows must start at multiples of 16 bytes");
    result[i] = {address, matrices[i].ld};
  }
  return result;
}

std::vector<int64_t> prefix_sums(const std::vector<int64_t>& sizes) {
  std::vector<int64_t> sums(sizes.size() + 1, 0);
  for (size_t i = 0; i < sizes.size(); ++i) sums[i + 1] = sums[i] + sizes[i];
  return sums;
}

}  // namespace

ProjectedMergeCall::ProjectedMergeCall(const ProjectedMergeParams& params)
    : dtype_(params.dtype),
      num_layers_(static_cast<int64_t>(params.rows.size())),
      d_(params.d),
      num_concepts_(static_cast<int>(params.tokens.size())) {
  const std::vector<int64_t> first_token = prefix_sums(params.tokens);
  const std::vector<int64_t> first_row = prefix_sums(params.rows);
  num_tokens_ = first_token.back();
  all_rows_ = first_row.back();
  shape_ = std::to_string(num_concepts_) + " concepts, " + std::to_string(num_layers_) +
           " layers, " + std::to_string(all_rows_) + " rows of " + std::to_string(d_) + ", " +
           std::to_string(num_tokens_) + " tokens";
  const int64_t bytes_per_warp = std::max<int64_t>(num_tokens_, 1) * kRows * acc_size(dtype_);
  if (bytes_per_warp > kSharedBytes)
    throw std::invalid_argument("projected_merge (" + shape_ + "): at most " +
                                std::to_string(kSharedBytes / (kRows * acc_size(dtype_))) +
                                " tokens on CUDA");
  warps_ = static_cast<int>(std::clamp<int64_t>(kSharedBytes / bytes_per_warp, 1, kMaxWarps));
  std::vector<int64_t> blocks, chunks, tiles;
  for (int64_t l = 0; l < num_layers_; ++l) {
    for (int64_t row = 0; row < params.rows[l]; row += warps_ * kRows)
      blocks.insert(blocks.end(), {l, row});
    for (int64_t row = 0; row < params.rows[l]; row += kChunkRows)
      chunks.insert(chunks.end(), {l, row, std::min(kChunkRows, params.rows[l] - row)});
  }
  for (int64_t n = 0; n < num_concepts_; ++n)
    for (int64_t token = first_token[n]; token < first_token[n + 1]; token += kSumTokens)
      tiles.insert(tiles.end(), {n, token});
  num_blocks_ = static_cast<int64_t>(blocks.size()) / 2;
  num_chunks_ = static_cast<int64_t>(chunks.size()) / 3;
  num_tiles_ = static_cast<int64_t>(tiles.size()) / 2;
  blocks_ = table_.add(blocks);
  chunks_ = table_.add(chunks);
  tiles_ = table_.add(tiles);
  rows_ = table_.add(params.rows);
  first_token_ = table_.add(first_token);
  first_row_ = table_.add(first_row);
  W0_ = table_.add(device_matrices(params.W0, dtype_));
  W_ = table_.add(device_matrices(params.W, dtype_));
  C_ = table_.add(device_matrices(params.C, dtype_));
  M_ = table_.add(device_matrices(params.M, dtype_));
  out_ = table_.add_optional(device_matrices(params.out, dtype_));
  d_out_ = table_.add_optional(device_matrices(params.d_out, dtype_));
  d_W0_ = table_.add_optional(device_matrices(params.d_W0, dtype_));
  d_W_ = table_.add_optional(device_matrices(params.d_W, dtype_));
}

struct ProjectLaunch {
  static ProjectTable arrays(const ProjectedMergeCall& call, uint64_t table,
                             uint64_t coefficients) {
    return {.blocks = at<int64_t>(table, call.blocks_),
            .rows = at<int64_t>(table, call.rows_),
            .first_token = at<int64_t>(table, call.first_token_),
            .W0 = at<DeviceMatrix>(table, call.W0_),
            .W = at<DeviceMatrix>(table, call.W_),
            .C = at<DeviceMatrix>(table, call.C_),
            .M = at<DeviceMatrix>(table, call.M_),
            .out = at<DeviceMatrix>(table, call.out_),
            .d_out = at<DeviceMatrix>(table, call.d_out_),
            .d_W0 = at<DeviceMatrix>(table, call.d_W0_),
            .d_W = at<DeviceMatrix>(table, call.d_W_),
            .first_row = at<int64_t>(table, call.first_row_),
            .coefficients = reinterpret_cast<void*>(coefficients)};
  }
};

void ProjectedMergeCall::forward(uint64_t table, uint64_t coefficients, uint64_t stream) const {
  if (num_blocks_ == 0 || d_ == 0) return;
  const int64_t shared = num_tokens_ * kRows * warps_ * acc_size(dtype_);
  with_type(dtype_, [&](auto type) {
    launch("projected_merge forward", shape_, {dim3(num_blocks_), warps_ * 32, shared}, stream,
           &projected_merge_fwd_kernel<decltype(type)>,
           ProjectLaunch::arrays(*this, table, coefficients), num_layers_, num_concepts_, d_,
           warps_ * kRows);
  });
}

void ProjectedMergeCall::backward(uint64_t table, uint64_t coefficients, uint64_t stream) const {
  if (num_blocks_ == 0 || d_ == 0) return;
  const int64_t shared = num_tokens_ * kRows * warps_ * acc_size(dtype_);
  with_type(dtype_, [&](auto type) {
    launch("projected_merge backward", shape_, {dim3(num_blocks_), warps_ * 32, shared}, stream,
           &projected_merge_bwd_kernel<decltype(type)>,
           ProjectLaunch::arrays(*this, table, coefficients), num_layers_, num_concepts_, d_,
           warps_ * kRows);
  });
}

void ProjectedMergeCall::sums(uint64_t table, uint64_t coefficients, bool differences,
                              uint64_t partial, uint64_t stream) const {
  if (num_chunks_ == 0 || num_tiles_ == 0 || d_ == 0) return;
  const dim3 blocks(num_chunks_, (d_ + kSumThreads - 1) / kSumThreads, num_tiles_);
  with_type(dtype_, [&](auto type) {
    using T = decltype(type);
    launch("projected_merge backward of C and M", shape_, {blocks, kSumThreads, 0}, stream,
           &projected_merge_sums_kernel<T>, ProjectLaunch::arrays(*this, table, coefficients),
           at<int64_t>(table, chunks_), at<int64_t>(table, tiles_), differences, num_layers_,
           num_concepts_, d_, reinterpret_cast<Acc<T>*>(partial));
  });
}

}  // namespace mima::cuda
