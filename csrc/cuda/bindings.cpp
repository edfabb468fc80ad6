// mima._native_cuda: the CUDA kernels, apart from mima._native so that the CPU never depends on
// CUDA.
#include <pybind11/pybind11.h>

PYBIND11_MODULE(_native_cuda, module) {
  module.doc() =
      "CUDA kernels of mima.ops; called through mima.ops.native, which checks arguments.";
  module.attr("version") = MIMA_VERSION;
}
