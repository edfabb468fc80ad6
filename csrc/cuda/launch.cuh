// Launch checking and dispatch on the stored type.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "cuda/common.cuh"
#include "params.h"

namespace mima::cuda {

inline void check_launch(const char* op, const std::string& shape) {
  const cudaError_t error = cudaGetLastError();
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string(op) + " (" + shape +
                           "): CUDA launch failed: " + cudaGetErrorString(error));
}

// Calls f(T{}) with the type that the code names.
template <class F>
void with_type(DType dtype, const F& f) {
  switch (dtype) {
    case DType::kFloat32:
      return f(float{});
    case DType::kFloat64:
      return f(double{});
    case DType::kBFloat16:
      return f(BFloat16{});
    case DType::kFloat16:
      return f(Float16{});
  }
}

template <class T>
const T* at(uint64_t table, int64_t offset) {
  return offset < 0 ? nullptr : reinterpret_cast<const T*>(table + static_cast<uint64_t>(offset));
}

}  // namespace mima::cuda
