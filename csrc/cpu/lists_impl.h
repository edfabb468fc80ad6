// The bodies behind kernels.h for lists of tensors, element by element: Adam's step, its gradient,
// and linear combinations. Included by kernels_impl.h.
#pragma once

#include "cpu/merge_impl.h"

namespace mima {
namespace {

// A rule's numbers in the accumulator type.
template <class T>
struct Adam {
  using Vec = typename Traits<T>::Vec;
  using Acc = typename Traits<T>::Acc;
  Acc step, keep, beta1, rest1, beta2, rest2, eps, inverse2;

  explicit Adam(const AdamRule& rule)
      : step(static_cast<Acc>(rule.step)),
        keep(static_cast<Acc>(rule.keep)),
        beta1(static_cast<Acc>(rule.beta1)),
        rest1(static_cast<Acc>(rule.rest1)),
        beta2(static_cast<Acc>(rule.beta2)),
        rest2(static_cast<Acc>(rule.rest2)),
        eps(static_cast<Acc>(rule.eps)),
        inverse2(static_cast<Acc>(1 / rule.correction2)) {}

  MIMA_INLINE Vec first(Vec g, Vec m) const { return beta1 * m + rest1 * g; }
  MIMA_INLINE Vec second(Vec g, Vec v) const { return beta2 * v + rest2 * g * g; }
  MIMA_INLINE Vec root(Vec v) const {
    const Vec corrected = inverse2 * v;
    return square_root(corrected > Vec{} ? corrected : Vec{});
  }

  // in and out as StorageKernels::adam has them
  MIMA_INLINE void forward(const Vec in[4], Vec out[3]) const {
    out[1] = first(in[1], in[2]);
    out[2] = second(in[1], in[3]);
    out[0] = keep * in[0] - step * out[1] / (root(out[2]) + eps);
  }

  // in and out as StorageKernels::adam_backward has them
  MIMA_INLINE void backward(const Vec in[6], Vec out[4]) const {
    const Vec bar_z = in[0], g = in[3], m = first(g, in[4]), v = second(g, in[5]);
    const Vec r = root(v), inverse = Acc(1) / (r + eps);
    const Vec slope = step * bar_z * inverse;
    const Vec bar_m = in[1] - slope;
    // the root has slope 0 at 0
    const Vec through_root = slope * m * inverse * (inverse2 / 2) / (r > Vec{} ? r : Vec{} + 1);
    const Vec bar_v = in[2] + (r > Vec{} ? through_root : Vec{});
    out[0] = keep * bar_z;
    out[1] = rest1 * bar_m + 2 * rest2 * g * bar_v;
    out[2] = beta1 * bar_m;
    out[3] = beta2 * bar_v;
  }
};

// out[size] = f(in[size]), vector by vector; an `out` that is null is not needed.
template <class T, bool STREAM, int IN, int OUT, class F>
MIMA_INLINE void map_run(const void* const* in, void* const* out, int64_t size, const F& f) {
  using Vec = typename Traits<T>::Vec;
  Vec given[IN], made[OUT];
  int64_t i = 0;
  for (; i + kLanes<T> <= size; i += kLanes<T>) {
#pragma GCC unroll 6
    for (int k = 0; k < IN; ++k) given[k] = load(static_cast<const T*>(in[k]) + i);
    f(given, made);
#pragma GCC unroll 4
    for (int k = 0; k < OUT; ++k)
      if (out[k] != nullptr) store_or_stream<STREAM>(static_cast<T*>(out[k]) + i, made[k]);
  }
  if (i < size) {
    for (int k = 0; k < IN; ++k) given[k] = load_part(static_cast<const T*>(in[k]) + i, size - i);
    f(given, made);
    for (int k = 0; k < OUT; ++k)
      if (out[k] != nullptr) store_part(static_cast<T*>(out[k]) + i, made[k], size - i);
  }
  if (STREAM) fence();
}

template <class T, int OUT>
bool may_stream_all(void* const* out) {
  for (int k = 0; k < OUT; ++k)
    if (!may_stream<T>(out[k])) return false;
  return true;
}

template <class T>
void adam(const AdamRule& rule, const void* const in[4], void* const out[3], int64_t size,
          bool stream) {
  using Vec = typename Traits<T>::Vec;
  const Adam<T> numbers(rule);
  const auto f = [&](const Vec* given, Vec* made)
                     __attribute__((always_inline)) { numbers.forward(given, made); };
  if (stream && may_stream_all<T, 3>(out))
    map_run<T, true, 4, 3>(in, out, size, f);
  else
    map_run<T, false, 4, 3>(in, out, size, f);
}

template <class T>
void adam_backward(const AdamRule& rule, const void* const in[6], void* const out[4], int64_t size,
                   bool stream) {
  using Vec = typename Traits<T>::Vec;
  const Adam<T> numbers(rule);
  const auto f = [&](const Vec* given, Vec* made)
                     __attribute__((always_inline)) { numbers.backward(given, made); };
  if (stream && may_stream_all<T, 4>(out))
    map_run<T, true, 6, 4>(in, out, size, f);
  else
    map_run<T, false, 6, 4>(in, out, size, f);
}

template <class T, bool STREAM, int IN, int OUT>
MIMA_INLINE void combine_run(const double* factors, const void* const* in, void* const* out,
                             int64_t size) {
  using Vec = typename Traits<T>::Vec;
  using Acc = typename Traits<T>::Acc;
  Acc factor[OUT][IN];
  for (int i = 0; i < OUT; ++i)
    for (int j = 0; j < IN; ++j) factor[i][j] = static_cast<Acc>(factors[i * IN + j]);
  map_run<T, STREAM, IN, OUT>(in, out, size,
                              [&](const Vec* given, Vec* made) __attribute__((always_inline)) {
#pragma GCC unroll 3
                                for (int i = 0; i < OUT; ++i) {
                                  Vec sum{};
#pragma GCC unroll 3
                                  for (int j = 0; j < IN; ++j)
                                    // infinity times 0 would be NaN
                                    if (factor[i][j] != 0) sum += factor[i][j] * given[j];
                                  made[i] = sum;
                                }
                              });
}

template <class T, int IN, int OUT>
void combine_of(const double* factors, const void* const* in, void* const* out, int64_t size,
                bool stream) {
  if (stream && may_stream_all<T, OUT>(out))
    combine_run<T, true, IN, OUT>(factors, in, out, size);
  else
    combine_run<T, false, IN, OUT>(factors, in, out, size);
}

template <class T>
void combine(const double* factors, int num_in, int num_out, const void* const* in,
             void* const* out, int64_t size, bool stream) {
  static_assert(CombineParams::kMost == 3);
  using Run = void (*)(const double*, const void* const*, void* const*, int64_t, bool);
  static constexpr Run kRuns[3][3] = {
      {combine_of<T, 1, 1>, combine_of<T, 1, 2>, combine_of<T, 1, 3>},
      {combine_of<T, 2, 1>, combine_of<T, 2, 2>, combine_of<T, 2, 3>},
      {combine_of<T, 3, 1>, combine_of<T, 3, 2>, combine_of<T, 3, 3>}};
  kRuns[num_in - 1][num_out - 1](factors, in, out, size, stream);
}

}  // namespace
}  // namespace mima
