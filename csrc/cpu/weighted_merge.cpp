// weighted_merge: a stream over all tensors, in pieces.
#include "cpu/blocks.h"
#include "cpu/ops.h"

namespace mima::cpu {
void weighted_merge_forward(const WeightedMergeParams& params) {
  const Kernels& kernels = active_kernels();
  const StorageKernels& storage = kernels.storage[static_cast<int>(params.dtype)];
  const Pieces pieces(params.sizes);
  const int64_t num_concepts = static_cast<int64_t>(params.weights.size());
  const int64_t num_tensors = static_cast<int64_t>(params.sizes.size());
  const int threads = useful_threads(params.threads, double(pieces.elements) * (num_concepts + 2));
  const bool stream = double(pieces.elements) * item_size(params.dtype) >= kStreamBytes;
  std::vector<const void*> theta_slots(static_cast<size_t>(threads * num_concepts));
  parallel_for(pieces.count(), threads, [&](int64_t piece, int thread) {
    const void** thetas = theta_slots.data() + thread * num_concepts;
    for (int64_t r = pieces.first_run[piece]; r < pieces.first_run[piece + 1]; ++r) {
      const Run& run = pieces.runs[r];
      for (int64_t n = 0; n < num_concepts; ++n)
        thetas[n] = at(params.thetas[n * num_tensors + run.tensor], run.start, params.dtype);
      storage.merge(at(params.out[run.tensor], run.start, params.dtype),
                    at(params.base[run.tensor], run.start, params.dtype), thetas,
                    params.weights.data(), num_concepts, run.size, stream);
    }
  });
}

void weighted_merge_backward(WeightedMergeParams& params) {
  const Kernels& kernels = active_kernels();
  const StorageKernels& storage = kernels.storage[static_cast<int>(params.dtype)];
  const Pieces pieces(params.sizes);
  const int64_t num_concepts = static_cast<int64_t>(params.weights.size());
  const int64_t num_tensors = static_cast<int64_t>(params.sizes.size());
  const int threads = useful_threads(params.threads, double(pieces.elements) * (num_concepts + 2));
  const bool need_base = !params.d_base.empty();
  const bool need_thetas = !params.d_thetas.empty();
  const bool need_weights = !params.d_weights.empty();
  const double results = need_base + (need_thetas ? num_concepts : 0);
  const bool stream = results * pieces.elements * item_size(params.dtype) >= kStreamBytes;
  std::vector<void*> slots(static_cast<size_t>(threads * num_concepts * 2));
  // one partial sum for each piece, added in order below: the same for any number of threads
  std::vector<double> partial(need_weights ? pieces.count() * num_concepts : 0, 0.0);
  parallel_for(pieces.count(), threads, [&](int64_t piece, int thread) {
    void** thetas = slots.data() + thread * num_concepts * 2;
    void** d_thetas = thetas + num_concepts;
    for (int64_t r = pieces.first_run[piece]; r < pieces.first_run[piece + 1]; ++r) {
      const Run& run = pieces.runs[r];
      for (int64_t n = 0; n < num_concepts; ++n) {
        const int64_t which = n * num_tensors + run.tensor;
        thetas[n] = at(params.thetas[which], run.start, params.dtype);
        if (need_thetas) d_thetas[n] = at(params.d_thetas[which], run.start, params.dtype);
      }
      storage.merge_backward(
          at(params.d_out[run.tensor], run.start, params.dtype),
          at(params.base[run.tensor], run.start, params.dtype), thetas, params.weights.data(),
          num_concepts, run.size,
          need_base ? at(params.d_base[run.tensor], run.start, params.dtype) : nullptr,
          need_thetas ? d_thetas : nullptr,
          need_weights ? partial.data() + piece * num_concepts : nullptr, stream);
    }
  });
  for (size_t i = 0; i < partial.size(); ++i) params.d_weights[i % num_concepts] += partial[i];
}

}  // namespace mima::cpu
