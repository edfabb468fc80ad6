// mima._native_cuda: the CUDA kernels, apart from mima._native so that the CPU never depends on
// CUDA. A call object holds the table of one call; Python copies the table to the device, passes
// its address and a stream, and owns every allocation. Matrices are tuples (address, leading
// dimension).
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <tuple>

#include "cuda/ops.h"

namespace py = pybind11;

namespace mima {
namespace {

using Addresses = std::vector<uint64_t>;
using MatrixArgs = std::vector<std::tuple<uint64_t, int64_t>>;
using Sizes = std::vector<int64_t>;

std::vector<void*> pointers(const Addresses& addresses) {
  std::vector<void*> result(addresses.size());
  for (size_t i = 0; i < addresses.size(); ++i) result[i] = reinterpret_cast<void*>(addresses[i]);
  return result;
}

std::vector<Matrix> matrices(const MatrixArgs& args) {
  std::vector<Matrix> result(args.size());
  for (size_t i = 0; i < args.size(); ++i)
    result[i] = {reinterpret_cast<void*>(std::get<0>(args[i])), std::get<1>(args[i])};
  return result;
}

DType dtype_of(int code) {
  if (code < 0 || code > 3) throw py::value_error("dtype code must be 0 to 3");
  return static_cast<DType>(code);
}

void check_count(const char* what, size_t got, size_t expected, bool optional = false) {
  if (got == expected || (optional && got == 0)) return;
  throw py::value_error(std::string(what) + ": expected " + std::to_string(expected) +
                        " addresses, got " + std::to_string(got));
}

cuda::WeightedMergeCall weighted_merge(int dtype, Sizes sizes, const Addresses& base,
                                       const Addresses& thetas, std::vector<double> weights,
                                       const Addresses& out, const Addresses& d_out,
                                       const Addresses& d_base, const Addresses& d_thetas) {
  const size_t all = sizes.size() * weights.size();
  check_count("weighted_merge: base", base.size(), sizes.size());
  check_count("weighted_merge: thetas", thetas.size(), all);
  check_count("weighted_merge: out", out.size(), sizes.size(), true);
  check_count("weighted_merge: d_out", d_out.size(), sizes.size(), true);
  check_count("weighted_merge: d_base", d_base.size(), sizes.size(), true);
  check_count("weighted_merge: d_thetas", d_thetas.size(), all, true);
  WeightedMergeParams params{};
  params.dtype = dtype_of(dtype);
  params.sizes = std::move(sizes);
  params.base = pointers(base);
  params.thetas = pointers(thetas);
  params.weights = std::move(weights);
  params.out = pointers(out);
  params.d_out = pointers(d_out);
  params.d_base = pointers(d_base);
  params.d_thetas = pointers(d_thetas);
  return cuda::WeightedMergeCall(params);
}

cuda::ProjectedMergeCall projected_merge(int dtype, int64_t d, Sizes rows, Sizes tokens,
                                         const MatrixArgs& W0, const MatrixArgs& W,
                                         const MatrixArgs& C, const MatrixArgs& M,
                                         const MatrixArgs& out, const MatrixArgs& d_out,
                                         const MatrixArgs& d_W0, const MatrixArgs& d_W) {
  const size_t all = rows.size() * tokens.size();
  check_count("projected_merge: W0", W0.size(), rows.size());
  check_count("projected_merge: W", W.size(), all);
  check_count("projected_merge: C", C.size(), tokens.size());
  check_count("projected_merge: M", M.size(), tokens.size());
  check_count("projected_merge: out", out.size(), rows.size(), true);
  check_count("projected_merge: d_out", d_out.size(), rows.size(), true);
  check_count("projected_merge: d_W0", d_W0.size(), rows.size(), true);
  check_count("projected_merge: d_W", d_W.size(), all, true);
  ProjectedMergeParams params{};
  params.dtype = dtype_of(dtype);
  params.d = d;
  params.rows = std::move(rows);
  params.tokens = std::move(tokens);
  params.W0 = matrices(W0);
  params.W = matrices(W);
  params.C = matrices(C);
  params.M = matrices(M);
  params.out = matrices(out);
  params.d_out = matrices(d_out);
  params.d_W0 = matrices(d_W0);
  params.d_W = matrices(d_W);
  return cuda::ProjectedMergeCall(params);
}

// The table's bytes, valid while the call lives.
template <class Call>
py::memoryview table(Call& call) {
  auto& bytes = call.table().bytes();
  return py::memoryview::from_memory(bytes.data(), static_cast<py::ssize_t>(bytes.size()));
}

}  // namespace
}  // namespace mima

PYBIND11_MODULE(_native_cuda, module) {
  using namespace mima;
  module.doc() =
      "CUDA kernels of mima.ops; called through mima.ops.native, which checks arguments.";
  module.attr("version") = MIMA_VERSION;
  const auto unlocked = py::call_guard<py::gil_scoped_release>();
  py::class_<cuda::WeightedMergeCall>(module, "WeightedMerge")
      .def(py::init(&weighted_merge))
      .def("table", &table<cuda::WeightedMergeCall>, py::keep_alive<0, 1>())
      .def_property_readonly("num_pieces", &cuda::WeightedMergeCall::num_pieces)
      .def("forward", &cuda::WeightedMergeCall::forward, unlocked)
      .def("backward", &cuda::WeightedMergeCall::backward, unlocked);
  py::class_<cuda::ProjectedMergeCall>(module, "ProjectedMerge")
      .def(py::init(&projected_merge))
      .def("table", &table<cuda::ProjectedMergeCall>, py::keep_alive<0, 1>())
      .def_property_readonly("all_rows", &cuda::ProjectedMergeCall::all_rows)
      .def_property_readonly("num_tokens", &cuda::ProjectedMergeCall::num_tokens)
      .def_property_readonly("num_chunks", &cuda::ProjectedMergeCall::num_chunks)
      .def("forward", &cuda::ProjectedMergeCall::forward, unlocked)
      .def("backward", &cuda::ProjectedMergeCall::backward, unlocked)
      .def("sums", &cuda::ProjectedMergeCall::sums, unlocked);
}
