#include "cuda_runtime.h"

namespace mima::cuda {
alignas(16) double shared[6 << 10];
}  // namespace mima::cuda
