// mima._native: the CPU kernels. Takes tensors and dtype codes. Lists are concept-major; an empty
// list of results: not needed.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <optional>
#include <string>
#include <variant>

#include "cpu/dispatch.h"
#include "cpu/ops.h"
#include "tensors.h"

namespace mima {
namespace {

using Indices = std::vector<int64_t>;

// A kernel runs without the interpreter's lock.
template <class Params, class Kernel>
void run(Kernel kernel, Params& params) {
  py::gil_scoped_release unlocked;
  kernel(params);
}

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
  run(cpu::weighted_merge_forward, params);
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
  run(cpu::weighted_merge_backward, params);
  return params.d_weights;
}

void combine(int dtype, int threads, const std::vector<Reals>& factors, const TensorArgs& x,
             const TensorArgs& out) {
  auto params = combine_params(dtype, factors, x, out);
  params.threads = threads;
  run(cpu::combine, params);
}

template <void (*kernel)(const TokenParams&)>
void tokens(int dtype, int threads, const TensorArgs& X, const TensorArg& C, const TensorArg& A) {
  TokenParams params{};
  params.dtype = dtype_of(dtype);
  params.threads = threads;
  params.rows = rows_of(X);
  params.X = matrices("token_outputs: X", X, X.size());
  params.C = matrix({"token_outputs: C"}, C);
  params.A = matrix({"token_outputs: A"}, A);
  params.S = C.sizes[0];
  params.d = C.sizes[1];
  run(kernel, params);
}

void adam_step_forward(int dtype, int threads, const Reals& rule, int64_t step, const TensorArgs& z,
                       const TensorArgs& g, const TensorArgs& m, const TensorArgs& v,
                       const TensorArgs& out_z, const TensorArgs& out_m, const TensorArgs& out_v) {
  auto params = adam_step_forward_params(dtype, rule, step, z, g, m, v, out_z, out_m, out_v);
  params.threads = threads;
  run(cpu::adam_step_forward, params);
}

void adam_step_backward(int dtype, int threads, const Reals& rule, int64_t step,
                        const TensorArgs& bar_z, const TensorArgs& bar_m, const TensorArgs& bar_v,
                        const TensorArgs& g, const TensorArgs& m, const TensorArgs& v,
                        const TensorArgs& d_z, const TensorArgs& d_g, const TensorArgs& d_m,
                        const TensorArgs& d_v) {
  auto params = adam_step_backward_params(dtype, rule, step, bar_z, bar_m, bar_v, g, m, v, d_z, d_g,
                                          d_m, d_v);
  params.threads = threads;
  run(cpu::adam_step_backward, params);
}

// Layers. An optional tensor may be None, and its address null.
using Tensors = std::vector<std::optional<TensorArg>>;

template <class Params>
struct Field {
  const char* name;
  std::variant<const void* Params::*, void* Params::*> address;
  bool optional = false;
};
template <class Params>
using Fields = std::vector<Field<Params>>;

// A kernel as Python calls it, (dtype, threads, numbers..., tensors...): the tensors are contiguous
// and in the order of the fields, and `measure` takes sizes from them and the numbers.
template <class Params, class... Numbers>
auto layer(const std::string& name, void (*kernel)(const Params&),
           void (*measure)(Params&, const Tensors&, Numbers...),
           std::initializer_list<Fields<Params>> parts) {
  Fields<Params> fields;
  for (const auto& part : parts) fields.insert(fields.end(), part.begin(), part.end());
  return [=](int dtype, int threads, Numbers... numbers, const py::args& args) {
    const auto tensors = args.cast<Tensors>();
    check_count(name.c_str(), tensors.size(), fields.size());
    Params params{};
    params.dtype = dtype_of(dtype);
    params.threads = threads;
    for (size_t i = 0; i < fields.size(); ++i) {
      const auto& [field, address, optional] = fields[i];
      const auto& tensor = tensors[i];
      if (tensor ? !tensor->strided || !tensor->contiguous : !optional)
        throw py::value_error(name + ": " + field + " must be a contiguous tensor in memory");
      void* data = tensor ? tensor->data : nullptr;
      std::visit([&](auto member) { params.*member = data; }, address);
    }
    measure(params, tensors, numbers...);
    run(kernel, params);
  };
}

// A layer's three kernels.
template <class Params, class... Numbers>
void define(py::module_& module, const std::string& name,
            std::array<void (*)(const Params&), 3> kernels,
            void (*measure)(Params&, const Tensors&, Numbers...), const Fields<Params>& given,
            const Fields<Params>& directions, const Fields<Params>& gradients) {
  const Fields<Params> out = {{"out", &Params::out}}, d_out = {{"d_out", &Params::d_out}},
                       d_d_out = {{"d_d_out", &Params::d_d_out, true}};
  const auto add = [&](const char* which, int i, std::initializer_list<Fields<Params>> fields) {
    module.def((name + which).c_str(), layer(name, kernels[i], measure, fields));
  };
  add("_forward", 0, {given, out});
  add("_backward", 1, {given, d_out, gradients});
  add("_double_backward", 2, {given, d_out, directions, d_d_out, gradients});
}

// sizes: B, groups, channels of each, elements of each.
void group_norm(GroupNormParams& params, const Tensors& tensors, const Indices& sizes, double eps,
                bool silu) {
  check_count("group_norm: sizes", sizes.size(), 4);
  params.B = sizes[0], params.groups = sizes[1], params.channels = sizes[2], params.m = sizes[3];
  params.eps = eps;
  params.silu = silu;
  if (tensors[0]->numel != params.B * params.groups * params.channels * params.m)
    throw py::value_error("group_norm: x must have as many elements as its sizes say");
}

void geglu(GegluParams& params, const Tensors& tensors, int64_t d) {
  params.d = d;
  params.rows = d == 0 ? 0 : tensors[0]->numel / (2 * d);
}

void attention(AttentionParams& params, const Tensors& tensors, double scale) {
  const TensorArg &q = *tensors[0], &k = *tensors[1], &v = *tensors[2];
  if (q.ndim != 3 || k.ndim != 3 || v.ndim != 3)
    throw py::value_error("attention: q, k and v must have 3 dimensions");
  params.scale = scale;
  params.n = q.sizes[0], params.T = q.sizes[1], params.d = q.sizes[2];
  params.S = k.sizes[1], params.e = v.sizes[2];
}

void define_layers(py::module_& module) {
  using Norm = GroupNormParams;
  define<Norm>(module, "group_norm",
               {cpu::group_norm_forward, cpu::group_norm_backward, cpu::group_norm_double_backward},
               group_norm,
               {{"x", &Norm::x}, {"weight", &Norm::weight, true}, {"bias", &Norm::bias, true}},
               {{"u_x", &Norm::u_x, true},
                {"u_weight", &Norm::u_weight, true},
                {"u_bias", &Norm::u_bias, true}},
               {{"d_x", &Norm::d_x, true},
                {"d_weight", &Norm::d_weight, true},
                {"d_bias", &Norm::d_bias, true}});
  define<GegluParams>(
      module, "geglu", {cpu::geglu_forward, cpu::geglu_backward, cpu::geglu_double_backward}, geglu,
      {{"x", &GegluParams::x}}, {{"u_x", &GegluParams::u_x}}, {{"d_x", &GegluParams::d_x, true}});
  using Heads = AttentionParams;
  define<Heads>(
      module, "attention",
      {cpu::attention_forward, cpu::attention_backward, cpu::attention_double_backward}, attention,
      {{"q", &Heads::q}, {"k", &Heads::k}, {"v", &Heads::v}},
      {{"u_q", &Heads::u_q}, {"u_k", &Heads::u_k}, {"u_v", &Heads::u_v}},
      {{"d_q", &Heads::d_q, true}, {"d_k", &Heads::d_k, true}, {"d_v", &Heads::d_v, true}});
}

void projected_merge_forward(int dtype, int threads, const TensorArgs& W0, const TensorArgs& W,
                             const TensorArgs& C, const TensorArgs& M, const TensorArgs& out) {
  auto params = projected_merge_params(dtype, W0, W, C, M);
  params.threads = threads;
  params.out = matrices("projected_merge: out", out, W0.size());
  run(cpu::projected_merge_forward, params);
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
  run(cpu::projected_merge_backward, params);
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
  run(cpu::batched_lora_forward, params);
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
  run(cpu::batched_lora_backward, params);
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
  run(cpu::merge_lora_forward, params);
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
  run(cpu::merge_lora_backward, params);
  return params.products;
}

}  // namespace
}  // namespace mima

