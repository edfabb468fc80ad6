// Which instruction set the CPU kernels use, chosen once at run time.
#pragma once

#include <string>

namespace mima {

enum class CpuLevel : int { kGeneric = 0, kAvx2 = 1, kAvx512 = 2 };

const char* name(CpuLevel level);

// The highest level that this processor (and this build) can run.
CpuLevel best_cpu_level();

// The level in use: MIMA_CPU_LEVEL=generic|avx2|avx512 if set, else the best one. Throws
// std::invalid_argument where the variable asks for what this processor cannot run.
CpuLevel cpu_level();

}  // namespace mima
