// The bodies behind kernels.h for the layers of a network: normalisation, gated activation, and the
// rows of attention. Included by kernels_impl.h.
#pragma once

#include "cpu/functions.h"
#include "cpu/lists_impl.h"

namespace mima {
namespace {

// The first `count` elements, zeros beyond, where count is mostly a whole vector.
template <class T>
MIMA_INLINE typename Traits<T>::Vec load_some(const T* p, int64_t count) {
  return count == kLanes<T> ? load(p) : load_part(p, count);
}

template <class T>
MIMA_INLINE void store_some(T* p, typename Traits<T>::Vec v, int64_t count) {
  if (count == kLanes<T>)
    store(p, v);
  else
    store_part(p, v, count);
}

// Ones in the first `count` lanes.
template <class T>
MIMA_INLINE typename Traits<T>::Vec ones(int64_t count) {
  typename Traits<T>::Acc one[kLanes<T>] = {};
  for (int64_t i = 0; i < count; ++i) one[i] = 1;
  return load(one);
}

// A group's elements, weights and sums. SPREAD: a channel is one element, so that a vector has a
// weight in each lane; otherwise a channel is a run of elements with one weight.
template <class T, bool SPREAD>
struct Norm {
  using Vec = typename Traits<T>::Vec;
  using Acc = typename Traits<T>::Acc;

  const NormGroup& group;
  int64_t size;
  Acc mean, rho;
  Acc* rows[kNormScratch];

  explicit Norm(const NormGroup& g) : group(g), size(g.channels * g.m) {
    for (int64_t k = 0; k < kNormScratch; ++k)
      rows[k] = static_cast<Acc*>(g.scratch) + k * (size + kLanes<T>);
    Vec total = {};
    each([&](int64_t, int64_t at, int64_t count)
             __attribute__((always_inline)) { total += input(g.x, at, count); });
    mean = sum(total) / static_cast<Acc>(size);
    Vec squares = {};
    each([&](int64_t, int64_t at, int64_t count) __attribute__((always_inline)) {
      Vec centred = input(g.x, at, count) - mean;
      if (count < kLanes<T>) centred *= ones<T>(count);
      squares += centred * centred;
    });
    const Vec variance = Vec{} + (sum(squares) / static_cast<Acc>(size) + static_cast<Acc>(g.eps));
    rho = (Acc(1) / square_root(variance))[0];
  }

