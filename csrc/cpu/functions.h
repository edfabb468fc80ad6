// Elementary functions of vectors, anonymous like those of simd.h.
#pragma once

#include "cpu/simd.h"

namespace mima {
namespace {

// e^x, to some roundings; x is taken to the range in which the result is a normal number.
MIMA_INLINE VecF exponential(VecF x) {
  x = x > 88.f ? VecF{} + 88.f : x;
  x = x < -87.f ? VecF{} - 87.f : x;
  // adding 1.5 * 2^23 rounds to a whole number
  const VecF n = (x * 1.44269504f + 12582912.f) - 12582912.f;
  // ln 2 in two parts, the first of which has few digits
  const VecF r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  VecF y = VecF{} + 1.9875691500e-4f;  // Cephes' expf
  y = y * r + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * (r * r) + r + 1.f;
  return y * bits<VecF>((__builtin_convertvector(n, VecI) + 127) << 23);
}

MIMA_INLINE VecD exponential(VecD x) {
  x = x > 709. ? VecD{} + 709. : x;
  x = x < -708. ? VecD{} - 708. : x;
  const VecD n = (x * 1.4426950408889634 + 6755399441055744.) - 6755399441055744.;
  const VecD r = (x - n * 6.93147180369123816490e-01) - n * 1.90821492927058770002e-10;
  VecD y = VecD{} + 1.6059043836821615e-10;  // 1/13!, and so on: Taylor's series
  y = y * r + 2.08767569878681e-09;
  y = y * r + 2.505210838544172e-08;
  y = y * r + 2.755731922398589e-07;
  y = y * r + 2.7557319223985893e-06;
  y = y * r + 2.48015873015873e-05;
  y = y * r + 1.984126984126984e-04;
  y = y * r + 1.3888888888888889e-03;
  y = y * r + 8.333333333333333e-03;
  y = y * r + 4.1666666666666664e-02;
  y = y * r + 1.6666666666666666e-01;
  y = y * r + 0.5;
  y = y * (r * r) + r + 1.;
  return y * bits<VecD>((__builtin_convertvector(n, VecL) + 1023) << 52);
}

template <class Vec>
MIMA_INLINE Vec sigmoid(Vec x) {
  return 1 / (1 + exponential(-x));
}

// Phi(b), the share of a normal distribution that lies below b, and its density at b.
MIMA_INLINE void normal(VecF b, VecF& below, VecF& density) {
  const VecF z = b < 0.f ? -b : b;
  const VecF bell = exponential(z * z * -0.5f);
  density = bell * 0.398942280f;
  // what lies above z is the bell times a function of t, here a polynomial that was fitted to it
  // for z <= 13, to 2e-7 of Phi and 4e-7 of the tail
  const VecF t = 1.f / (1.f + 0.35f * z);
  VecF tail = VecF{} - 0.0238664016f;
  tail = tail * t + 0.116461025f;
  tail = tail * t - 0.193983697f;
  tail = tail * t + 0.08111208f;
  tail = tail * t + 0.038013178f;
  tail = tail * t + 0.0748702427f;
  tail = tail * t + 0.129635025f;
  tail = tail * t + 0.137936602f;
  tail = tail * t + 0.13983166f;
  tail = tail * t - 9.71849796e-06f;
  tail *= bell;
  below = b < 0.f ? tail : 1.f - tail;
}

MIMA_INLINE void normal(VecD b, VecD& below, VecD& density) {
  density = exponential(b * b * -0.5) * 0.3989422804014327;
  for (int64_t i = 0; i < kLanes<double>; ++i)
    below[i] = 0.5 * __builtin_erfc(b[i] * -0.7071067811865476);
}

}  // namespace
}  // namespace mima
