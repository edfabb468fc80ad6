// Vectors of MIMA_VECTOR_BYTES bytes in the compiler's own vector extensions, so that one source
// serves SSE2, NEON, AVX2 and AVX-512; intrinsics only where no portable expression compiles to the
// one instruction. Included by kernels_<level>.cpp, after it has set the target: everything here is
// in an anonymous namespace, because a function that the linker merged across levels would run
// instructions that the processor may not have. For the same reason nothing here calls into std::.
#pragma once

namespace mima {
namespace {

#define MIMA_INLINE __attribute__((always_inline)) inline

typedef float VecF __attribute__((vector_size(MIMA_VECTOR_BYTES)));
typedef double VecD __attribute__((vector_size(MIMA_VECTOR_BYTES)));
typedef uint32_t VecU __attribute__((vector_size(MIMA_VECTOR_BYTES)));
typedef int32_t VecI __attribute__((vector_size(MIMA_VECTOR_BYTES)));
typedef int64_t VecL __attribute__((vector_size(MIMA_VECTOR_BYTES)));
typedef uint16_t VecH __attribute__((vector_size(MIMA_VECTOR_BYTES / 2)));

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// Acc: the type that T is computed in. Vec: a vector of it.
template <class T>
struct Traits;
template <>
struct Traits<float> {
  using Acc = float;
  using Vec = VecF;
};
template <>
struct Traits<double> {
  using Acc = double;
  using Vec = VecD;
};
template <>
struct Traits<BFloat16> : Traits<float> {};
template <>
struct Traits<Float16> : Traits<float> {};

template <class T>
constexpr int64_t kLanes = MIMA_VECTOR_BYTES / sizeof(typename Traits<T>::Acc);

// x in every lane. A difference, which compilers know to be x itself; 0 + x is another number where
// x is -0, and would be computed, in the units that a product's multiply-adds wait for.
template <class Vec, class T>
MIMA_INLINE Vec broadcast(T x) {
  return x - Vec{};
}

// Unaligned access: memcpy of a whole vector is one instruction.
template <class V, class T>
MIMA_INLINE V read(const T* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof(V));
  return v;
}
template <class V, class T>
MIMA_INLINE void write(T* p, const V& v) {
  __builtin_memcpy(p, &v, sizeof(V));
}

template <class To, class From>
MIMA_INLINE To bits(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "reinterprets bits");
  return read<To>(&from);
}

MIMA_INLINE VecF widen(VecH h, BFloat16) {
  return bits<VecF>(__builtin_convertvector(h, VecU) << 16);
}

MIMA_INLINE VecH narrow(VecF f, BFloat16) {
  const VecU u = bits<VecU>(f);
  // to nearest, ties to even
  const VecU rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const VecU quiet_nan = (u >> 16) | 0x40u;
  const VecI is_number = f == f;
  return __builtin_convertvector(is_number ? rounded : quiet_nan, VecH);
}

#if MIMA_VECTOR_BYTES == 64
MIMA_INLINE VecF widen(VecH h, Float16) {
  return bits<VecF>(_mm512_cvtph_ps(bits<__m256i>(h)));
}
MIMA_INLINE VecH narrow(VecF f, Float16) {
  return bits<VecH>(_mm512_cvtps_ph(bits<__m512>(f), _MM_FROUND_TO_NEAREST_INT));
}
#elif MIMA_VECTOR_BYTES == 32
MIMA_INLINE VecF widen(VecH h, Float16) {
  return bits<VecF>(_mm256_cvtph_ps(bits<__m128i>(h)));
}
MIMA_INLINE VecH narrow(VecF f, Float16) {
  return bits<VecH>(_mm256_cvtps_ph(bits<__m256>(f), _MM_FROUND_TO_NEAREST_INT));
}
#else
MIMA_INLINE VecF widen(VecH h, Float16) {
  const VecU u = __builtin_convertvector(h, VecU);
  const VecU magnitude = (u & 0x7fffu) << 13;
  // 2^112 moves the exponent from bias 15 to 127, subnormals included
  const VecF scaled = bits<VecF>(magnitude) * 0x1p112f;
  const VecI is_special = bits<VecI>(magnitude) >= 0x7c00 << 13;
  const VecU number = is_special ? (magnitude | 0x7f800000u) : bits<VecU>(scaled);
  return bits<VecF>(number | ((u & 0x8000u) << 16));
}
MIMA_INLINE VecH narrow(VecF f, Float16) {
  const VecU u = bits<VecU>(f);
  const VecU sign = (u >> 16) & 0x8000u;
  const VecU magnitude = u & 0x7fffffffu;
  const VecI order = bits<VecI>(magnitude);
  // adding 0.5 leaves a subnormal result, correctly rounded, in the low bits of the sum
  const VecF half = bits<VecF>(VecU{} + (126u << 23));
  const VecU subnormal = bits<VecU>(bits<VecF>(magnitude) + half) - (126u << 23);
  const VecU normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const VecU infinite_or_nan = order > 0x7f800000 ? VecU{} + 0x7e00u : VecU{} + 0x7c00u;
  VecU result = order < (113 << 23) ? subnormal : normal;
  result = order >= (143 << 23) ? infinite_or_nan : result;
  return __builtin_convertvector(result | sign, VecH);
}
#endif

