// Any processor: 16-byte vectors, which the compiler maps to SSE2, NEON or scalar code.
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "cpu/kernels.h"

#define MIMA_VECTOR_BYTES 16
#if defined(__aarch64__)
#define MIMA_VECTOR_REGISTERS 32
#else
#define MIMA_VECTOR_REGISTERS 16
#endif
#define MIMA_KERNELS kGenericKernels

#include "cpu/kernels_impl.h"
