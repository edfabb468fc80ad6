// mima._native: the CPU kernels. Takes tensors and dtype codes. Lists are concept-major; an empty
// list of results: not needed.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cmath>
#include <optional>

#include "cpu/dispatch.h"
#include "cpu/ops.h"
#include "tensors.h"

namespace mima {
namespace {

using Indices = std::vector<int64_t>;
using Reals = std::vector<double>;

// Whether the elements of each matrix's rows lie side by side.
bool have_contiguous_rows(const TensorArgs& matrices) {
  return std::all_of(matrices.begin(), matrices.end(), [](const TensorArg& arg) {
    return arg.contiguous || arg.strides[1] == 1 || arg.sizes[1] == 1;
  });
}

void weighted_merge_forward(int dtype, int threads, const TensorArgs& base,
                            const TensorArgs& thetas, Reals weights, const TensorArgs& out) {
  auto params = weighted_merge_params(dtype, base, thetas, std::move(weights));
  params.threads = threads;
  params.out = pointers("weighted_merge: out", out, base.size());
  py::gil_scoped_release unlocked;
  cpu::weighted_merge_forward(params);
}

Reals weighted_merge_backward(int dtype, int threads, const TensorArgs& d_out,
                              const TensorArgs& base, const TensorArgs& thetas, Reals weights,
                              const TensorArgs& d_base, const TensorArgs& d_thetas,
                              bool need_weights) {
  auto params = weighted_merge_params(dtype, base, thetas, std::move(weights));
  params.threads = threads;
  params.d_out = pointers("weighted_merge: d_out", d_out, base.size());
  params.d_base = pointers("weighted_merge: d_base", d_base, base.size(), true);
  params.d_thetas = pointers("weighted_merge: d_thetas", d_thetas, thetas.size(), true);
  if (need_weights) params.d_weights.assign(params.weights.size(), 0.0);
  {
    py::gil_scoped_release unlocked;
    cpu::weighted_merge_backward(params);
  }
  return params.d_weights;
}

// The rows of `factors` are the results', which may be lists of x themselves.
void combine(int dtype, int threads, const std::vector<Reals>& factors, const TensorArgs& x,
             const TensorArgs& out) {
  constexpr size_t kMost = CombineParams::kMost;
  const size_t num_out = factors.size(), num_in = num_out == 0 ? 0 : factors[0].size();
  if (num_in < 1 || num_in > kMost || num_out > kMost)
    throw py::value_error("combine: 1 to 3 lists on either side");
  CombineParams params{};
  params.dtype = dtype_of(dtype);
  params.threads = threads;
  params.num_in = static_cast<int>(num_in);
  params.num_out = static_cast<int>(num_out);
  double* factor = params.factors;
  for (const Reals& row : factors) {
    check_count("combine: factors", row.size(), num_in);
    factor = std::copy(row.begin(), row.end(), factor);
  }
  const size_t num_tensors = x.size() / num_in;
  params.sizes = sizes_of(x);
  params.sizes.resize(num_tensors);
  params.x = pointers("combine: x", x, num_in * num_tensors);
  params.out = pointers("combine: out", out, num_out * num_tensors);
  py::gil_scoped_release unlocked;
  cpu::combine(params);
}

TokenParams token_params(int dtype, int threads, const TensorArgs& X, const TensorArg& C,
                         const TensorArg& A) {
  TokenParams params{};
  params.dtype = dtype_of(dtype);
  params.threads = threads;
  params.rows = rows_of(X);
  params.X = matrices("token_outputs: X", X, X.size());
  params.C = matrix({"token_outputs: C"}, C);
  params.A = matrix({"token_outputs: A"}, A);
  params.S = C.sizes[0];
  params.d = C.sizes[1];
  return params;
}

void token_outputs(int dtype, int threads, const TensorArgs& X, const TensorArg& C,
                   const TensorArg& A) {
  const auto params = token_params(dtype, threads, X, C, A);
  py::gil_scoped_release unlocked;
  cpu::token_outputs(params);
}

void add_token_outputs(int dtype, int threads, const TensorArgs& X, const TensorArg& C,
                       const TensorArg& A) {
  const auto params = token_params(dtype, threads, X, C, A);
  py::gil_scoped_release unlocked;
  cpu::add_token_outputs(params);
}

void token_sums(int dtype, int threads, const TensorArgs& X, const TensorArg& C,
                const TensorArg& A) {
  const auto params = token_params(dtype, threads, X, C, A);
  py::gil_scoped_release unlocked;
  cpu::token_sums(params);
}

AdamStepParams adam_step_params(int dtype, int threads, const Reals& rule, int64_t step,
                                const TensorArgs& g, const TensorArgs& m, const TensorArgs& v) {
  check_count("adam_step: rule", rule.size(), 5);
  const double lr = rule[0], beta1 = rule[1], beta2 = rule[2], eps = rule[3], decay = rule[4];
  const double count = static_cast<double>(step) + 1;
  AdamStepParams params{};
  params.dtype = dtype_of(dtype);
  params.threads = threads;
  params.rule = {
      lr / (1 - std::pow(beta1, count)), 1 - lr * decay, beta1, 1 - beta1, beta2, 1 - beta2, eps,
      1 - std::pow(beta2, count)};
  params.sizes = sizes_of(g);
  params.g = pointers("adam_step: g", g, g.size());
  params.m = pointers("adam_step: m", m, g.size());
  params.v = pointers("adam_step: v", v, g.size());
  return params;
}

// out: z, m and v after the step; the last two may be the lists m and v themselves.
void adam_step_forward(int dtype, int threads, const Reals& rule, int64_t step, const TensorArgs& z,
                       const TensorArgs& g, const TensorArgs& m, const TensorArgs& v,
                       const TensorArgs& out_z, const TensorArgs& out_m, const TensorArgs& out_v) {
  auto params = adam_step_params(dtype, threads, rule, step, g, m, v);
  params.z = pointers("adam_step: z", z, g.size());
  params.out_z = pointers("adam_step: out_z", out_z, g.size());
  params.out_m = pointers("adam_step: out_m", out_m, g.size());
  params.out_v = pointers("adam_step: out_v", out_v, g.size());
  py::gil_scoped_release unlocked;
  cpu::adam_step_forward(params);
}

void adam_step_backward(int dtype, int threads, const Reals& rule, int64_t step,
                        const TensorArgs& bar_z, const TensorArgs& bar_m, const TensorArgs& bar_v,
                        const TensorArgs& g, const TensorArgs& m, const TensorArgs& v,
                        const TensorArgs& d_z, const TensorArgs& d_g, const TensorArgs& d_m,
                        const TensorArgs& d_v) {
  auto params = adam_step_params(dtype, threads, rule, step, g, m, v);
  params.bar_z = pointers("adam_step: bar_z", bar_z, g.size());
  params.bar_m = pointers("adam_step: bar_m", bar_m, g.size());
  params.bar_v = pointers("adam_step: bar_v", bar_v, g.size());
  params.d_z = pointers("adam_step: d_z", d_z, g.size(), true);
  params.d_g = pointers("adam_step: d_g", d_g, g.size(), true);
  params.d_m = pointers("adam_step: d_m", d_m, g.size(), true);
  params.d_v = pointers("adam_step: d_v", d_v, g.size(), true);
  py::gil_scoped_release unlocked;
  cpu::adam_step_backward(params);
}

using MaybeTensor = std::optional<TensorArg>;

// The address of a contiguous tensor, or null.
void* whole(const char* what, const MaybeTensor& arg) {
  if (!arg) return nullptr;
  if (!arg->contiguous) throw py::value_error(std::string(what) + " must be contiguous");
  return pointer({what}, *arg);
}

// `layer`: B, groups, channels of each, elements of each; x and all that follow but vectors have
// B * groups * channels * elements.
GroupNormParams group_norm_params(int dtype, int threads, const Indices& layer, double eps,
                                  bool silu, const TensorArg& x, const MaybeTensor& weight,
                                  const MaybeTensor& bias) {
  check_count("group_norm: layer", layer.size(), 4);
  GroupNormParams params{};
  params.dtype = dtype_of(dtype);
  params.threads = threads;
  params.B = layer[0], params.groups = layer[1], params.channels = layer[2], params.m = layer[3];
  params.eps = eps;
  params.silu = silu;
  if (x.numel != params.B * params.groups * params.channels * params.m)
    throw py::value_error("group_norm: x must have as many elements as its layer says");
  params.x = whole("group_norm: x", x);
  params.weight = whole("group_norm: weight", weight);
  params.bias = whole("group_norm: bias", bias);
  return params;
}

void group_norm_forward(int dtype, int threads, const Indices& layer, double eps, bool silu,
                        const TensorArg& x, const MaybeTensor& weight, const MaybeTensor& bias,
                        const TensorArg& out) {
  auto params = group_norm_params(dtype, threads, layer, eps, silu, x, weight, bias);
  params.out = whole("group_norm: out", out);
  py::gil_scoped_release unlocked;
  cpu::group_norm_forward(params);
}

void group_norm_backward(int dtype, int threads, const Indices& layer, double eps, bool silu,
                         const TensorArg& x, const MaybeTensor& weight, const MaybeTensor& bias,
                         const TensorArg& d_out, const MaybeTensor& d_x,
                         const MaybeTensor& d_weight, const MaybeTensor& d_bias) {
  auto params = group_norm_params(dtype, threads, layer, eps, silu, x, weight, bias);
  params.d_out = whole("group_norm: d_out", d_out);
  params.d_x = whole("group_norm: d_x", d_x);
  params.d_weight = whole("group_norm: d_weight", d_weight);
  params.d_bias = whole("group_norm: d_bias", d_bias);
  py::gil_scoped_release unlocked;
  cpu::group_norm_backward(params);
}

void group_norm_double_backward(int dtype, int threads, const Indices& layer, double eps, bool silu,
                                const TensorArg& x, const MaybeTensor& weight,
                                const MaybeTensor& bias, const TensorArg& d_out,
                                const MaybeTensor& u_x, const MaybeTensor& u_weight,
                                const MaybeTensor& u_bias, const MaybeTensor& d_d_out,
                                const MaybeTensor& d_x, const MaybeTensor& d_weight,
                                const MaybeTensor& d_bias) {
  auto params = group_norm_params(dtype, threads, layer, eps, silu, x, weight, bias);
  params.d_out = whole("group_norm: d_out", d_out);
  params.u_x = whole("group_norm: u_x", u_x);
  params.u_weight = whole("group_norm: u_weight", u_weight);
  params.u_bias = whole("group_norm: u_bias", u_bias);
  params.d_d_out = whole("group_norm: d_d_out", d_d_out);
  params.d_x = whole("group_norm: d_x", d_x);
  params.d_weight = whole("group_norm: d_weight", d_weight);
  params.d_bias = whole("group_norm: d_bias", d_bias);
  py::gil_scoped_release unlocked;
  cpu::group_norm_double_backward(params);
}

GegluParams geglu_params(int dtype, int threads, int64_t d, const TensorArg& x) {
  GegluParams params{};
  params.dtype = dtype_of(dtype);
  params.threads = threads;
  params.d = d;
  params.rows = d == 0 ? 0 : x.numel / (2 * d);
  params.x = whole("geglu: x", x);
  return params;
}

void geglu_forward(int dtype, int threads, int64_t d, const TensorArg& x, const TensorArg& out) {
  auto params = geglu_params(dtype, threads, d, x);
  params.out = whole("geglu: out", out);
  py::gil_scoped_release unlocked;
  cpu::geglu_forward(params);
}

void geglu_backward(int dtype, int threads, int64_t d, const TensorArg& x, const TensorArg& d_out,
                    const TensorArg& d_x) {
  auto params = geglu_params(dtype, threads, d, x);
  params.d_out = whole("geglu: d_out", d_out);
  params.d_x = whole("geglu: d_x", d_x);
  py::gil_scoped_release unlocked;
  cpu::geglu_backward(params);
}

void geglu_double_backward(int dtype, int threads, int64_t d, const TensorArg& x,
                           const TensorArg& d_out, const TensorArg& u_x, const MaybeTensor& d_d_out,
                           const MaybeTensor& d_x) {
  auto params = geglu_params(dtype, threads, d, x);
  params.d_out = whole("geglu: d_out", d_out);
  params.u_x = whole("geglu: u_x", u_x);
  params.d_d_out = whole("geglu: d_d_out", d_d_out);
  params.d_x = whole("geglu: d_x", d_x);
  py::gil_scoped_release unlocked;
  cpu::geglu_double_backward(params);
}

AttentionParams attention_params(int dtype, int threads, double scale, const TensorArg& q,
                                 const TensorArg& k, const TensorArg& v) {
  if (q.ndim != 3 || k.ndim != 3 || v.ndim != 3)
    throw py::value_error("attention: q, k and v must have 3 dimensions");
  AttentionParams params{};
  params.dtype = dtype_of(dtype);
  params.threads = threads;
  params.scale = scale;
  params.n = q.sizes[0], params.T = q.sizes[1], params.d = q.sizes[2];
  params.S = k.sizes[1], params.e = v.sizes[2];
  params.q = whole("attention: q", q);
  params.k = whole("attention: k", k);
  params.v = whole("attention: v", v);
  return params;
}

void attention_forward(int dtype, int threads, double scale, const TensorArg& q, const TensorArg& k,
                       const TensorArg& v, const TensorArg& out) {
  auto params = attention_params(dtype, threads, scale, q, k, v);
  params.out = whole("attention: out", out);
  py::gil_scoped_release unlocked;
  cpu::attention_forward(params);
}

void attention_backward(int dtype, int threads, double scale, const TensorArg& q,
                        const TensorArg& k, const TensorArg& v, const TensorArg& d_out,
                        const MaybeTensor& d_q, const MaybeTensor& d_k, const MaybeTensor& d_v) {
  auto params = attention_params(dtype, threads, scale, q, k, v);
  params.d_out = whole("attention: d_out", d_out);
  params.d_q = whole("attention: d_q", d_q);
  params.d_k = whole("attention: d_k", d_k);
  params.d_v = whole("attention: d_v", d_v);
  py::gil_scoped_release unlocked;
  cpu::attention_backward(params);
}

void attention_double_backward(int dtype, int threads, double scale, const TensorArg& q,
                               const TensorArg& k, const TensorArg& v, const TensorArg& d_out,
                               const TensorArg& u_q, const TensorArg& u_k, const TensorArg& u_v,
                               const MaybeTensor& d_d_out, const MaybeTensor& d_q,
                               const MaybeTensor& d_k, const MaybeTensor& d_v) {
  auto params = attention_params(dtype, threads, scale, q, k, v);
  params.d_out = whole("attention: d_out", d_out);
  params.u_q = whole("attention: u_q", u_q);
  params.u_k = whole("attention: u_k", u_k);
  params.u_v = whole("attention: u_v", u_v);
  params.d_d_out = whole("attention: d_d_out", d_d_out);
  params.d_q = whole("attention: d_q", d_q);
  params.d_k = whole("attention: d_k", d_k);
  params.d_v = whole("attention: d_v", d_v);
  py::gil_scoped_release unlocked;
  cpu::attention_double_backward(params);
}

void projected_merge_forward(int dtype, int threads, const TensorArgs& W0, const TensorArgs& W,
                             const TensorArgs& C, const TensorArgs& M, const TensorArgs& out) {
  auto params = projected_merge_params(dtype, W0, W, C, M);
  params.threads = threads;
  params.out = matrices("projected_merge: out", out, W0.size());
  py::gil_scoped_release unlocked;
  cpu::projected_merge_forward(params);
}

void projected_merge_backward(int dtype, int threads, const TensorArgs& d_out, const TensorArgs& W0,
                              const TensorArgs& W, const TensorArgs& C, const TensorArgs& M,
                              const TensorArgs& d_W0, const TensorArgs& d_W, const TensorArgs& d_C,
                              const TensorArgs& d_M) {
  auto params = projected_merge_params(dtype, W0, W, C, M);
  params.threads = threads;
  params.d_out = matrices("projected_merge: d_out", d_out, W0.size());
  params.d_W0 = matrices("projected_merge: d_W0", d_W0, W0.size(), true);
  params.d_W = matrices("projected_merge: d_W", d_W, W.size(), true);
  params.d_C = matrices("projected_merge: d_C", d_C, C.size(), true);
  params.d_M = matrices("projected_merge: d_M", d_M, C.size(), true);
  py::gil_scoped_release unlocked;
  cpu::projected_merge_backward(params);
}

BatchedLoraParams batched_lora_params(int dtype, int threads, const TensorArg& x,
                                      const TensorArg& weight, bool computes_base,
                                      const TensorArgs& A, const TensorArgs& B, Reals scale,
                                      Indices index) {
  BatchedLoraParams params{};
  params.dtype = dtype_of(dtype);
  params.threads = threads;
  params.b = x.sizes[0];
  params.t = x.sizes[1];
  params.d = x.sizes[2];
  params.o = weight.sizes[0];
  params.ranks = rows_of(A);
  check_count("batched_lora: scale", scale.size(), A.size());
  check_count("batched_lora: index", index.size(), static_cast<size_t>(params.b));
  for (int64_t n : index)
    if (n < -1 || n >= static_cast<int64_t>(A.size()))
      throw py::value_error("batched_lora: index must be in [-1, " + std::to_string(A.size()) +
                            "), got " + std::to_string(n));
  if (computes_base && params.dtype != DType::kFloat32)
    throw py::value_error("batched_lora: the base product is computed in float32 only");
  params.x = matrix({"batched_lora: x"}, x);
  if (computes_base) params.W = matrix({"batched_lora: weight"}, weight);
  params.A = matrices("batched_lora: A", A, A.size());
  params.B = matrices("batched_lora: B", B, A.size());
  params.scale = std::move(scale);
  params.index = std::move(index);
  return params;
}

void batched_lora_forward(int dtype, int threads, const TensorArg& x, const TensorArg& weight,
                          bool computes_base, const TensorArgs& A, const TensorArgs& B, Reals scale,
                          Indices index, const TensorArg& y, bool add,
                          const std::optional<TensorArg>& projection) {
  auto params = batched_lora_params(dtype, threads, x, weight, computes_base, A, B,
                                    std::move(scale), std::move(index));
  params.y = matrix({"batched_lora: y"}, y);
  params.add = add;
  if (projection) params.projection = matrix({"batched_lora: projection"}, *projection);
  py::gil_scoped_release unlocked;
  cpu::batched_lora_forward(params);
}

Reals batched_lora_backward(int dtype, int threads, const TensorArg& d_y, const TensorArg& x,
                            const TensorArg& weight, bool computes_base, const TensorArgs& A,
                            const TensorArgs& B, Reals scale, Indices index,
                            const std::optional<TensorArg>& projection,
                            const std::optional<TensorArg>& d_x, const TensorArgs& d_A,
                            const TensorArgs& d_B, bool need_scale) {
  auto params = batched_lora_params(dtype, threads, x, weight, computes_base, A, B,
                                    std::move(scale), std::move(index));
  params.d_y = matrix({"batched_lora: d_y"}, d_y);
  if (projection) params.projection = matrix({"batched_lora: projection"}, *projection);
  if (d_x) params.d_x = matrix({"batched_lora: d_x"}, *d_x);
  params.d_A = matrices("batched_lora: d_A", d_A, A.size(), true);
  params.d_B = matrices("batched_lora: d_B", d_B, A.size(), true);
  params.need_scale = need_scale;
  if (need_scale) params.d_scale.assign(A.size(), 0.0);
  {
    py::gil_scoped_release unlocked;
    cpu::batched_lora_backward(params);
  }
  return params.d_scale;
}

MergeLoraParams merge_lora_params(int dtype, int threads, const TensorArg& weight,
                                  const TensorArgs& A, const TensorArgs& B, Reals scale,
                                  Reals weights) {
  MergeLoraParams params{};
  params.dtype = dtype_of(dtype);
  params.threads = threads;
  params.o = weight.sizes[0];
  params.d = weight.sizes[1];
  params.ranks = rows_of(A);
  check_count("merge_lora: scale", scale.size(), A.size());
  check_count("merge_lora: weights", weights.size(), A.size());
  params.scale = std::move(scale);
  params.weights = std::move(weights);
  params.A = matrices("merge_lora: A", A, A.size());
  params.B = matrices("merge_lora: B", B, A.size());
  return params;
}

void merge_lora_forward(int dtype, int threads, const TensorArg& weight, const TensorArgs& A,
                        const TensorArgs& B, Reals scale, Reals weights, const TensorArg& out) {
  auto params =
      merge_lora_params(dtype, threads, weight, A, B, std::move(scale), std::move(weights));
  params.W = matrix({"merge_lora: weight"}, weight);
  params.out = matrix({"merge_lora: out"}, out);
  py::gil_scoped_release unlocked;
  cpu::merge_lora_forward(params);
}

Reals merge_lora_backward(int dtype, int threads, const TensorArg& d_out, const TensorArgs& A,
                          const TensorArgs& B, Reals scale, Reals weights, const TensorArgs& d_A,
                          const TensorArgs& d_B, bool need_products) {
  auto params =
      merge_lora_params(dtype, threads, d_out, A, B, std::move(scale), std::move(weights));
  params.d_out = matrix({"merge_lora: d_out"}, d_out);
  params.d_A = matrices("merge_lora: d_A", d_A, A.size(), true);
  params.d_B = matrices("merge_lora: d_B", d_B, A.size(), true);
  params.need_products = need_products;
  if (need_products) params.products.assign(A.size(), 0.0);
  {
    py::gil_scoped_release unlocked;
    cpu::merge_lora_backward(params);
  }
  return params.products;
}

}  // namespace
}  // namespace mima

