// combine: a stream over all tensors, in pieces.
#include "cpu/blocks.h"
#include "cpu/ops.h"

namespace mima::cpu {

void combine(const CombineParams& params) {
  const StorageKernels& storage = active_kernels().storage[static_cast<int>(params.dtype)];
  const Pieces pieces(params.sizes);
  const size_t num_tensors = params.sizes.size();
  const int lists = params.num_in + params.num_out;
  const int threads = useful_threads(params.threads, double(pieces.elements) * lists);
  // what is overwritten has been read: its lines are in the caches
  bool stream = double(params.num_out) * pieces.elements * item_size(params.dtype) >= kStreamBytes;
  for (size_t i = 0; i < params.out.size(); i += num_tensors)
    for (size_t j = 0; j < params.x.size(); j += num_tensors)
      stream = stream && params.out[i] != params.x[j];
  parallel_for(pieces.count(), threads, [&](int64_t piece, int) {
    for (int64_t r = pieces.first_run[piece]; r < pieces.first_run[piece + 1]; ++r) {
      const Run& run = pieces.runs[r];
      const void* from[CombineParams::kMost];
      void* to[CombineParams::kMost];
      for (int j = 0; j < params.num_in; ++j)
        from[j] = at(params.x[j * num_tensors + run.tensor], run.start, params.dtype);
      for (int i = 0; i < params.num_out; ++i)
        to[i] = at(params.out[i * num_tensors + run.tensor], run.start, params.dtype);
      storage.combine(params.factors, params.num_in, params.num_out, from, to, run.size, stream);
    }
  });
}

}  // namespace mima::cpu
