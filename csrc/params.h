// What the Python side passes: dtype codes, raw tensors, and one Params struct per operator.
// Shared by the CPU and the CUDA code. Letters: N concepts, P tensors, L layers, o x d one weight,
// s_n tokens of concept n, S = sum of s_n, r_n rank of adapter n, b batch, t tokens.
// Every matrix has unit stride along its last dimension; `ld` is the stride of the one before.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace mima {

enum class DType : int { kFloat32 = 0, kFloat64 = 1, kBFloat16 = 2, kFloat16 = 3 };

inline size_t item_size(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

struct Matrix {
  void* data;
  int64_t ld;

  void* row(int64_t index, DType dtype) const {
    return static_cast<char*>(data) + index * ld * static_cast<int64_t>(item_size(dtype));
  }
};

// out = base + sum_n w_n (theta_n - base)
struct WeightedMergeParams {
  DType dtype;
  int threads;
  std::vector<int64_t> sizes;     // [P] elements
  std::vector<void*> base;        // [P]
  std::vector<void*> thetas;      // [N * P], concept-major
  std::vector<double> weights;    // [N]
  std::vector<void*> out;         // [P], forward
  std::vector<void*> d_out;       // [P], backward
  std::vector<void*> d_base;      // [P] or empty: not needed
  std::vector<void*> d_thetas;    // [N * P] or empty
  std::vector<double> d_weights;  // [N] or empty
};

// m+ = beta1 m + rest1 g;  v+ = beta2 v + rest2 g^2
// z+ = keep z - step m+ / (root + eps),  root = sqrt(v+ / correction2), 0 where v+ is not positive
struct AdamRule {
  double step;  // lr / correction1
  double keep;  // 1 - lr weight_decay
  double beta1, rest1, beta2, rest2, eps, correction2;
};

struct AdamStepParams {
  DType dtype;
  int threads;
  AdamRule rule;
  std::vector<int64_t> sizes;              // [P] elements
  std::vector<void*> z, g, m, v;           // [P]; z in forward
  std::vector<void*> out_z, out_m, out_v;  // [P], forward; out_m and out_v may be m and v
  std::vector<void*> bar_z, bar_m, bar_v;  // [P], backward: upstream
  std::vector<void*> d_z, d_g, d_m, d_v;   // [P] or empty: not needed
};

// out_i = sum_j factors[i, j] x_j over lists of P tensors; a factor of 0 leaves its list out
struct CombineParams {
  static constexpr int kMost = 3;  // lists on either side
  DType dtype;
  int threads;
  int num_in, num_out;
  double factors[kMost * kMost];  // [num_out, num_in]
  std::vector<int64_t> sizes;     // [P] elements
  std::vector<void*> x;           // [num_in * P], list by list
  std::vector<void*> out;         // [num_out * P]; a list of it may be one of x
};

// Linear layers X_l and tokens' embeddings, [S, d]: A = X C^T, [sum of o_l, S], layer below layer;
// X_l += A_l C in place; sums = sum_l A_l^T X_l, [S, d]
struct TokenParams {
  DType dtype;
  int threads;
  int64_t d, S;
  std::vector<int64_t> rows;  // [L] o_l
  std::vector<Matrix> X;      // [L] of [o_l, d]
  Matrix C;                   // [S, d], in, or where they are asked for the sums
  Matrix A;                   // [sum of o_l, S], out of the first, in otherwise
};

// y = gamma xhat + beta, or y sigmoid(y), over the groups of x [B, G, channels, m]. Addresses of
// vectors are those of [G * channels]; null where there are none, or not needed.
struct GroupNormParams {
  DType dtype;
  int threads;
  int64_t B, groups, channels, m;
  double eps;
  bool silu;
  const void *x, *weight, *bias;
  void* out;                            // forward
  const void* d_out;                    // backward: upstream
  const void *u_x, *u_weight, *u_bias;  // double backward: directions
  void *d_d_out, *d_x, *d_weight, *d_bias;
};

// y = a gelu(b), rows of x: [a b]
struct GegluParams {
  DType dtype;
  int threads;
  int64_t rows, d;
  const void* x;      // [rows, 2 d]
  void* out;          // [rows, d], forward
  const void* d_out;  // backward: upstream
  const void* u_x;    // double backward: direction
  void* d_d_out;
  void* d_x;
};

// out = softmax(scale q k^T) v, for each of n heads
struct AttentionParams {
  DType dtype;
  int threads;
  int64_t n, T, S, d, e;
  double scale;
  const void *q, *k, *v;        // [n, T, d], [n, S, d], [n, S, e]
  void* out;                    // [n, T, e], forward
  const void* d_out;            // backward: upstream
  const void *u_q, *u_k, *u_v;  // double backward: directions
  void *d_d_out, *d_q, *d_k, *d_v;
};

// out_l = W0_l + sum_n (W_nl - W0_l) C_n^T M_n
struct ProjectedMergeParams {
  DType dtype;
  int threads;
  int64_t d;
  std::vector<int64_t> rows;     // [L] o_l
  std::vector<int64_t> tokens;   // [N] s_n
  std::vector<Matrix> W0;        // [L] of [o_l, d]
  std::vector<Matrix> W;         // [N * L], concept-major
  std::vector<Matrix> C, M;      // [N] of [s_n, d]
  std::vector<Matrix> out;       // [L], forward
  std::vector<Matrix> d_out;     // [L], backward
  std::vector<Matrix> d_W0;      // [L] or empty: not needed
  std::vector<Matrix> d_W;       // [N * L] or empty
  std::vector<Matrix> d_C, d_M;  // [N] or empty
};

// y_b = [y_b] + [x_b W^T] + s_i (x_b A_i^T) B_i^T with i = index[b]. Without W the base product,
// and its part of d_x, is the caller's, in y and d_x.
struct BatchedLoraParams {
  DType dtype;
  int threads;
  int64_t b, t, d, o;
  std::vector<int64_t> ranks;  // [N]
  std::vector<int64_t> index;  // [b], -1: no adapter
  std::vector<double> scale;   // [N]
  Matrix x;                    // [b * t, d]
  std::vector<Matrix> A;       // [N] of [r_n, d]
  std::vector<Matrix> B;       // [N] of [o, r_n]
  Matrix W;                    // [o, d], or null
  Matrix y;                    // [b * t, o], forward
  bool add;                    // y holds what is added to: the bias, or without W the base product
  Matrix projection;           // x A^T, [b * t, whole vectors for the largest rank], in the
                               // accumulator type, or null: out in forward, in in backward
  Matrix d_y;                  // [b * t, o], backward
  Matrix d_x;                  // [b * t, d], added to without W, or null: not needed
  std::vector<Matrix> d_A;     // [N] or empty
  std::vector<Matrix> d_B;     // [N] or empty
  bool need_scale;
  std::vector<double> d_scale;  // [N], out
};

// out = W + sum_n w_n s_n B_n A_n
struct MergeLoraParams {
  DType dtype;
  int threads;
  int64_t o, d;
  std::vector<int64_t> ranks;          // [N]
  std::vector<double> scale, weights;  // [N]
  Matrix W;                            // [o, d]
  std::vector<Matrix> A;               // [N] of [r_n, d]
  std::vector<Matrix> B;               // [N] of [o, r_n]
  Matrix out;                          // [o, d], forward
  Matrix d_out;                        // [o, d], backward
  std::vector<Matrix> d_A;             // [N] or empty
  std::vector<Matrix> d_B;             // [N] or empty
  bool need_products;
  std::vector<double> products;  // [N], out: <d_out, B_n A_n>
};

}  // namespace mima