  // Calls f(channel, element, count) for each vector.
  template <class F>
  MIMA_INLINE void each(const F& f) const {
    const int64_t runs = SPREAD ? 1 : group.channels, length = SPREAD ? group.channels : group.m;
    for (int64_t c = 0; c < runs; ++c) {
      int64_t i = 0;
      for (; i + kLanes<T> <= length; i += kLanes<T>) f(c, c * length + i, kLanes<T>);
      if (i < length) f(c, c * length + i, length - i);
    }
  }
  static MIMA_INLINE Vec input(const void* p, int64_t at, int64_t count) {
    return p == nullptr ? Vec{} : load_some(static_cast<const T*>(p) + at, count);
  }
  static MIMA_INLINE Vec weight(const void* p, Acc absent, int64_t c, int64_t at, int64_t count) {
    if (p == nullptr) return Vec{} + absent;
    if (SPREAD) return load_some(static_cast<const T*>(p) + at, count);
    return Vec{} + load_part(static_cast<const T*>(p) + c, 1)[0];
  }
  MIMA_INLINE Vec gamma(int64_t c, int64_t at, int64_t count) const {
    return weight(group.weight, 1, c, at, count);
  }
  MIMA_INLINE Vec beta(int64_t c, int64_t at, int64_t count) const {
    return weight(group.bias, 0, c, at, count);
  }
  MIMA_INLINE Vec normalised(int64_t at, int64_t count) const {
    return (input(group.x, at, count) - mean) * rho;
  }
  static MIMA_INLINE void output(void* p, int64_t at, Vec v, int64_t count) {
    if (p != nullptr) store_some(static_cast<T*>(p) + at, v, count);
  }
  // Adds to a sum over each channel's elements. What lies beyond `count` is zero, or NaN in a group
  // that is not finite: with SPREAD, the place of the next group's sums.
  static MIMA_INLINE void add(void* p, int64_t c, int64_t at, Vec v, int64_t count) {
    if (p == nullptr) return;
    Acc* total = static_cast<Acc*>(p);
    if (SPREAD)
      store_some(total + at, load_some(total + at, count) + v, count);
    else
      total[c] += sum(v);
  }
  MIMA_INLINE Acc average(Vec total) const { return sum(total) / static_cast<Acc>(size); }
};

template <class T, bool SPREAD>
void norm_group(const NormGroup& group) {
  using Vec = typename Traits<T>::Vec;
  const Norm<T, SPREAD> norm(group);
  norm.each([&](int64_t c, int64_t at, int64_t count) __attribute__((always_inline)) {
    Vec y = norm.normalised(at, count) * norm.gamma(c, at, count) + norm.beta(c, at, count);
    if (group.silu) y *= sigmoid(y);
    norm.output(group.out, at, y, count);
  });
}

template <class T, bool SPREAD>
void norm_group_backward(const NormGroup& group) {
  using Vec = typename Traits<T>::Vec;
  const Norm<T, SPREAD> norm(group);
  auto *const x_hats = norm.rows[0], *const gradients = norm.rows[1];
  Vec total = {}, along = {};
  norm.each([&](int64_t c, int64_t at, int64_t count) __attribute__((always_inline)) {
    const Vec x_hat = norm.normalised(at, count), gamma = norm.gamma(c, at, count);
    Vec d_y = norm.input(group.d_out, at, count);
    if (group.silu) {
      const Vec y = x_hat * gamma + norm.beta(c, at, count), s = sigmoid(y);
      d_y *= s * (1 + y * (1 - s));
    }
    norm.add(group.d_weight, c, at, d_y * x_hat, count);
    norm.add(group.d_bias, c, at, d_y, count);
    const Vec g = gamma * d_y;
    total += g;
    along += g * x_hat;
    store(x_hats + at, x_hat);
    store(gradients + at, g);
  });
  if (group.d_x == nullptr) return;
  const auto mean = norm.average(total), slope = norm.average(along);
  norm.each([&](int64_t, int64_t at, int64_t count) __attribute__((always_inline)) {
    const Vec d_x = norm.rho * (load(gradients + at) - mean - load(x_hats + at) * slope);
    norm.output(group.d_x, at, d_x, count);
  });
}

// The formula is in docs/math.md; v is the derivative of xhat along u_x, e the gradient at y.
template <class T, bool SPREAD>
void norm_group_double_backward(const NormGroup& group) {
  using Vec = typename Traits<T>::Vec;
  const Norm<T, SPREAD> norm(group);
  const auto rho = norm.rho;
  auto *const x_hats = norm.rows[0], *const hs = norm.rows[1], *const fs = norm.rows[2];
  Vec u_total = {}, u_along = {};
  norm.each([&](int64_t, int64_t at, int64_t count) __attribute__((always_inline)) {
    const Vec x_hat = norm.normalised(at, count), u = norm.input(group.u_x, at, count);
    store(x_hats + at, x_hat);
    u_total += u;
    u_along += u * x_hat;
  });
  const auto u_mean = norm.average(u_total), u_slope = norm.average(u_along);
  Vec h_total = {}, h_along = {}, h_v = {}, f_total = {}, f_along = {};
  norm.each([&](int64_t c, int64_t at, int64_t count) __attribute__((always_inline)) {
    const Vec x_hat = load(x_hats + at), gamma = norm.gamma(c, at, count);
    const Vec v = rho * (norm.input(group.u_x, at, count) - u_mean - x_hat * u_slope);
    const Vec u_gamma = norm.weight(group.u_weight, 0, c, at, count);
    Vec y_dot = gamma * v + u_gamma * x_hat + norm.weight(group.u_bias, 0, c, at, count);
    Vec d_y = norm.input(group.d_out, at, count), e = {};
    if (group.silu) {
      const Vec y = x_hat * gamma + norm.beta(c, at, count), s = sigmoid(y), rest = 1 - s;
      const Vec slope = s * (1 + y * rest);
      e = d_y * y_dot * (s * rest * (2 + y * (rest - s)));
      d_y *= slope;
      y_dot *= slope;
    }
    norm.output(group.d_d_out, at, y_dot, count);
    norm.add(group.d_weight, c, at, d_y * v + e * x_hat, count);
    norm.add(group.d_bias, c, at, e, count);
    const Vec h = gamma * d_y, f = gamma * e + u_gamma * d_y;
    h_total += h;
    h_along += h * x_hat;
    h_v += h * v;
    f_total += f;
    f_along += f * x_hat;
    store(hs + at, h);
    store(fs + at, f);
  });
  if (group.d_x == nullptr) return;
  // t = f - rho (h u_slope + u h_slope), of which the mean and the part along xhat are taken off
  const auto h_slope = norm.average(h_along);
  const auto t_mean =
      norm.average(f_total) - rho * (norm.average(h_total) * u_slope + u_mean * h_slope);
  const auto t_slope = norm.average(f_along) - 2 * rho * u_slope * h_slope + norm.average(h_v);
  norm.each([&](int64_t, int64_t at, int64_t count) __attribute__((always_inline)) {
    const Vec u = norm.input(group.u_x, at, count);
    const Vec t = load(fs + at) - rho * (load(hs + at) * u_slope + u * h_slope);
    norm.output(group.d_x, at, rho * (t - t_mean - load(x_hats + at) * t_slope), count);
  });
}

template <class T>
void norm(const NormGroup& group) {
  return group.m == 1 ? norm_group<T, true>(group) : norm_group<T, false>(group);
}

template <class T>
void norm_backward(const NormGroup& group) {
  return group.m == 1 ? norm_group_backward<T, true>(group) : norm_group_backward<T, false>(group);
}

template <class T>
void norm_double_backward(const NormGroup& group) {
  return group.m == 1 ? norm_group_double_backward<T, true>(group)
                      : norm_group_double_backward<T, false>(group);
}

// gelu(b) = b Phi(b) and its derivatives.
template <class Vec>
struct Gelu {
  Vec value, slope, curve;

