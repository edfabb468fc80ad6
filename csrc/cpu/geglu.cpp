// geglu: a stream over rows.
#include "cpu/blocks.h"
#include "cpu/ops.h"

namespace mima::cpu {
namespace {

// Calls f(row) for each row.
template <class F>
void for_rows(const GegluParams& params, const F& f) {
  if (params.d == 0) return;
  const int64_t together = ceil_div(kPieceElements / 4, params.d);
  const int threads = useful_threads(params.threads, double(params.rows) * params.d * 10);
  parallel_for(ceil_div(params.rows, together), threads, [&](int64_t piece, int) {
    const int64_t end = std::min(params.rows, (piece + 1) * together);
    for (int64_t row = piece * together; row < end; ++row) f(row);
  });
}

// Half `which` of a row of [rows, 2 d], or a row of [rows, d].
void* half(const GegluParams& params, const void* p, int64_t row, int which) {
  if (p == nullptr) return nullptr;
  return at(const_cast<void*>(p), (2 * row + which) * params.d, params.dtype);
}
void* whole(const GegluParams& params, const void* p, int64_t row) {
  return p == nullptr ? nullptr : at(const_cast<void*>(p), row * params.d, params.dtype);
}

const StorageKernels& storage_of(const GegluParams& params) {
  return active_kernels().storage[static_cast<int>(params.dtype)];
}

}  // namespace

void geglu_forward(const GegluParams& params) {
  const StorageKernels& storage = storage_of(params);
  for_rows(params, [&](int64_t row) {
    const void* const in[] = {half(params, params.x, row, 0), half(params, params.x, row, 1)};
    void* const out[] = {whole(params, params.out, row)};
    storage.geglu(in, out, params.d);
  });
}

void geglu_backward(const GegluParams& params) {
  const StorageKernels& storage = storage_of(params);
  for_rows(params, [&](int64_t row) {
    const void* const in[] = {whole(params, params.d_out, row), half(params, params.x, row, 0),
                              half(params, params.x, row, 1)};
    void* const out[] = {half(params, params.d_x, row, 0), half(params, params.d_x, row, 1)};
    storage.geglu_backward(in, out, params.d);
  });
}

void geglu_double_backward(const GegluParams& params) {
  const StorageKernels& storage = storage_of(params);
  for_rows(params, [&](int64_t row) {
    const void* const in[] = {whole(params, params.d_out, row), half(params, params.u_x, row, 0),
                              half(params, params.u_x, row, 1), half(params, params.x, row, 0),
                              half(params, params.x, row, 1)};
    void* const out[] = {whole(params, params.d_d_out, row), half(params, params.d_x, row, 0),
                         half(params, params.d_x, row, 1)};
    storage.geglu_double_backward(in, out, params.d);
  });
}

}  // namespace mima::cpu
