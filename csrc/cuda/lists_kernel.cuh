// Elementwise functions of lists of tensors on CUDA: one launch for all tensors. Block b works on
// piece b, a run of at most kListPiece elements of each list's tensor of one number; a table in
// device memory, written by the host for each call, says which. Every element of the inputs is
// read, by the thread that writes those of the outputs in its place, before it writes any of them:
// a list of outputs may be one of the inputs.
#pragma once

#include <cmath>

#include "cuda/common.cuh"
#include "params.h"

namespace mima {
namespace cuda {

constexpr int kListThreads = 256;
constexpr int kListPiece = 16 * 1024;

// Device addresses into the table of a call.
struct ListTable {
  const int64_t* pieces;   // [num_pieces, 3]: tensor, first element, number of elements
  const int64_t* aligned;  // [P]: nonzero if every address of the tensor is a multiple of 16
  const uint64_t* in;      // [IN * P], list by list
  const uint64_t* out;     // [OUT * P], 0 for a list that is not needed
};

// Vectors of each list that a thread has in flight: those of all lists fill 48 of its registers.
template <class T, int IN>
constexpr int kListUnroll = [] {
  const int registers = IN * kVec<T> * static_cast<int>(sizeof(Acc<T>)) / 4;
  return registers > 24 ? 1 : registers > 12 ? 2 : 4;
}();

// f(in[IN], out[OUT]) is called with one element of each list.
template <class T, int IN, int OUT, class F>
__global__ void __launch_bounds__(kListThreads)
    lists_kernel(ListTable table, int64_t num_tensors, F f) {
  constexpr int kUnroll = kListUnroll<T, IN>;
  constexpr int kTile = kListThreads * kUnroll * kVec<T>;
  const int64_t tensor = table.pieces[3 * blockIdx.x];
  const int64_t start = table.pieces[3 * blockIdx.x + 1];
  const int size = static_cast<int>(table.pieces[3 * blockIdx.x + 2]);
  const bool aligned = table.aligned[tensor] != 0;
  const T* in[IN];
  T* out[OUT];
#pragma unroll
  for (int k = 0; k < IN; ++k)
    in[k] = reinterpret_cast<const T*>(table.in[k * num_tensors + tensor]) + start;
#pragma unroll
  for (int k = 0; k < OUT; ++k) {
    const uint64_t address = table.out[k * num_tensors + tensor];
    out[k] = address == 0 ? nullptr : reinterpret_cast<T*>(address) + start;
  }
  int tile = 0;
  for (; aligned && tile + kTile <= size; tile += kTile) {
    Acc<T> given[IN][kUnroll][kVec<T>];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int at = tile + (u * kListThreads + static_cast<int>(threadIdx.x)) * kVec<T>;
#pragma unroll
      for (int k = 0; k < IN; ++k) load(in[k] + at, given[k][u]);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int at = tile + (u * kListThreads + static_cast<int>(threadIdx.x)) * kVec<T>;
      Acc<T> made[OUT][kVec<T>];
#pragma unroll
      for (int v = 0; v < kVec<T>; ++v) {
        Acc<T> x[IN], y[OUT];
#pragma unroll
        for (int k = 0; k < IN; ++k) x[k] = given[k][u][v];
        f(x, y);
#pragma unroll
        for (int k = 0; k < OUT; ++k) made[k][v] = y[k];
      }
#pragma unroll
      for (int k = 0; k < OUT; ++k)
        if (out[k] != nullptr) store(out[k] + at, made[k]);
    }
  }
  // what is left of a tensor, and views that start off the 16-byte grid
  for (int i = tile + static_cast<int>(threadIdx.x); i < size; i += kListThreads) {
    Acc<T> x[IN], y[OUT];
#pragma unroll
    for (int k = 0; k < IN; ++k) x[k] = widen(in[k][i]);
    f(x, y);
#pragma unroll
    for (int k = 0; k < OUT; ++k)
      if (out[k] != nullptr) narrow(y[k], out[k] + i);
  }
}

// out_i = sum_j factors[i, j] x_j
template <class A, int IN, int OUT>
struct Combine {
  A factors[OUT][IN];

  __device__ void operator()(const A (&x)[IN], A (&y)[OUT]) const {
#pragma unroll
    for (int i = 0; i < OUT; ++i) {
      y[i] = 0;
#pragma unroll
      for (int j = 0; j < IN; ++j)
        // infinity times 0 would be NaN
        if (factors[i][j] != 0) y[i] += factors[i][j] * x[j];
    }
  }
};

__device__ inline float square_root(float x) {
  return sqrtf(x);
}
__device__ inline double square_root(double x) {
  return sqrt(x);
}

// A rule's numbers in the accumulator type.
template <class A>
struct Adam {
  A step, keep, beta1, rest1, beta2, rest2, eps, inverse2;

  explicit Adam(const AdamRule& rule)
      : step(static_cast<A>(rule.step)),
        keep(static_cast<A>(rule.keep)),
        beta1(static_cast<A>(rule.beta1)),
        rest1(static_cast<A>(rule.rest1)),
        beta2(static_cast<A>(rule.beta2)),
        rest2(static_cast<A>(rule.rest2)),
        eps(static_cast<A>(rule.eps)),
        inverse2(static_cast<A>(1 / rule.correction2)) {}

  __device__ A first(A g, A m) const { return beta1 * m + rest1 * g; }
  __device__ A second(A g, A v) const { return beta2 * v + rest2 * g * g; }
  __device__ A root(A v) const { return square_root(v > 0 ? inverse2 * v : A(0)); }
};

// z, g, m, v -> z, m, v after the step
template <class A>
struct AdamForward : Adam<A> {
  using Adam<A>::Adam;

  __device__ void operator()(const A (&x)[4], A (&y)[3]) const {
    y[1] = this->first(x[1], x[2]);
    y[2] = this->second(x[1], x[3]);
    y[0] = this->keep * x[0] - this->step * y[1] / (this->root(y[2]) + this->eps);
  }
};

// Upstream of z, m and v after the step, then g, m, v -> gradients of z, g, m, v
template <class A>
struct AdamBackward : Adam<A> {
  using Adam<A>::Adam;

  __device__ void operator()(const A (&x)[6], A (&y)[4]) const {
    const A g = x[3], m = this->first(g, x[4]);
    const A r = this->root(this->second(g, x[5]));
    const A inverse = 1 / (r + this->eps);
    const A slope = this->step * x[0] * inverse;
    const A bar_m = x[1] - slope;
    // the root has slope 0 at 0
    const A bar_v = r > 0 ? x[2] + slope * m * inverse * (this->inverse2 / 2) / r : x[2];
    y[0] = this->keep * x[0];
    y[1] = this->rest1 * bar_m + 2 * this->rest2 * g * bar_v;
    y[2] = this->beta1 * bar_m;
    y[3] = this->beta2 * bar_v;
  }
};

}  // namespace cuda
}  // namespace mima