PYBIND11_MODULE(_native, module) {
  module.doc() = "CPU kernels of mima.ops; called through mima.ops.native, which checks arguments.";
  module.attr("version") = MIMA_VERSION;
  module.def("cpu_level", [] { return mima::name(mima::cpu_level()); });
  module.def("best_cpu_level", [] { return mima::name(mima::best_cpu_level()); });
  module.def("are_contiguous", &mima::are_contiguous);
  module.def("have_contiguous_rows", &mima::have_contiguous_rows);
  module.def("weighted_merge_forward", &mima::weighted_merge_forward);
  module.def("weighted_merge_backward", &mima::weighted_merge_backward);
  module.def("combine", &mima::combine);
  module.def("token_outputs", &mima::token_outputs);
  module.def("add_token_outputs", &mima::add_token_outputs);
  module.def("token_sums", &mima::token_sums);
  module.def("adam_step_forward", &mima::adam_step_forward);
  module.def("adam_step_backward", &mima::adam_step_backward);
  module.def("group_norm_forward", &mima::group_norm_forward);
  module.def("group_norm_backward", &mima::group_norm_backward);
  module.def("group_norm_double_backward", &mima::group_norm_double_backward);
  module.def("geglu_forward", &mima::geglu_forward);
  module.def("geglu_backward", &mima::geglu_backward);
  module.def("geglu_double_backward", &mima::geglu_double_backward);
  module.def("attention_forward", &mima::attention_forward);
  module.def("attention_backward", &mima::attention_backward);
  module.def("attention_double_backward", &mima::attention_double_backward);
  module.def("projected_merge_forward", &mima::projected_merge_forward);
  module.def("projected_merge_backward", &mima::projected_merge_backward);
  module.def("merges_adapters", &mima::cpu::merges_adapters);
  module.def("batched_lora_forward", &mima::batched_lora_forward);
  module.def("batched_lora_backward", &mima::batched_lora_backward);
  module.def("merge_lora_forward", &mima::merge_lora_forward);
  module.def("merge_lora_backward", &mima::merge_lora_backward);
}