MIMA_INLINE VecF load(const float* p) {
  return read<VecF>(p);
}
MIMA_INLINE VecD load(const double* p) {
  return read<VecD>(p);
}
template <class T>
MIMA_INLINE VecF load(const T* p) {
  return widen(read<VecH>(p), T{});
}

MIMA_INLINE void store(float* p, VecF v) {
  write(p, v);
}
MIMA_INLINE void store(double* p, VecD v) {
  write(p, v);
}
template <class T>
MIMA_INLINE void store(T* p, VecF v) {
  write(p, narrow(v, T{}));
}

// Stores that go to memory without reading the line first, and without displacing what the caches
// hold: for results larger than the caches. p is a multiple of the stored size; fence() afterwards.
#if defined(__x86_64__)
MIMA_INLINE void stream_bits(void* p, __m128i v) {
  _mm_stream_si128(static_cast<__m128i*>(p), v);
}
#if MIMA_VECTOR_BYTES >= 32
MIMA_INLINE void stream_bits(void* p, __m256i v) {
  _mm256_stream_si256(static_cast<__m256i*>(p), v);
}
#endif
#if MIMA_VECTOR_BYTES == 64
using Register = __m512i;
using HalfRegister = __m256i;
MIMA_INLINE void stream_bits(void* p, __m512i v) {
  _mm512_stream_si512(static_cast<__m512i*>(p), v);
}
#elif MIMA_VECTOR_BYTES == 32
using Register = __m256i;
using HalfRegister = __m128i;
#else
using Register = __m128i;
using HalfRegister = uint64_t;
MIMA_INLINE void stream_bits(void* p, uint64_t v) {
  _mm_stream_si64(static_cast<long long*>(p), static_cast<long long>(v));
}
#endif
MIMA_INLINE void stream(float* p, VecF v) {
  stream_bits(p, bits<Register>(v));
}
MIMA_INLINE void stream(double* p, VecD v) {
  stream_bits(p, bits<Register>(v));
}
template <class T>
MIMA_INLINE void stream(T* p, VecF v) {
  stream_bits(p, bits<HalfRegister>(narrow(v, T{})));
}
MIMA_INLINE void fence() {
  _mm_sfence();
}
#else
template <class T>
MIMA_INLINE void stream(T* p, typename Traits<T>::Vec v) {
  store(p, v);
}
MIMA_INLINE void fence() {}
#endif

template <bool STREAM, class T>
MIMA_INLINE void store_or_stream(T* p, typename Traits<T>::Vec v) {
  if constexpr (STREAM)
    stream(p, v);
  else
    store(p, v);
}

// The first `count` elements, zeros beyond.
template <class T>
MIMA_INLINE typename Traits<T>::Vec load_part(const T* p, int64_t count) {
  T buffer[kLanes<T>] = {};
  for (int64_t i = 0; i < count; ++i) buffer[i] = p[i];
  return load(static_cast<const T*>(buffer));
}

template <class T>
MIMA_INLINE void store_part(T* p, typename Traits<T>::Vec v, int64_t count) {
  T buffer[kLanes<T>];
  store(static_cast<T*>(buffer), v);
  for (int64_t i = 0; i < count; ++i) p[i] = buffer[i];
}

// The root of each lane.
#if MIMA_VECTOR_BYTES == 64
MIMA_INLINE VecF square_root(VecF v) {
  return bits<VecF>(_mm512_sqrt_ps(bits<__m512>(v)));
}
MIMA_INLINE VecD square_root(VecD v) {
  return bits<VecD>(_mm512_sqrt_pd(bits<__m512d>(v)));
}
#elif MIMA_VECTOR_BYTES == 32
MIMA_INLINE VecF square_root(VecF v) {
  return bits<VecF>(_mm256_sqrt_ps(bits<__m256>(v)));
}
MIMA_INLINE VecD square_root(VecD v) {
  return bits<VecD>(_mm256_sqrt_pd(bits<__m256d>(v)));
}
#else
MIMA_INLINE VecF square_root(VecF v) {
  return VecF{__builtin_sqrtf(v[0]), __builtin_sqrtf(v[1]), __builtin_sqrtf(v[2]),
              __builtin_sqrtf(v[3])};
}
MIMA_INLINE VecD square_root(VecD v) {
  return VecD{__builtin_sqrt(v[0]), __builtin_sqrt(v[1])};
}
#endif

