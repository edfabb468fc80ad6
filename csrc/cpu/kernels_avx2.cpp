// x86-64 with avx2, fma, f16c: called only where dispatch.cpp has found them.
#if defined(__x86_64__)

// Before the target changes: what these headers define stays runnable everywhere.
#include <immintrin.h>

#include "cpu/kernels.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif

#define MIMA_VECTOR_BYTES 32
#define MIMA_VECTOR_REGISTERS 16
#define MIMA_KERNELS kAvx2Kernels

#include "cpu/kernels_impl.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif  // __x86_64__
