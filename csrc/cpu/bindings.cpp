// mima._native: the CPU kernels. Takes addresses, sizes and dtype codes; knows nothing of torch.
#include <pybind11/pybind11.h>

#include "cpu/dispatch.h"

namespace py = pybind11;

PYBIND11_MODULE(_native, module) {
  module.doc() = "CPU kernels of mima.ops; called through mima.ops.native, which checks arguments.";
  module.attr("version") = MIMA_VERSION;
  module.def("cpu_level", [] { return mima::name(mima::cpu_level()); });
}
