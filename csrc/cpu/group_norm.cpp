// group_norm: a group of a sample at a time, which the second-level cache holds.
#include "cpu/blocks.h"
#include "cpu/ops.h"

namespace mima::cpu {
namespace {

void* offset(const void* p, int64_t element, DType dtype) {
  return p == nullptr ? nullptr : at(const_cast<void*>(p), element, dtype);
}

// Calls run(group) for each group, T the accumulator type, and sums the weights' gradients.
template <class T, class F>
void for_groups(const GroupNormParams& params, const Kernels& kernels, const F& run) {
  const DType dtype = params.dtype;
  const int64_t size = params.channels * params.m, items = params.B * params.groups;
  const int64_t lanes = kernels.vector_bytes / static_cast<int64_t>(sizeof(T));
  const int64_t every = params.groups * params.channels, row = size + lanes;
  const bool sums = params.d_weight != nullptr || params.d_bias != nullptr;
  // slabs of groups: some 64 Ki elements, so that small groups are not items of their own
  const int64_t slabs = std::clamp<int64_t>(items * size / kPieceElements, items > 0, kMaxSlabs);
  const int64_t ld = padded<T>(kernels, every) + lanes;
  const Buffer<T> partial(sums ? slabs * 2 * ld : 0);
  if (sums) std::fill_n(partial.get(), slabs * 2 * ld, T(0));
  const int threads = useful_threads(params.threads, double(items) * size * 8);
  parallel_for(slabs, threads, [&](int64_t slab, int) {
    const Buffer<T> scratch(kNormScratch * row);
    for (int64_t i = items * slab / slabs; i < items * (slab + 1) / slabs; ++i) {
      const int64_t element = i * size, channel = i % params.groups * params.channels;
      NormGroup group{};
      group.channels = params.channels, group.m = params.m;
      group.eps = params.eps, group.silu = params.silu;
      group.x = offset(params.x, element, dtype);
      group.weight = offset(params.weight, channel, dtype);
      group.bias = offset(params.bias, channel, dtype);
      group.d_out = offset(params.d_out, element, dtype);
      group.u_x = offset(params.u_x, element, dtype);
      group.u_weight = offset(params.u_weight, channel, dtype);
      group.u_bias = offset(params.u_bias, channel, dtype);
      group.out = offset(params.out, element, dtype);
      group.d_d_out = offset(params.d_d_out, element, dtype);
      group.d_x = offset(params.d_x, element, dtype);
      T* total = partial.get() + slab * 2 * ld + channel;
      if (params.d_weight != nullptr) group.d_weight = total;
      if (params.d_bias != nullptr) group.d_bias = total + ld;
      group.scratch = scratch.get();
      run(group);
    }
  });
  if (!sums) return;
  const StorageKernels& storage = kernels.storage[static_cast<int>(dtype)];
  for (int64_t slab = 1; slab < slabs; ++slab)
    for (int64_t i = 0; i < 2 * ld; ++i) partial.get()[i] += partial.get()[slab * 2 * ld + i];
  void* const outputs[] = {params.d_weight, params.d_bias};
  for (int which = 0; which < 2; ++which) {
    if (outputs[which] == nullptr) continue;
    if (slabs == 0)
      store_zeros(dtype, 1, every, {outputs[which], every});
    else
      storage.store(partial.get() + which * ld, ld, 1, every, outputs[which], every);
  }
}

void run_groups(const GroupNormParams& params, void (*StorageKernels::*kernel)(const NormGroup&)) {
  const Kernels& kernels = active_kernels();
  const auto run = kernels.storage[static_cast<int>(params.dtype)].*kernel;
  if (params.dtype == DType::kFloat64)
    for_groups<double>(params, kernels, run);
  else
    for_groups<float>(params, kernels, run);
}

}  // namespace

void group_norm_forward(const GroupNormParams& params) {
  run_groups(params, &StorageKernels::norm);
}

void group_norm_backward(const GroupNormParams& params) {
  run_groups(params, &StorageKernels::norm_backward);
}

void group_norm_double_backward(const GroupNormParams& params) {
  run_groups(params, &StorageKernels::norm_double_backward);
}

}  // namespace mima::cpu
