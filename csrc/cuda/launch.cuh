// Launch checking and dispatch on the stored type.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "cuda/common.cuh"
#include "params.h"

namespace mima::cuda {

struct LaunchSize {
  dim3 blocks;
  int threads;
  int64_t shared_bytes;
};

// Launches a kernel on a stream; a failure becomes an exception that names operator and shape.
template <class... Params, class... Args>
void launch(const char* op, const std::string& shape, const LaunchSize& size, uint64_t stream,
            void (*kernel)(Params...), Args... args) {
  cudaLaunchConfig_t config = {};
  config.gridDim = size.blocks;
  config.blockDim = dim3(static_cast<unsigned>(size.threads));
  config.dynamicSmemBytes = static_cast<size_t>(size.shared_bytes);
  config.stream = reinterpret_cast<cudaStream_t>(stream);
  cudaError_t error = cudaLaunchKernelEx(&config, kernel, static_cast<Params>(args)...);
  // cleared here, so that the next caller does not see it again
  const cudaError_t pending = cudaGetLastError();
  if (error == cudaSuccess) error = pending;
  if (error != cudaSuccess)
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
