// x86-64 with avx512f, avx512bw, avx512dq, avx512vl, avx2, fma, f16c: called only where
// dispatch.cpp has found them.
#if defined(__x86_64__)

#if !defined(__clang__)
// The intrinsics' own "undefined" operands, which the conversions ignore, trip these two.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

// Before the target changes: what these headers define stays runnable everywhere.
#include <immintrin.h>

#include "cpu/kernels.h"

#if defined(__clang__)
#pragma clang attribute push(                                                    \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), \
    apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#endif

#define MIMA_VECTOR_BYTES 64
#define MIMA_VECTOR_REGISTERS 32
#define MIMA_KERNELS kAvx512Kernels

#include "cpu/kernels_impl.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif  // __x86_64__
