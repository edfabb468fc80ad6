// The vectorised building blocks, compiled once for each instruction set. The operators
// (weighted_merge.cpp and so on) are written in terms of these and know no instruction set.
#pragma once

#include <cstdint>

#include "params.h"

namespace mima {

// One summand of gemm_panels: a[m, k] b[k, n], b packed by pack_panel.
template <class T>
struct PanelTerm {
  const T* a;
  int64_t lda;
  const T* panels;
  int64_t k;
};

// Rows that will be read soon. A product has them fetched meanwhile, some cache lines at each of
// its steps, and leaves here where it stopped: memory and multiply-add units work at the same time.
struct Ahead {
  const char* const* row;
  const char* const* end;
  int64_t bytes;    // of each row
  int64_t fetched;  // of those, of the first row
  int lines_per_step;
};

// Blocks of accumulator type T (float, or double for float64). Leading dimensions are in elements;
// in gemm_nn `n` and in gemm_nt `k` are multiples of lanes<T>(): operands are padded with zeros.
template <class T>
struct BlockKernels {
  // c[m, n] = a[m, k] b[n, k]^T, n here arbitrary
  void (*gemm_nt)(const T* a, int64_t lda, const T* b, int64_t ldb, T* c, int64_t ldc, int64_t m,
                  int64_t n, int64_t k, Ahead* ahead);
  // c[m, n] = (accumulate ? c : 0) + a b[k, n], where a[i, j] = a[i * stride_am + j * stride_ak]
  void (*gemm_nn)(const T* a, int64_t stride_am, int64_t stride_ak, const T* b, int64_t ldb, T* c,
                  int64_t ldc, int64_t m, int64_t n, int64_t k, bool accumulate, Ahead* ahead);
  // c[m, n] = (accumulate ? c : 0) + the sum of the terms, m and n arbitrary
  void (*gemm_panels)(const PanelTerm<T>* terms, int num_terms, T* c, int64_t ldc, int64_t m,
                      int64_t n, bool accumulate);
  // panels[j, p, c] = factor * b[p, j * width + c], for one panel j of b[k, n], zeros beyond n;
  // where b[p, c] = b[p * stride_k + c * stride_n], one of the strides being 1
  void (*pack_panel)(const T* b, int64_t stride_k, int64_t stride_n, int64_t k, int64_t n, T factor,
                     int64_t width, int64_t j, T* panels);
  // total[size] = factor * the sum of `count` runs, `stride` apart, in whole vectors
  void (*sum)(const T* runs, int64_t count, int64_t stride, int64_t size, T factor, T* total);
  // Strips of attention: `rows` rows of n columns and padding, `ld` apart. Zeros in the padding.
  // s = softmax(s)
  void (*softmax)(T* s, int64_t ld, int64_t rows, int64_t n);
  // g = scale p (g - sum(p g))
  void (*softmax_backward)(const T* p, T* g, int64_t ld, int64_t rows, int64_t n, T scale);
  // With r = sum(p s), D = sum(p g) and E = s g - r g - D s + h:
  // s = p (s - r), g = scale p (g - D), h = scale p (E - sum(p E))
  void (*softmax_double_backward)(const T* p, T* s, T* g, T* h, int64_t ld, int64_t rows, int64_t n,
                                  T scale);
  int64_t widest_panel;  // columns
};

// One group of one sample, `channels` of m elements each. Null where there is none, or not needed.
struct NormGroup {
  int64_t channels, m;
  double eps;
  bool silu;
  const void *x, *weight, *bias, *d_out, *u_x, *u_weight, *u_bias;
  void *out, *d_d_out, *d_x;
  void *d_weight, *d_bias;  // of the accumulator type, added to
  void* scratch;            // of the accumulator type, kNormScratch rows of channels * m + a vector
};
constexpr int64_t kNormScratch = 3;

// What depends on the stored type. `Acc` of the comments is its accumulator type.
struct StorageKernels {
  // dst[rows, padded cols] = src[rows, cols], zeros beyond
  void (*load)(const void* src, int64_t ld_src, int64_t rows, int64_t cols, void* dst,
               int64_t ld_dst);
  // dst = src - base
  void (*load_difference)(const void* src, int64_t ld_src, const void* base, int64_t ld_base,
                          int64_t rows, int64_t cols, void* dst, int64_t ld_dst);
  // dst[rows, cols] = src, rounded to the stored type
  void (*store)(const void* src, int64_t ld_src, int64_t rows, int64_t cols, void* dst,
                int64_t ld_dst);
  // the same past the caches, for results larger than they are
  void (*stream)(const void* src, int64_t ld_src, int64_t rows, int64_t cols, void* dst,
                 int64_t ld_dst);
  // dst += src, in the accumulator type, rounded once
  void (*add)(const void* src, int64_t ld_src, int64_t rows, int64_t cols, void* dst,
              int64_t ld_dst);
  // out = base + sum_n w_n (theta_n - base); `stream`: past the caches, for large results
  void (*merge)(void* out, const void* base, const void* const* thetas, const double* weights,
                int64_t num_concepts, int64_t size, bool stream);
  // d_theta_n = w_n d_out; d_base = (1 - sum_n w_n) d_out; d_weights[n] = <d_out, theta_n - base>.
  // Null where not needed.
  void (*merge_backward)(const void* d_out, const void* base, const void* const* thetas,
                         const double* weights, int64_t num_concepts, int64_t size, void* d_base,
                         void* const* d_thetas, double* d_weights, bool stream);
  // out[i] = sum_j factors[i, j] in[j], an `out` perhaps one of `in`
  void (*combine)(const double* factors, int num_in, int num_out, const void* const* in,
                  void* const* out, int64_t size, bool stream);
  // in: z, g, m, v; out: those after the step but g, where m and v may be the ones given
  void (*adam)(const AdamRule& rule, const void* const in[4], void* const out[3], int64_t size,
               bool stream);
  // in: the gradients of z, m, v after the step, then g, m, v before it; out: the gradients of z,
  // g, m, v before it. Null where not needed.
  void (*adam_backward)(const AdamRule& rule, const void* const in[6], void* const out[4],
                        int64_t size, bool stream);
  void (*norm)(const NormGroup& group);
  void (*norm_backward)(const NormGroup& group);
  void (*norm_double_backward)(const NormGroup& group);
  // in: a, b; out: a gelu(b)
  void (*geglu)(const void* const in[2], void* const out[1], int64_t size);
  // in: upstream, a, b; out: the gradients of a, b
  void (*geglu_backward)(const void* const in[3], void* const out[2], int64_t size);
  // in: upstream, directions of a, b, then a, b; out: the gradients of upstream, a, b
  void (*geglu_double_backward)(const void* const in[5], void* const out[3], int64_t size);
};

struct Kernels {
  int vector_bytes;
  BlockKernels<float> block_f32;
  BlockKernels<double> block_f64;
  StorageKernels storage[4];  // by DType
};

template <class T>
const BlockKernels<T>& block_kernels(const Kernels& kernels);
template <>
inline const BlockKernels<float>& block_kernels(const Kernels& kernels) {
  return kernels.block_f32;
}
template <>
inline const BlockKernels<double>& block_kernels(const Kernels& kernels) {
  return kernels.block_f64;
}

// The kernels of cpu_level().
const Kernels& active_kernels();

extern const Kernels kGenericKernels;
#if defined(__x86_64__)
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
#endif

}  // namespace mima
