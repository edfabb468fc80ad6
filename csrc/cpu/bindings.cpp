// mima._native: the CPU kernels. Takes addresses, sizes and dtype codes; knows nothing of torch.
// A matrix is a tuple (address, leading dimension in elements). Lists are concept-major.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <tuple>

#include "cpu/dispatch.h"
#include "cpu/ops.h"

namespace py = pybind11;

namespace mima {
namespace {

using Address = uint64_t;
using Addresses = std::vector<Address>;
using MatrixArg = std::tuple<Address, int64_t>;
using MatrixArgs = std::vector<MatrixArg>;
using Sizes = std::vector<int64_t>;
using Reals = std::vector<double>;

std::vector<void*> pointers(const Addresses& addresses) {
  std::vector<void*> result(addresses.size());
  for (size_t i = 0; i < addresses.size(); ++i) result[i] = reinterpret_cast<void*>(addresses[i]);
  return result;
}

Matrix matrix(const MatrixArg& arg) {
  return {reinterpret_cast<void*>(std::get<0>(arg)), std::get<1>(arg)};
}

std::vector<Matrix> matrices(const MatrixArgs& args) {
  std::vector<Matrix> result(args.size());
  for (size_t i = 0; i < args.size(); ++i) result[i] = matrix(args[i]);
  return result;
}

DType dtype_of(int code) {
  if (code < 0 || code > 3) throw py::value_error("dtype code must be 0 to 3");
  return static_cast<DType>(code);
}

// What Python has checked already and would be a wild read if it had not.
void check_count(const char* what, size_t got, size_t expected, bool optional = false) {
  if (got == expected || (optional && got == 0)) return;
  throw py::value_error(std::string(what) + ": expected " + std::to_string(expected) +
                        " addresses, got " + std::to_string(got));
}

void weighted_merge_forward(int dtype, int threads, Sizes sizes, const Addresses& base,
                            const Addresses& thetas, Reals weights, const Addresses& out) {
  WeightedMergeParams params{};
  params.dtype = dtype_of(dtype);
  params.threads = threads;
  check_count("weighted_merge: base", base.size(), sizes.size());
  check_count("weighted_merge: thetas", thetas.size(), sizes.size() * weights.size());
  check_count("weighted_merge: out", out.size(), sizes.size());
  params.sizes = std::move(sizes);
  params.base = pointers(base);
  params.thetas = pointers(thetas);
  params.weights = std::move(weights);
  params.out = pointers(out);
  py::gil_scoped_release unlocked;
  cpu::weighted_merge_forward(params);
}

Reals weighted_merge_backward(int dtype, int threads, Sizes sizes, const Addresses& d_out,
                              const Addresses& base, const Addresses& thetas, Reals weights,
                              const Addresses& d_base, const Addresses& d_thetas,
                              bool need_weights) {
  WeightedMergeParams params{};
  params.dtype = dtype_of(dtype);
  params.threads = threads;
  const size_t all = sizes.size() * weights.size();
  check_count("weighted_merge: d_out", d_out.size(), sizes.size());
  check_count("weighted_merge: base", base.size(), sizes.size());
  check_count("weighted_merge: thetas", thetas.size(), all);
  check_count("weighted_merge: d_base", d_base.size(), sizes.size(), true);
  check_count("weighted_merge: d_thetas", d_thetas.size(), all, true);
  params.sizes = std::move(sizes);
  params.base = pointers(base);
  params.thetas = pointers(thetas);
  params.weights = std::move(weights);
  params.d_out = pointers(d_out);
  params.d_base = pointers(d_base);
  params.d_thetas = pointers(d_thetas);
  if (need_weights) params.d_weights.assign(params.weights.size(), 0.0);
  {
    py::gil_scoped_release unlocked;
    cpu::weighted_merge_backward(params);
  }
  return params.d_weights;
}

ProjectedMergeParams projected_merge_params(int dtype, int threads, int64_t d, Sizes rows,
                                            Sizes tokens, const MatrixArgs& W0, const MatrixArgs& W,
                                            const MatrixArgs& C, const MatrixArgs& M) {
  ProjectedMergeParams params{};
  params.dtype = dtype_of(dtype);
  params.threads = threads;
  params.d = d;
  check_count("projected_merge: W0", W0.size(), rows.size());
  check_count("projected_merge: W", W.size(), rows.size() * tokens.size());
  check_count("projected_merge: C", C.size(), tokens.size());
  check_count("projected_merge: M", M.size(), tokens.size());
  params.rows = std::move(rows);
  params.tokens = std::move(tokens);
  params.W0 = matrices(W0);
  params.W = matrices(W);
  params.C = matrices(C);
  params.M = matrices(M);
  return params;
}

void projected_merge_forward(int dtype, int threads, int64_t d, Sizes rows, Sizes tokens,
                             const MatrixArgs& W0, const MatrixArgs& W, const MatrixArgs& C,
                             const MatrixArgs& M, const MatrixArgs& out) {
  auto params =
      projected_merge_params(dtype, threads, d, std::move(rows), std::move(tokens), W0, W, C, M);
  check_count("projected_merge: out", out.size(), params.rows.size());
  params.out = matrices(out);
  py::gil_scoped_release unlocked;
  cpu::projected_merge_forward(params);
}

void projected_merge_backward(int dtype, int threads, int64_t d, Sizes rows, Sizes tokens,
                              const MatrixArgs& d_out, const MatrixArgs& W0, const MatrixArgs& W,
                              const MatrixArgs& C, const MatrixArgs& M, const MatrixArgs& d_W0,
                              const MatrixArgs& d_W, const MatrixArgs& d_C, const MatrixArgs& d_M) {
  auto params =
      projected_merge_params(dtype, threads, d, std::move(rows), std::move(tokens), W0, W, C, M);
  const size_t num_layers = params.rows.size(), num_concepts = params.tokens.size();
  check_count("projected_merge: d_out", d_out.size(), num_layers);
  check_count("projected_merge: d_W0", d_W0.size(), num_layers, true);
  check_count("projected_merge: d_W", d_W.size(), num_layers * num_concepts, true);
  check_count("projected_merge: d_C", d_C.size(), num_concepts, true);
  check_count("projected_merge: d_M", d_M.size(), num_concepts, true);
  params.d_out = matrices(d_out);
  params.d_W0 = matrices(d_W0);
  params.d_W = matrices(d_W);
  params.d_C = matrices(d_C);
  params.d_M = matrices(d_M);
  py::gil_scoped_release unlocked;
  cpu::projected_merge_backward(params);
}

BatchedLoraParams batched_lora_params(int dtype, int threads,
                                      std::tuple<int64_t, int64_t, int64_t, int64_t> btdo,
                                      Sizes ranks, Sizes index, Reals scale, const MatrixArg& x,
                                      const MatrixArg& W, const MatrixArgs& A,
                                      const MatrixArgs& B) {
  BatchedLoraParams params{};
  params.dtype = dtype_of(dtype);
  params.threads = threads;
  std::tie(params.b, params.t, params.d, params.o) = btdo;
  const int64_t num_adapters = static_cast<int64_t>(ranks.size());
  check_count("batched_lora: A", A.size(), ranks.size());
  check_count("batched_lora: B", B.size(), ranks.size());
  check_count("batched_lora: scale", scale.size(), ranks.size());
  check_count("batched_lora: index", index.size(), static_cast<size_t>(params.b));
  for (int64_t n : index)
    if (n < -1 || n >= num_adapters)
      throw py::value_error("batched_lora: index must be in [-1, " + std::to_string(num_adapters) +
                            "), got " + std::to_string(n));
  params.ranks = std::move(ranks);
  params.index = std::move(index);
  params.scale = std::move(scale);
  params.x = matrix(x);
  params.W = matrix(W);
  if (params.W.data != nullptr && params.dtype != DType::kFloat32)
    throw py::value_error("batched_lora: the base product is computed in float32 only");
  params.A = matrices(A);
  params.B = matrices(B);
  return params;
}

void batched_lora_forward(int dtype, int threads,
                          std::tuple<int64_t, int64_t, int64_t, int64_t> btdo, Sizes ranks,
                          Sizes index, Reals scale, const MatrixArg& x, const MatrixArg& W,
                          const MatrixArgs& A, const MatrixArgs& B, const MatrixArg& y, bool add) {
  auto params = batched_lora_params(dtype, threads, btdo, std::move(ranks), std::move(index),
                                    std::move(scale), x, W, A, B);
  params.y = matrix(y);
  params.add = add;
  py::gil_scoped_release unlocked;
  cpu::batched_lora_forward(params);
}

Reals batched_lora_backward(int dtype, int threads,
                            std::tuple<int64_t, int64_t, int64_t, int64_t> btdo, Sizes ranks,
                            Sizes index, Reals scale, const MatrixArg& d_y, const MatrixArg& x,
                            const MatrixArg& W, const MatrixArgs& A, const MatrixArgs& B,
                            const MatrixArg& d_x, const MatrixArgs& d_A, const MatrixArgs& d_B,
                            bool need_scale) {
  auto params = batched_lora_params(dtype, threads, btdo, std::move(ranks), std::move(index),
                                    std::move(scale), x, W, A, B);
  check_count("batched_lora: d_A", d_A.size(), params.ranks.size(), true);
  check_count("batched_lora: d_B", d_B.size(), params.ranks.size(), true);
  params.d_y = matrix(d_y);
  params.d_x = matrix(d_x);
  params.d_A = matrices(d_A);
  params.d_B = matrices(d_B);
  params.need_scale = need_scale;
  if (need_scale) params.d_scale.assign(params.ranks.size(), 0.0);
  {
    py::gil_scoped_release unlocked;
    cpu::batched_lora_backward(params);
  }
  return params.d_scale;
}

MergeLoraParams merge_lora_params(int dtype, int threads, std::tuple<int64_t, int64_t> shape,
                                  Sizes ranks, Reals scale, Reals weights, const MatrixArgs& A,
                                  const MatrixArgs& B) {
  MergeLoraParams params{};
  params.dtype = dtype_of(dtype);
  params.threads = threads;
  std::tie(params.o, params.d) = shape;
  check_count("merge_lora: A", A.size(), ranks.size());
  check_count("merge_lora: B", B.size(), ranks.size());
  check_count("merge_lora: scale", scale.size(), ranks.size());
  check_count("merge_lora: weights", weights.size(), ranks.size());
  params.ranks = std::move(ranks);
  params.scale = std::move(scale);
  params.weights = std::move(weights);
  params.A = matrices(A);
  params.B = matrices(B);
  return params;
}

void merge_lora_forward(int dtype, int threads, std::tuple<int64_t, int64_t> shape, Sizes ranks,
                        Reals scale, Reals weights, const MatrixArg& W, const MatrixArgs& A,
                        const MatrixArgs& B, const MatrixArg& out) {
  auto params = merge_lora_params(dtype, threads, shape, std::move(ranks), std::move(scale),
                                  std::move(weights), A, B);
  params.W = matrix(W);
  params.out = matrix(out);
  py::gil_scoped_release unlocked;
  cpu::merge_lora_forward(params);
}

Reals merge_lora_backward(int dtype, int threads, std::tuple<int64_t, int64_t> shape, Sizes ranks,
                          Reals scale, Reals weights, const MatrixArg& d_out, const MatrixArgs& A,
                          const MatrixArgs& B, const MatrixArgs& d_A, const MatrixArgs& d_B,
                          bool need_products) {
  auto params = merge_lora_params(dtype, threads, shape, std::move(ranks), std::move(scale),
                                  std::move(weights), A, B);
  check_count("merge_lora: d_A", d_A.size(), params.ranks.size(), true);
  check_count("merge_lora: d_B", d_B.size(), params.ranks.size(), true);
  params.d_out = matrix(d_out);
  params.d_A = matrices(d_A);
  params.d_B = matrices(d_B);
  params.need_products = need_products;
  if (need_products) params.products.assign(params.ranks.size(), 0.0);
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
  module.def("weighted_merge_forward", &mima::weighted_merge_forward);
  module.def("weighted_merge_backward", &mima::weighted_merge_backward);
  module.def("projected_merge_forward", &mima::projected_merge_forward);
  module.def("projected_merge_backward", &mima::projected_merge_backward);
  module.def("batched_lora_forward", &mima::batched_lora_forward);
  module.def("batched_lora_backward", &mima::batched_lora_backward);
  module.def("merge_lora_forward", &mima::merge_lora_forward);
  module.def("merge_lora_backward", &mima::merge_lora_backward);
}
