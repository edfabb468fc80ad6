// The bodies behind kernels.h for stored tensors: rows in and out of the accumulator type, and the
// weighted merge with its gradients. Included by kernels_impl.h.
#pragma once

#include "cpu/simd.h"

namespace mima {
namespace {

template <class T>
void load_rows(const void* src, int64_t ld_src, int64_t rows, int64_t cols, void* dst,
               int64_t ld_dst) {
  using Acc = typename Traits<T>::Acc;
  for (int64_t i = 0; i < rows; ++i) {
    const T* from = static_cast<const T*>(src) + i * ld_src;
    Acc* to = static_cast<Acc*>(dst) + i * ld_dst;
    int64_t j = 0;
    for (; j + kLanes<T> <= cols; j += kLanes<T>) store(to + j, load(from + j));
    if (j < cols) store(to + j, load_part(from + j, cols - j));
  }
}

template <class T>
void load_difference_rows(const void* src, int64_t ld_src, const void* base, int64_t ld_base,
                          int64_t rows, int64_t cols, void* dst, int64_t ld_dst) {
  using Acc = typename Traits<T>::Acc;
  for (int64_t i = 0; i < rows; ++i) {
    const T* from = static_cast<const T*>(src) + i * ld_src;
    const T* less = static_cast<const T*>(base) + i * ld_base;
    Acc* to = static_cast<Acc*>(dst) + i * ld_dst;
    int64_t j = 0;
    for (; j + kLanes<T> <= cols; j += kLanes<T>) store(to + j, load(from + j) - load(less + j));
    if (j < cols) store(to + j, load_part(from + j, cols - j) - load_part(less + j, cols - j));
  }
}

template <class T>
void add_rows(const void* src, int64_t ld_src, int64_t rows, int64_t cols, void* dst,
              int64_t ld_dst) {
  using Acc = typename Traits<T>::Acc;
  for (int64_t i = 0; i < rows; ++i) {
    const Acc* from = static_cast<const Acc*>(src) + i * ld_src;
    T* to = static_cast<T*>(dst) + i * ld_dst;
    int64_t j = 0;
    for (; j + kLanes<T> <= cols; j += kLanes<T>) store(to + j, load(to + j) + load(from + j));
    if (j < cols) store_part(to + j, load_part(to + j, cols - j) + load(from + j), cols - j);
  }
}

// Four vectors at a time keep enough loads in flight to reach the memory's bandwidth.
constexpr int kUnroll = 4;

template <class T>
bool may_stream(const void* p) {
  return reinterpret_cast<uintptr_t>(p) % (kLanes<T> * sizeof(T)) == 0;
}

template <class T, bool STREAM>
MIMA_INLINE void store_row(const typename Traits<T>::Acc* from, int64_t cols, T* to) {
  int64_t j = 0;
  for (; j + kLanes<T> <= cols; j += kLanes<T>) store_or_stream<STREAM>(to + j, load(from + j));
  if (j < cols) store_part(to + j, load(from + j), cols - j);
}

template <class T, bool STREAM>
void store_rows(const void* src, int64_t ld_src, int64_t rows, int64_t cols, void* dst,
                int64_t ld_dst) {
  using Acc = typename Traits<T>::Acc;
  for (int64_t i = 0; i < rows; ++i) {
    const Acc* from = static_cast<const Acc*>(src) + i * ld_src;
    T* to = static_cast<T*>(dst) + i * ld_dst;
    if (STREAM && may_stream<T>(to))
      store_row<T, true>(from, cols, to);
    else
      store_row<T, false>(from, cols, to);
  }
  if (STREAM) fence();
}

template <class T, bool STREAM>
void merge_run(T* to, const T* from, const void* const* thetas, const double* weights,
               int64_t num_concepts, int64_t size) {
  using Vec = typename Traits<T>::Vec;
  using Acc = typename Traits<T>::Acc;
  int64_t i = 0;
  for (; i + kUnroll * kLanes<T> <= size; i += kUnroll * kLanes<T>) {
    Vec b[kUnroll], total[kUnroll];
#pragma GCC unroll 4
    for (int u = 0; u < kUnroll; ++u) {
      b[u] = load(from + i + u * kLanes<T>);
      total[u] = Vec{};
    }
    for (int64_t n = 0; n < num_concepts; ++n) {
      const T* theta = static_cast<const T*>(thetas[n]) + i;
      const Vec w = broadcast<Vec>(static_cast<Acc>(weights[n]));
#pragma GCC unroll 4
      for (int u = 0; u < kUnroll; ++u) total[u] += w * (load(theta + u * kLanes<T>) - b[u]);
    }
#pragma GCC unroll 4
    for (int u = 0; u < kUnroll; ++u)
      store_or_stream<STREAM>(to + i + u * kLanes<T>, b[u] + total[u]);
  }
  for (; i < size; i += kLanes<T>) {
    const int64_t count = size - i < kLanes<T> ? size - i : kLanes<T>;
    const Vec b = load_part(from + i, count);
    Vec total = {};
    for (int64_t n = 0; n < num_concepts; ++n)
      total += static_cast<Acc>(weights[n]) *
               (load_part(static_cast<const T*>(thetas[n]) + i, count) - b);
    store_part(to + i, b + total, count);
  }
  if (STREAM) fence();
}

template <class T>
void merge(void* out, const void* base, const void* const* thetas, const double* weights,
           int64_t num_concepts, int64_t size, bool stream) {
  const auto run = stream && may_stream<T>(out) ? merge_run<T, true> : merge_run<T, false>;
  run(static_cast<T*>(out), static_cast<const T*>(base), thetas, weights, num_concepts, size);
}

// to = factor * from
template <class T, bool STREAM>
MIMA_INLINE void scale_run(const T* from, typename Traits<T>::Acc factor, T* to, int64_t size) {
  int64_t i = 0;
  for (; i + kLanes<T> <= size; i += kLanes<T>)
    store_or_stream<STREAM>(to + i, factor * load(from + i));
  if (i < size) store_part(to + i, factor * load_part(from + i, size - i), size - i);
}

// <upstream, theta - base>, and to = w * upstream where `to` is not null.
template <class T, bool STREAM>
MIMA_INLINE typename Traits<T>::Acc dot_run(const T* upstream, const T* theta, const T* base,
                                            typename Traits<T>::Acc w, T* to, int64_t size) {
  using Vec = typename Traits<T>::Vec;
  Vec total[kUnroll] = {};
  int64_t i = 0;
  for (; i + kUnroll * kLanes<T> <= size; i += kUnroll * kLanes<T>) {
#pragma GCC unroll 4
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t at = i + u * kLanes<T>;
      const Vec g = load(upstream + at);
      total[u] += g * (load(theta + at) - load(base + at));
      if (to != nullptr) store_or_stream<STREAM>(to + at, w * g);
    }
  }
  for (; i < size; i += kLanes<T>) {
    const int64_t count = size - i < kLanes<T> ? size - i : kLanes<T>;
    const Vec g = load_part(upstream + i, count);
    total[0] += g * (load_part(theta + i, count) - load_part(base + i, count));
    if (to != nullptr) store_part(to + i, w * g, count);
  }
  return sum((total[0] + total[1]) + (total[2] + total[3]));
}

template <class T, bool STREAM>
void merge_backward_run(const T* upstream, const T* base, const void* const* thetas,
                        const double* weights, int64_t num_concepts, int64_t size, T* d_base,
                        void* const* d_thetas, double* d_weights) {
  using Acc = typename Traits<T>::Acc;
  double rest = 1;
  for (int64_t n = 0; n < num_concepts; ++n) rest -= weights[n];
  // one concept at a time over pieces that stay in the first-level cache
  constexpr int64_t kPiece = 2048;
  for (int64_t at = 0; at < size; at += kPiece) {
    const int64_t count = size - at < kPiece ? size - at : kPiece;
    if (d_base != nullptr)
      scale_run<T, STREAM>(upstream + at, static_cast<Acc>(rest), d_base + at, count);
    for (int64_t n = 0; n < num_concepts; ++n) {
      const Acc w = static_cast<Acc>(weights[n]);
      T* to = d_thetas == nullptr ? nullptr : static_cast<T*>(d_thetas[n]) + at;
      if (d_weights != nullptr)
        // pieces are summed in double: a model has 10^9 terms
        d_weights[n] += static_cast<double>(dot_run<T, STREAM>(
            upstream + at, static_cast<const T*>(thetas[n]) + at, base + at, w, to, count));
      else if (to != nullptr)
        scale_run<T, STREAM>(upstream + at, w, to, count);
    }
  }
  if (STREAM) fence();
}

template <class T>
void merge_backward(const void* d_out, const void* base, const void* const* thetas,
                    const double* weights, int64_t num_concepts, int64_t size, void* d_base,
                    void* const* d_thetas, double* d_weights, bool stream) {
  stream = stream && may_stream<T>(d_base);
  for (int64_t n = 0; n < num_concepts && d_thetas != nullptr; ++n)
    stream = stream && may_stream<T>(d_thetas[n]);
  const auto run = stream ? merge_backward_run<T, true> : merge_backward_run<T, false>;
  run(static_cast<const T*>(d_out), static_cast<const T*>(base), thetas, weights, num_concepts,
      size, static_cast<T*>(d_base), d_thetas, d_weights);
}

}  // namespace
}  // namespace mima