PYBIND11_MODULE(_native, module) {
  module.doc() = "CPU kernels of mima.ops; called through mima.ops, which checks arguments.";
  module.attr("version") = MIMA_VERSION;
  module.def("cpu_level", [] { return mima::name(mima::cpu_level()); });
  module.def("best_cpu_level", [] { return mima::name(mima::best_cpu_level()); });
  module.def("are_contiguous", &mima::are_contiguous);
  module.def("have_contiguous_rows", &mima::have_contiguous_rows);
  module.def("weighted_merge_forward", &mima::weighted_merge_forward);
  module.def("weighted_merge_backward", &mima::weighted_merge_backward);
  module.def("combine", &mima::combine);
  module.def("token_outputs", &mima::tokens<mima::cpu::token_outputs>);
  module.def("add_token_outputs", &mima::tokens<mima::cpu::add_token_outputs>);
  module.def("token_sums", &mima::tokens<mima::cpu::token_sums>);
  module.def("adam_step_forward", &mima::adam_step_forward);
  module.def("adam_step_backward", &mima::adam_step_backward);
  mima::define_layers(module);
  module.def("projected_merge_forward", &mima::projected_merge_forward);
  module.def("projected_merge_backward", &mima::projected_merge_backward);
  module.def("merges_adapters", &mima::cpu::merges_adapters);
  module.def("batched_lora_forward", &mima::batched_lora_forward);
  module.def("batched_lora_backward", &mima::batched_lora_backward);
  module.def("merge_lora_forward", &mima::merge_lora_forward);
  module.def("merge_lora_backward", &mima::merge_lora_backward);
}
