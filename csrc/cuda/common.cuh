// What the CUDA kernels share: stored types, their accumulators, 16-byte accesses and reductions.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>

namespace mima {
namespace cuda {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

template <class T>
struct AccOf {
  using type = float;
};
template <>
struct AccOf<double> {
  using type = double;
};
template <class T>
using Acc = typename AccOf<T>::type;

__device__ inline float widen(float x) {
  return x;
}
__device__ inline double widen(double x) {
  return x;
}
__device__ inline float widen(BFloat16 x) {
  return __uint_as_float(static_cast<uint32_t>(x.bits) << 16);
}
__device__ inline float widen(Float16 x) {
  return __half2float(__ushort_as_half(x.bits));
}

__device__ inline void narrow(float x, float* to) {
  *to = x;
}
__device__ inline void narrow(double x, double* to) {
  *to = x;
}
__device__ inline void narrow(float x, BFloat16* to) {
  const uint32_t u = __float_as_uint(x);
  // to nearest, ties to even; NaN stays NaN
  to->bits =
      static_cast<uint16_t>(x != x ? (u >> 16) | 0x40u : (u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}
__device__ inline void narrow(float x, Float16* to) {
  to->bits = __half_as_ushort(__float2half_rn(x));
}

// As many elements as 16 bytes hold, which is the widest single access.
template <class T>
constexpr int kVec = 16 / static_cast<int>(sizeof(T));

template <class T>
struct alignas(16) Vec {
  T at[kVec<T>];
};

// One 16-byte access each: p must be a multiple of 16.
template <class T>
__device__ inline void load(const T* p, Acc<T> (&x)[kVec<T>]) {
  const Vec<T> v = *reinterpret_cast<const Vec<T>*>(p);
#pragma unroll
  for (int i = 0; i < kVec<T>; ++i) x[i] = widen(v.at[i]);
}

template <class T>
__device__ inline void store(T* p, const Acc<T> (&x)[kVec<T>]) {
  Vec<T> v;
#pragma unroll
  for (int i = 0; i < kVec<T>; ++i) narrow(x[i], &v.at[i]);
  *reinterpret_cast<Vec<T>*>(p) = v;
}

constexpr unsigned kAllLanes = 0xffffffffu;

template <class A>
__device__ inline A warp_sum(A x) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(kAllLanes, x, offset);
  return x;
}

// Sums COUNT values over the lanes of a warp, COUNT a multiple of 32: afterwards x[0 .. COUNT / 32)
// of lane l hold the totals of values l * COUNT / 32 and following. Each step halves the values
// that a lane still carries: 62 shuffles for 64 values, where one after the other takes 320. A
// template for each step, because an array indexed by anything but constants would leave the
// registers.
template <int COUNT, int OFFSET = 16, class A, int SIZE>
__device__ inline void warp_sum_many(A (&x)[SIZE], int lane) {
  constexpr int kHalf = COUNT / 2;
  const bool upper = lane & OFFSET;
#pragma unroll
  for (int i = 0; i < kHalf; ++i) {
    const A keep = upper ? x[i + kHalf] : x[i];
    const A give = upper ? x[i] : x[i + kHalf];
    x[i] = keep + __shfl_xor_sync(kAllLanes, give, OFFSET);
  }
  if constexpr (OFFSET > 1) warp_sum_many<kHalf, OFFSET / 2>(x, lane);
}

}  // namespace cuda
}  // namespace mima