// The sum of all lanes.
#if MIMA_VECTOR_BYTES == 64
MIMA_INLINE float sum(VecF v) {
  return _mm512_reduce_add_ps(bits<__m512>(v));
}
MIMA_INLINE double sum(VecD v) {
  return _mm512_reduce_add_pd(bits<__m512d>(v));
}
#elif MIMA_VECTOR_BYTES == 32
MIMA_INLINE float sum(VecF v) {
  const __m256 x = bits<__m256>(v);
  __m128 y = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  y = _mm_add_ps(y, _mm_movehl_ps(y, y));
  return _mm_cvtss_f32(_mm_add_ss(y, _mm_movehdup_ps(y)));
}
MIMA_INLINE double sum(VecD v) {
  const __m256d x = bits<__m256d>(v);
  const __m128d y = _mm_add_pd(_mm256_castpd256_pd128(x), _mm256_extractf128_pd(x, 1));
  return _mm_cvtsd_f64(_mm_add_sd(y, _mm_unpackhi_pd(y, y)));
}
#else
MIMA_INLINE float sum(VecF v) {
  return (v[0] + v[2]) + (v[1] + v[3]);
}
MIMA_INLINE double sum(VecD v) {
  return v[0] + v[1];
}
#endif

// The first halves of a and b, or the second ones, element by element in turn.
#if defined(__clang__)
#define MIMA_SHUFFLE(MASK, a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define MIMA_SHUFFLE(MASK, a, b, ...) __builtin_shuffle(a, b, (MASK){__VA_ARGS__})
#endif
#if MIMA_VECTOR_BYTES == 64
MIMA_INLINE VecF interleave_first(VecF a, VecF b) {
  return MIMA_SHUFFLE(VecI, a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
}
MIMA_INLINE VecF interleave_second(VecF a, VecF b) {
  return MIMA_SHUFFLE(VecI, a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
}
MIMA_INLINE VecD interleave_first(VecD a, VecD b) {
  return MIMA_SHUFFLE(VecL, a, b, 0, 8, 1, 9, 2, 10, 3, 11);
}
MIMA_INLINE VecD interleave_second(VecD a, VecD b) {
  return MIMA_SHUFFLE(VecL, a, b, 4, 12, 5, 13, 6, 14, 7, 15);
}
#elif MIMA_VECTOR_BYTES == 32
MIMA_INLINE VecF interleave_first(VecF a, VecF b) {
  return MIMA_SHUFFLE(VecI, a, b, 0, 8, 1, 9, 2, 10, 3, 11);
}
MIMA_INLINE VecF interleave_second(VecF a, VecF b) {
  return MIMA_SHUFFLE(VecI, a, b, 4, 12, 5, 13, 6, 14, 7, 15);
}
MIMA_INLINE VecD interleave_first(VecD a, VecD b) {
  return MIMA_SHUFFLE(VecL, a, b, 0, 4, 1, 5);
}
MIMA_INLINE VecD interleave_second(VecD a, VecD b) {
  return MIMA_SHUFFLE(VecL, a, b, 2, 6, 3, 7);
}
#else
MIMA_INLINE VecF interleave_first(VecF a, VecF b) {
  return MIMA_SHUFFLE(VecI, a, b, 0, 4, 1, 5);
}
MIMA_INLINE VecF interleave_second(VecF a, VecF b) {
  return MIMA_SHUFFLE(VecI, a, b, 2, 6, 3, 7);
}
MIMA_INLINE VecD interleave_first(VecD a, VecD b) {
  return MIMA_SHUFFLE(VecL, a, b, 0, 2);
}
MIMA_INLINE VecD interleave_second(VecD a, VecD b) {
  return MIMA_SHUFFLE(VecL, a, b, 1, 3);
}
#endif
#undef MIMA_SHUFFLE

// Transposes kLanes<T> vectors. Interleaving rows i and i + half moves the highest bit of the
// column number to the lowest of the row number, and the other way round; after as many rounds as
// there are bits the numbers have changed places.
template <class T>
MIMA_INLINE void transpose(typename Traits<T>::Vec* v) {
  constexpr int kHalf = kLanes<T> / 2;
  typename Traits<T>::Vec turned[2 * kHalf];
#pragma GCC unroll 4
  for (int round = 1; round < 2 * kHalf; round *= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < kHalf; ++i) {
      turned[2 * i] = interleave_first(v[i], v[i + kHalf]);
      turned[2 * i + 1] = interleave_second(v[i], v[i + kHalf]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < 2 * kHalf; ++i) v[i] = turned[i];
  }
}

// The sums of kLanes<T> vectors, one in each lane: a transposition that adds what it interleaves.
template <class T>
MIMA_INLINE typename Traits<T>::Vec sum_each(const typename Traits<T>::Vec* v) {
  constexpr int kCount = kLanes<T>;
  typename Traits<T>::Vec part[kCount];
#pragma GCC unroll 16
  for (int i = 0; i < kCount; ++i) part[i] = v[i];
#pragma GCC unroll 4
  for (int half = kCount / 2; half > 0; half /= 2)
#pragma GCC unroll 8
    for (int i = 0; i < half; ++i)
      part[i] =
          interleave_first(part[i], part[i + half]) + interleave_second(part[i], part[i + half]);
  return part[0];
}

}  // namespace
}  // namespace mima
