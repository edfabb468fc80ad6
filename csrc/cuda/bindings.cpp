// mima._native_cuda: the CUDA kernels, apart from mima._native so that the CPU never depends on
// CUDA. A call object holds the table of one call; Python copies the table to the device, passes
// its address and a stream, and owns every allocation.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cuda/ops.h"
#include "tensors.h"

namespace mima {
namespace {

cuda::WeightedMergeCall weighted_merge(int dtype, const TensorArgs& base, const TensorArgs& thetas,
                                       std::vector<double> weights, const TensorArgs& out,
                                       const TensorArgs& d_out, const TensorArgs& d_base,
                                       const TensorArgs& d_thetas) {
  auto params = weighted_merge_params(dtype, base, thetas, std::move(weights));
  params.out = pointers("weighted_merge: out", out, base.size(), true);
  params.d_out = pointers("weighted_merge: d_out", d_out, base.size(), true);
  params.d_base = pointers("weighted_merge: d_base", d_base, base.size(), true);
  params.d_thetas = pointers("weighted_merge: d_thetas", d_thetas, thetas.size(), true);
  return cuda::WeightedMergeCall(params);
}

cuda::ProjectedMergeCall projected_merge(int dtype, const TensorArgs& W0, const TensorArgs& W,
                                         const TensorArgs& C, const TensorArgs& M,
                                         const TensorArgs& out, const TensorArgs& d_out,
                                         const TensorArgs& d_W0, const TensorArgs& d_W) {
  auto params = projected_merge_params(dtype, W0, W, C, M);
  params.out = matrices("projected_merge: out", out, W0.size(), true);
  params.d_out = matrices("projected_merge: d_out", d_out, W0.size(), true);
  params.d_W0 = matrices("projected_merge: d_W0", d_W0, W0.size(), true);
  params.d_W = matrices("projected_merge: d_W", d_W, W.size(), true);
  return cuda::ProjectedMergeCall(params);
}

cuda::CombineCall combine(int dtype, const std::vector<Reals>& factors, const TensorArgs& x,
                          const TensorArgs& out) {
  return cuda::CombineCall(combine_params(dtype, factors, x, out));
}

cuda::AdamStepCall adam_step(int dtype, const Reals& rule, int64_t step, const TensorArgs& z,
                             const TensorArgs& g, const TensorArgs& m, const TensorArgs& v,
                             const TensorArgs& out_z, const TensorArgs& out_m,
                             const TensorArgs& out_v) {
  return cuda::AdamStepCall(
      adam_step_forward_params(dtype, rule, step, z, g, m, v, out_z, out_m, out_v));
}

cuda::AdamStepCall adam_step_backward(int dtype, const Reals& rule, int64_t step,
                                      const TensorArgs& bar_z, const TensorArgs& bar_m,
                                      const TensorArgs& bar_v, const TensorArgs& g,
                                      const TensorArgs& m, const TensorArgs& v,
                                      const TensorArgs& d_z, const TensorArgs& d_g,
                                      const TensorArgs& d_m, const TensorArgs& d_v) {
  return cuda::AdamStepCall(adam_step_backward_params(dtype, rule, step, bar_z, bar_m, bar_v, g, m,
                                                      v, d_z, d_g, d_m, d_v));
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
  module.doc() = "CUDA kernels of mima.ops; called through mima.ops, which checks arguments.";
  module.attr("version") = MIMA_VERSION;
  module.attr("archs") = cuda::built_archs();
  module.def("are_contiguous", &are_contiguous);
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
  py::class_<cuda::CombineCall>(module, "Combine")
      .def(py::init(&combine))
      .def("table", &table<cuda::CombineCall>, py::keep_alive<0, 1>())
      .def("launch", &cuda::CombineCall::launch, unlocked);
  py::class_<cuda::AdamStepCall>(module, "AdamStep")
      .def(py::init(&adam_step))
      .def(py::init(&adam_step_backward))
      .def("table", &table<cuda::AdamStepCall>, py::keep_alive<0, 1>())
      .def("launch", &cuda::AdamStepCall::launch, unlocked);
}
