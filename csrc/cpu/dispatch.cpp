#include "cpu/dispatch.h"

#include <cstdlib>
#include <stdexcept>

#include "cpu/kernels.h"

namespace mima {

const char* name(CpuLevel level) {
  switch (level) {
    case CpuLevel::kAvx512:
      return "avx512";
    case CpuLevel::kAvx2:
      return "avx2";
    case CpuLevel::kGeneric:
      break;
  }
  return "generic";
}

CpuLevel best_cpu_level() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    return CpuLevel::kAvx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c"))
    return CpuLevel::kAvx2;
#endif
  return CpuLevel::kGeneric;
}

CpuLevel cpu_level() {
  // read at each call: a getenv is nothing beside a kernel, and tests change it
  const char* wanted = std::getenv("MIMA_CPU_LEVEL");
  const CpuLevel best = best_cpu_level();
  if (wanted == nullptr || *wanted == '\0') return best;
  for (CpuLevel level : {CpuLevel::kGeneric, CpuLevel::kAvx2, CpuLevel::kAvx512}) {
    if (std::string(wanted) != name(level)) continue;
    if (level > best)
      throw std::invalid_argument("MIMA_CPU_LEVEL=" + std::string(wanted) +
                                  ": this processor only runs " + name(best));
    return level;
  }
  throw std::invalid_argument("MIMA_CPU_LEVEL must be generic, avx2 or avx512, got " +
                              std::string(wanted));
}

const Kernels& active_kernels() {
  switch (cpu_level()) {
#if defined(__x86_64__)
    case CpuLevel::kAvx512:
      return kAvx512Kernels;
    case CpuLevel::kAvx2:
      return kAvx2Kernels;
#endif
    default:
      return kGenericKernels;
  }
}

}  // namespace mima
