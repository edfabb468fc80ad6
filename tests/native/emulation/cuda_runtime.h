// Stands in for the CUDA runtime: runs a kernel on the CPU, block after block, the threads of a
// block as fibers that switch where they wait for each other. Slow, and exact: it is what lets the
// values of the CUDA kernels be tested on a machine without a GPU.
#pragma once

#include <immintrin.h>
#include <ucontext.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __shared__
#define __launch_bounds__(...)

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3() = default;
  template <class X, class Y = unsigned, class Z = unsigned>
  dim3(X x_, Y y_ = 1, Z z_ = 1)
      : x(static_cast<unsigned>(x_)), y(static_cast<unsigned>(y_)), z(static_cast<unsigned>(z_)) {}
};

inline dim3 threadIdx, blockIdx;

namespace emulation {

constexpr size_t kStack = 256 << 10;

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStack]};
  bool done = false;
};

inline ucontext_t scheduler;
inline std::vector<Fiber> fibers;
inline unsigned current, num_threads;
inline std::function<void()> body;

inline void run_body() {
  body();
  fibers[current].done = true;
}

inline void yield() {
  const unsigned self = current;
  swapcontext(&fibers[self].context, &scheduler);
}

// Threads [first, first + count) wait for each other. Threads that have returned count as arrived,
// as they do for __syncthreads on the hardware.
struct Barrier {
  unsigned arrived = 0;
  uint64_t generation = 0;
  void wait(unsigned first, unsigned count) {
    const uint64_t entered = generation;
    ++arrived;
    for (;;) {
      if (generation != entered) return;
      unsigned gone = 0;
      for (unsigned i = first; i < first + count; ++i) gone += fibers[i].done;
      if (arrived + gone >= count) {
        arrived = 0;
        ++generation;
        return;
      }
      yield();
    }
  }
};

inline Barrier block_barrier;
inline std::vector<Barrier> warp_barriers;
inline double lanes[1024];  // one slot per thread of a block

inline void run_block(unsigned threads) {
  num_threads = threads;
  while (fibers.size() < threads) fibers.emplace_back();
  block_barrier = {};
  warp_barriers.assign(threads / 32, {});
  for (unsigned i = 0; i < threads; ++i) {
    fibers[i].done = false;
    getcontext(&fibers[i].context);
    fibers[i].context.uc_stack.ss_sp = fibers[i].stack.get();
    fibers[i].context.uc_stack.ss_size = kStack;
    fibers[i].context.uc_link = &scheduler;
    makecontext(&fibers[i].context, run_body, 0);
  }
  for (bool left = true; left;) {
    left = false;
    for (unsigned i = 0; i < threads; ++i) {
      if (fibers[i].done) continue;
      left = true;
      current = i;
      threadIdx.x = i;
      swapcontext(&scheduler, &fibers[i].context);
    }
  }
}

}  // namespace emulation

inline void __syncwarp() {
  const unsigned warp = emulation::current / 32;
  emulation::warp_barriers[warp].wait(warp * 32, 32);
}

inline void __syncthreads() {
  emulation::block_barrier.wait(0, emulation::num_threads);
}

template <class T>
T __shfl_xor_sync(unsigned, T value, int offset) {
  const unsigned self = emulation::current;
  std::memcpy(&emulation::lanes[self], &value, sizeof(T));
  __syncwarp();
  T other;
  std::memcpy(&other, &emulation::lanes[self ^ static_cast<unsigned>(offset)], sizeof(T));
  __syncwarp();
  return other;
}

template <class To, class From>
To reinterpret(From from) {
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}
inline float __uint_as_float(uint32_t x) {
  return reinterpret<float>(x);
}
inline uint32_t __float_as_uint(float x) {
  return reinterpret<uint32_t>(x);
}

struct half {
  uint16_t bits;
};
inline half __ushort_as_half(uint16_t bits) {
  return {bits};
}
inline uint16_t __half_as_ushort(half x) {
  return x.bits;
}
inline float __half2float(half x) {
  return _cvtsh_ss(x.bits);
}
inline half __float2half_rn(float x) {
  return {static_cast<uint16_t>(_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT))};
}

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
inline cudaError_t cudaGetLastError() {
  return cudaSuccess;
}
inline const char* cudaGetErrorString(cudaError_t) {
  return "too much shared memory";
}

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

// Dynamic shared memory, under the name that the kernels declare it by: 48 KiB, which every device
// grants.
namespace mima::cuda {
alignas(16) extern double shared[6 << 10];
}  // namespace mima::cuda

template <class... Params, class... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params...),
                               Args... args) {
  if (config->dynamicSmemBytes > sizeof(mima::cuda::shared)) return cudaErrorInvalidValue;
  std::memset(mima::cuda::shared, 0xff, sizeof(mima::cuda::shared));  // NaN until written
  emulation::body = [=] { kernel(args...); };
  for (unsigned z = 0; z < config->gridDim.z; ++z)
    for (unsigned y = 0; y < config->gridDim.y; ++y)
      for (unsigned x = 0; x < config->gridDim.x; ++x) {
        blockIdx.x = x;
        blockIdx.y = y;
        blockIdx.z = z;
        emulation::run_block(config->blockDim.x);
      }
  return cudaSuccess;
}
