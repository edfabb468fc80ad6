// adam_step: a stream over all tensors, in pieces.
#include "cpu/blocks.h"
#include "cpu/ops.h"

namespace mima::cpu {
namespace {

// Calls f(run, in, out) for each run of the lists: addresses of its first elements, null where a
// list is empty.
template <size_t IN, size_t OUT, class F>
void for_runs(const AdamStepParams& params, const std::vector<void*>* const (&in)[IN],
              const std::vector<void*>* const (&out)[OUT], const F& f) {
  const Pieces pieces(params.sizes);
  const int threads = useful_threads(params.threads, double(pieces.elements) * (IN + OUT));
  parallel_for(pieces.count(), threads, [&](int64_t piece, int) {
    for (int64_t r = pieces.first_run[piece]; r < pieces.first_run[piece + 1]; ++r) {
      const Run& run = pieces.runs[r];
      const auto start = [&](const std::vector<void*>& list) {
        return list.empty() ? nullptr : at(list[run.tensor], run.start, params.dtype);
      };
      const void* from[IN];
      void* to[OUT];
      for (size_t k = 0; k < IN; ++k) from[k] = start(*in[k]);
      for (size_t k = 0; k < OUT; ++k) to[k] = start(*out[k]);
      f(run.size, from, to);
    }
  });
}

bool is_large(const AdamStepParams& params, int64_t results) {
  int64_t elements = 0;
  for (int64_t size : params.sizes) elements += size;
  return double(results) * elements * item_size(params.dtype) >= kStreamBytes;
}

}  // namespace

void adam_step_forward(const AdamStepParams& params) {
  const StorageKernels& storage = active_kernels().storage[static_cast<int>(params.dtype)];
  // what is overwritten has been read: its lines are in the caches
  const bool stream = is_large(params, 3) && params.out_m != params.m;
  for_runs<4, 3>(params, {&params.z, &params.g, &params.m, &params.v},
                 {&params.out_z, &params.out_m, &params.out_v},
                 [&](int64_t size, const void* const* in, void* const* out) {
                   storage.adam(params.rule, in, out, size, stream);
                 });
}

void adam_step_backward(const AdamStepParams& params) {
  const StorageKernels& storage = active_kernels().storage[static_cast<int>(params.dtype)];
  const bool stream = is_large(params, 4);
  for_runs<6, 4>(params,
                 {&params.bar_z, &params.bar_m, &params.bar_v, &params.g, &params.m, &params.v},
                 {&params.d_z, &params.d_g, &params.d_m, &params.d_v},
                 [&](int64_t size, const void* const* in, void* const* out) {
                   storage.adam_backward(params.rule, in, out, size, stream);
                 });
}

}  // namespace mima::cpu
