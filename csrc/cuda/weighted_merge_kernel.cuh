// weighted_merge on CUDA: one launch for all tensors. Block b works on piece b, a run of at most
// kPieceTiles tiles of one tensor; a table in device memory, written by the host for
// each call, says which. Each thread keeps kMergeUnroll vectors of the base (and of the upstream
// gradient) in registers while the concepts pass, so that every byte is moved once.
#pragma once

#include "cuda/common.cuh"

namespace mima {
namespace cuda {

constexpr int kMergeThreads = 256;
constexpr int kMergeWarps = kMergeThreads / 32;

// Vectors that a thread has in flight: 16 elements, or 4 of float64, fill its 64 registers.
template <class T>
constexpr int kMergeUnroll = sizeof(T) == 4 ? 4 : 2;

// Elements that a block handles at once, and in all.
template <class T>
constexpr int kMergeTile = kMergeThreads * kMergeUnroll<T> * kVec<T>;
constexpr int kPieceTiles = 4;

// Device addresses into the table of a call.
struct MergeTable {
  const int64_t* pieces;     // [num_pieces, 3]: tensor, first element, number of elements
  const int64_t* aligned;    // [P]: nonzero if every address of the tensor is a multiple of 16
  const uint64_t* base;      // [P]
  const uint64_t* thetas;    // [N * P], concept-major
  const double* weights;     // [N]
  const uint64_t* out;       // [P], forward
  const uint64_t* d_out;     // [P], backward
  const uint64_t* d_base;    // [P] or null
  const uint64_t* d_thetas;  // [N * P] or null
  double* partial;           // [num_pieces, N] or null: <d_out, theta_n - base> of the piece
};

template <class T>
__device__ inline T* element(const uint64_t* addresses, int64_t which, int64_t start) {
  return reinterpret_cast<T*>(addresses[which]) + start;
}

// First element of vector u of this thread.
template <class T>
__device__ inline int offset_of(int u) {
  return (u * kMergeThreads + static_cast<int>(threadIdx.x)) * kVec<T>;
}

template <class T>
__global__ void __launch_bounds__(kMergeThreads, 4)
    weighted_merge_fwd_kernel(MergeTable table, int64_t num_tensors, int num_concepts) {
  const int64_t tensor = table.pieces[3 * blockIdx.x];
  const int64_t start = table.pieces[3 * blockIdx.x + 1];
  const int size = static_cast<int>(table.pieces[3 * blockIdx.x + 2]);
  const bool aligned = table.aligned[tensor] != 0;
  const T* base = element<const T>(table.base, tensor, start);
  T* out = element<T>(table.out, tensor, start);
  int tile = 0;
  for (; aligned && tile + kMergeTile<T> <= size; tile += kMergeTile<T>) {
    Acc<T> b[kMergeUnroll<T>][kVec<T>], total[kMergeUnroll<T>][kVec<T>];
#pragma unroll
    for (int u = 0; u < kMergeUnroll<T>; ++u) {
      load(base + tile + offset_of<T>(u), b[u]);
#pragma unroll
      for (int v = 0; v < kVec<T>; ++v) total[u][v] = 0;
    }
    for (int n = 0; n < num_concepts; ++n) {
      const T* theta = element<const T>(table.thetas, n * num_tensors + tensor, start);
      const Acc<T> w = static_cast<Acc<T>>(table.weights[n]);
#pragma unroll
      for (int u = 0; u < kMergeUnroll<T>; ++u) {
        Acc<T> x[kVec<T>];
        load(theta + tile + offset_of<T>(u), x);
#pragma unroll
        for (int v = 0; v < kVec<T>; ++v) total[u][v] += w * (x[v] - b[u][v]);
      }
    }
#pragma unroll
    for (int u = 0; u < kMergeUnroll<T>; ++u) {
#pragma unroll
      for (int v = 0; v < kVec<T>; ++v) total[u][v] += b[u][v];
      store(out + tile + offset_of<T>(u), total[u]);
    }
  }
  // what is left of a tensor, and views that start off the 16-byte grid
  for (int i = tile + static_cast<int>(threadIdx.x); i < size; i += kMergeThreads) {
    const Acc<T> b = widen(base[i]);
    Acc<T> total = 0;
    for (int n = 0; n < num_concepts; ++n) {
      const T* theta = element<const T>(table.thetas, n * num_tensors + tensor, start);
      total += static_cast<Acc<T>>(table.weights[n]) * (widen(theta[i]) - b);
    }
    narrow(b + total, out + i);
  }
}

// Concepts [first_concept, first_concept + num_concepts) of the table, whose sums of products each
// warp keeps in its own column of shared memory, [num_concepts, kMergeWarps] doubles.
template <class T>
__global__ void __launch_bounds__(kMergeThreads, 4)
    weighted_merge_bwd_kernel(MergeTable table, int64_t num_tensors, int first_concept,
                              int num_concepts, int all_concepts, double base_weight) {
  extern __shared__ double shared[];
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const int64_t tensor = table.pieces[3 * blockIdx.x];
  const int64_t start = table.pieces[3 * blockIdx.x + 1];
  const int size = static_cast<int>(table.pieces[3 * blockIdx.x + 2]);
  const bool aligned = table.aligned[tensor] != 0;
  const bool need_base = table.d_base != nullptr && first_concept == 0;
  const bool need_thetas = table.d_thetas != nullptr;
  const bool need_sums = table.partial != nullptr;
  const Acc<T> rest = static_cast<Acc<T>>(base_weight);
  const T* d_out = element<const T>(table.d_out, tensor, start);
  const T* base = element<const T>(table.base, tensor, start);
  if (need_sums && lane == 0)
    for (int n = 0; n < num_concepts; ++n) shared[n * kMergeWarps + warp] = 0;
  int tile = 0;
  for (; aligned && tile + kMergeTile<T> <= size; tile += kMergeTile<T>) {
    Acc<T> g[kMergeUnroll<T>][kVec<T>], b[kMergeUnroll<T>][kVec<T>];
#pragma unroll
    for (int u = 0; u < kMergeUnroll<T>; ++u) {
      load(d_out + tile + offset_of<T>(u), g[u]);
      if (need_sums) load(base + tile + offset_of<T>(u), b[u]);
      if (need_base) {
        Acc<T> scaled[kVec<T>];
#pragma unroll
        for (int v = 0; v < kVec<T>; ++v) scaled[v] = rest * g[u][v];
        store(element<T>(table.d_base, tensor, start) + tile + offset_of<T>(u), scaled);
      }
    }
    for (int n = 0; n < num_concepts; ++n) {
      const int64_t which = (first_concept + n) * num_tensors + tensor;
      const Acc<T> w = static_cast<Acc<T>>(table.weights[first_concept + n]);
      if (need_sums) {
        const T* theta = element<const T>(table.thetas, which, start);
        Acc<T> dot = 0;
#pragma unroll
        for (int u = 0; u < kMergeUnroll<T>; ++u) {
          Acc<T> x[kVec<T>];
          load(theta + tile + offset_of<T>(u), x);
#pragma unroll
          for (int v = 0; v < kVec<T>; ++v) dot += g[u][v] * (x[v] - b[u][v]);
        }
        dot = warp_sum(dot);
        if (lane == 0) shared[n * kMergeWarps + warp] += static_cast<double>(dot);
      }
      if (need_thetas) {
        T* d_theta = element<T>(table.d_thetas, which, start);
#pragma unroll
        for (int u = 0; u < kMergeUnroll<T>; ++u) {
          Acc<T> scaled[kVec<T>];
#pragma unroll
          for (int v = 0; v < kVec<T>; ++v) scaled[v] = w * g[u][v];
          store(d_theta + tile + offset_of<T>(u), scaled);
        }
      }
    }
  }
  if (tile < size) {
    if (need_base)
      for (int i = tile + static_cast<int>(threadIdx.x); i < size; i += kMergeThreads)
        narrow(rest * widen(d_out[i]), element<T>(table.d_base, tensor, start) + i);
    for (int n = 0; n < num_concepts; ++n) {
      const int64_t which = (first_concept + n) * num_tensors + tensor;
      const Acc<T> w = static_cast<Acc<T>>(table.weights[first_concept + n]);
      Acc<T> dot = 0;
      for (int i = tile + static_cast<int>(threadIdx.x); i < size; i += kMergeThreads) {
        const Acc<T> g = widen(d_out[i]);
        if (need_sums)
          dot += g * (widen(element<const T>(table.thetas, which, start)[i]) - widen(base[i]));
        if (need_thetas) narrow(w * g, element<T>(table.d_thetas, which, start) + i);
      }
      dot = warp_sum(dot);
      if (need_sums && lane == 0) shared[n * kMergeWarps + warp] += static_cast<double>(dot);
    }
  }
  if (!need_sums) return;
  __syncthreads();
  for (int n = threadIdx.x; n < num_concepts; n += kMergeThreads) {
    double total = 0;
    for (int w = 0; w < kMergeWarps; ++w) total += shared[n * kMergeWarps + w];
    table.partial[int64_t(blockIdx.x) * all_concepts + first_concept + n] = total;
  }
}

}  // namespace cuda
}  // namespace mima