  MIMA_INLINE explicit Gelu(Vec b) {
    Vec below, density;
    normal(b, below, density);
    value = b * below;
    slope = below + b * density;
    curve = density * (2 - b * b);
  }
};

template <class T>
void geglu(const void* const in[2], void* const out[1], int64_t size) {
  using Vec = typename Traits<T>::Vec;
  map_run<T, false, 2, 1>(in, out, size,
                          [](const Vec* given, Vec* made) __attribute__((always_inline)) {
                            made[0] = given[0] * Gelu<Vec>(given[1]).value;
                          });
}

template <class T>
void geglu_backward(const void* const in[3], void* const out[2], int64_t size) {
  using Vec = typename Traits<T>::Vec;
  map_run<T, false, 3, 2>(in, out, size,
                          [](const Vec* given, Vec* made) __attribute__((always_inline)) {
                            const Gelu<Vec> gelu(given[2]);
                            made[0] = given[0] * gelu.value;
                            made[1] = given[0] * given[1] * gelu.slope;
                          });
}

template <class T>
void geglu_double_backward(const void* const in[5], void* const out[3], int64_t size) {
  using Vec = typename Traits<T>::Vec;
  map_run<T, false, 5, 3>(
      in, out, size, [](const Vec* given, Vec* made) __attribute__((always_inline)) {
        const Vec upstream = given[0], u_a = given[1], u_b = given[2], a = given[3];
        const Gelu<Vec> gelu(given[4]);
        made[0] = u_a * gelu.value + u_b * a * gelu.slope;
        made[1] = upstream * gelu.slope * u_b;
        made[2] = upstream * (u_a * gelu.slope + u_b * a * gelu.curve);
      });
}

// Calls f(element, count) for each vector of n elements.
template <class T, class F>
MIMA_INLINE void each_vector(int64_t n, const F& f) {
  int64_t j = 0;
  for (; j + kLanes<T> <= n; j += kLanes<T>) f(j, kLanes<T>);
  if (j < n) f(j, n - j);
}

template <class T>
void softmax_rows(T* s, int64_t ld, int64_t rows, int64_t n) {
  using Vec = typename Traits<T>::Vec;
  for (int64_t i = 0; i < rows; ++i) {
    T* row = s + i * ld;
    Vec largest = Vec{} + row[0];
    each_vector<T>(n, [&](int64_t j, int64_t count) __attribute__((always_inline)) {
      Vec x = load_some(row + j, count);
      // what is beyond the row does not count
      if (count < kLanes<T>) x = ones<T>(count) > Vec{} ? x : largest;
      largest = x > largest ? x : largest;
    });
    T top = largest[0];
    for (int64_t lane = 1; lane < kLanes<T>; ++lane)
      top = largest[lane] > top ? largest[lane] : top;
    Vec total = {};
    each_vector<T>(n, [&](int64_t j, int64_t count) __attribute__((always_inline)) {
      Vec x = exponential(load_some(row + j, count) - top);
      if (count < kLanes<T>) x *= ones<T>(count);
      store(row + j, x);
      total += x;
    });
    const T inverse = 1 / sum(total);
    each_vector<T>(n, [&](int64_t j, int64_t) __attribute__((always_inline)) {
      store(row + j, load(row + j) * inverse);
    });
  }
}

template <class T>
void softmax_backward_rows(const T* p, T* g, int64_t ld, int64_t rows, int64_t n, T scale) {
  using Vec = typename Traits<T>::Vec;
  for (int64_t i = 0; i < rows; ++i, p += ld, g += ld) {
    Vec total = {};
    each_vector<T>(n, [&](int64_t j, int64_t count) __attribute__((always_inline)) {
      total += load(p + j) * load_some(g + j, count);
    });
    const T mean = sum(total);
    each_vector<T>(n, [&](int64_t j, int64_t count) __attribute__((always_inline)) {
      store(g + j, scale * load(p + j) * (load_some(g + j, count) - mean));
    });
  }
}

template <class T>
void softmax_double_backward_rows(const T* p, T* s, T* g, T* h, int64_t ld, int64_t rows, int64_t n,
                                  T scale) {
  using Vec = typename Traits<T>::Vec;
  for (int64_t i = 0; i < rows; ++i, p += ld, s += ld, g += ld, h += ld) {
    Vec r_total = {}, g_total = {}, e_total = {};
    each_vector<T>(n, [&](int64_t j, int64_t count) __attribute__((always_inline)) {
      const Vec weight = load(p + j), s_j = load_some(s + j, count), g_j = load_some(g + j, count);
      r_total += weight * s_j;
      g_total += weight * g_j;
      e_total += weight * (s_j * g_j + load_some(h + j, count));
    });
    const T r = sum(r_total), D = sum(g_total), mean = sum(e_total) - 2 * r * D;
    each_vector<T>(n, [&](int64_t j, int64_t count) __attribute__((always_inline)) {
      const Vec weight = load(p + j), s_j = load_some(s + j, count), g_j = load_some(g + j, count);
      const Vec e = s_j * g_j - r * g_j - D * s_j + load_some(h + j, count);
      store(s + j, weight * (s_j - r));
      store(g + j, scale * weight * (g_j - D));
      store(h + j, scale * weight * (e - mean));
    });
  }
}

}  // namespace
}  // namespace mima
