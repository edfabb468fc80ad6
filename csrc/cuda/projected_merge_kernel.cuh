// projected_merge on CUDA: one launch for all layers and concepts. Each warp takes kRows rows of
// one layer. First it computes their coefficients against all S tokens (the lanes share the d
// columns, one sum per row and token at the end), then it expands them: out = W0 + coefficients M.
// A row's weights come from memory once; C and M, small and read by everyone, from the caches, and
// each of their loads serves kRows rows. All accesses are 16 bytes wide: every row of every matrix
// starts at a multiple of 16 bytes and d is a multiple of kVec; the Python side pads what is not.
#pragma once

#include "cuda/common.cuh"

namespace mima {
namespace cuda {

constexpr int kRows = 4;
constexpr int kMaxWarps = 4;
// Leaves 168 registers to a thread, 255 for float64: sums, rows and addresses stay in them.
template <class T>
constexpr int kBlocksPerSm = sizeof(T) == 8 ? 2 : 3;

// Tokens whose sums a lane carries at once: kRows * kTokens registers, twice that for double.
template <class T>
constexpr int kTokens = sizeof(T) == 8 ? 8 : 16;

struct DeviceMatrix {
  uint64_t data;
  int64_t ld;
};

// Device addresses into the table of a call.
struct ProjectTable {
  const int64_t* blocks;       // [num_blocks, 2]: layer, first row
  const int64_t* rows;         // [L]
  const int64_t* first_token;  // [N + 1]
  const DeviceMatrix* W0;      // [L]
  const DeviceMatrix* W;       // [N * L], concept-major
  const DeviceMatrix* C;       // [N]
  const DeviceMatrix* M;       // [N]
  const DeviceMatrix* out;     // [L] or null, forward
  const DeviceMatrix* d_out;   // [L], backward
  const DeviceMatrix* d_W0;    // [L] or null
  const DeviceMatrix* d_W;     // [N * L] or null
  const int64_t* first_row;    // [L + 1]: rows of all layers one after the other
  void* coefficients;  // [all rows, S] accumulators, or null: written for the sums over rows
};

template <class T>
__device__ inline T* row_of(const DeviceMatrix& m, int64_t row) {
  return reinterpret_cast<T*>(m.data) + row * m.ld;
}

// coefficients[token, row] = <X_row - X0_row, V_token> for the rows and the tokens of one V.
template <class T>
__device__ inline void dot_rows(const DeviceMatrix& X, const DeviceMatrix* X0, int64_t row,
                                int64_t num_rows, const DeviceMatrix& V, int num_tokens, int64_t d,
                                int lane, Acc<T>* coefficients) {
  for (int first = 0; first < num_tokens; first += kTokens<T>) {
    Acc<T> sums[kRows * kTokens<T>];
#pragma unroll
    for (int i = 0; i < kRows * kTokens<T>; ++i) sums[i] = 0;
    for (int64_t k = int64_t(lane) * kVec<T>; k < d; k += 32 * kVec<T>) {
      Acc<T> x[kRows][kVec<T>];
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        // a row beyond the last repeats it, and is not stored
        const int64_t from = row + (r < num_rows ? r : num_rows - 1);
        load(row_of<const T>(X, from) + k, x[r]);
        if (X0 != nullptr) {
          Acc<T> base[kVec<T>];
          load(row_of<const T>(*X0, from) + k, base);
#pragma unroll
          for (int v = 0; v < kVec<T>; ++v) x[r][v] -= base[v];
        }
      }
#pragma unroll
      for (int t = 0; t < kTokens<T>; ++t) {
        if (first + t < num_tokens) {
          Acc<T> c[kVec<T>];
          load(row_of<const T>(V, first + t) + k, c);
#pragma unroll
          for (int r = 0; r < kRows; ++r)
#pragma unroll
            for (int v = 0; v < kVec<T>; ++v) sums[t * kRows + r] += x[r][v] * c[v];
        }
      }
    }
    warp_sum_many<kRows * kTokens<T>>(sums, lane);
    constexpr int kPerLane = kRows * kTokens<T> / 32;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const int which = lane * kPerLane + i;  // token * kRows + row
      if (first + which / kRows < num_tokens) coefficients[first * kRows + which] = sums[i];
    }
  }
  __syncwarp();
}

// x[row] += sum over tokens of coefficients[token, row] V_token, for columns [k, k + kVec).
template <class T>
__device__ inline void expand(const Acc<T>* coefficients, const DeviceMatrix& V, int num_tokens,
                              int64_t k, Acc<T> (&x)[kRows][kVec<T>]) {
#pragma unroll 4
  for (int t = 0; t < num_tokens; ++t) {
    Acc<T> c[kVec<T>];
    load(row_of<const T>(V, t) + k, c);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const Acc<T> a = coefficients[t * kRows + r];
#pragma unroll
      for (int v = 0; v < kVec<T>; ++v) x[r][v] += a * c[v];
    }
  }
}

// Copies a warp's coefficients to the table for the sums over rows.
template <class T>
__device__ inline void keep_coefficients(const ProjectTable& table, int64_t layer, int64_t row,
                                         int64_t num_rows, int64_t S, int lane,
                                         const Acc<T>* coefficients) {
  if (table.coefficients == nullptr) return;
  Acc<T>* to = static_cast<Acc<T>*>(table.coefficients) + (table.first_row[layer] + row) * S;
  for (int64_t i = lane; i < num_rows * S; i += 32) to[i] = coefficients[(i % S) * kRows + i / S];
}

struct WarpRows {
  int64_t layer, row, count;
};

__device__ inline WarpRows rows_of_warp(const ProjectTable& table, int64_t rows_per_block) {
  const int64_t layer = table.blocks[2 * blockIdx.x];
  const int64_t row = table.blocks[2 * blockIdx.x + 1] + int64_t(threadIdx.x / 32) * kRows;
  const int64_t end = table.blocks[2 * blockIdx.x + 1] + rows_per_block;
  const int64_t left = (end < table.rows[layer] ? end : table.rows[layer]) - row;
  return {layer, row, left < kRows ? left : kRows};
}

// Shared memory: [warps, S, kRows] accumulators.
template <class T>
__global__ void __launch_bounds__(kMaxWarps * 32, kBlocksPerSm<T>)
    projected_merge_fwd_kernel(ProjectTable table, int64_t num_layers, int num_concepts, int64_t d,
                               int64_t rows_per_block) {
  extern __shared__ double shared[];
  const int lane = threadIdx.x % 32;
  const int64_t S = table.first_token[num_concepts];
  Acc<T>* coefficients = reinterpret_cast<Acc<T>*>(shared) + (threadIdx.x / 32) * S * kRows;
  const WarpRows at = rows_of_warp(table, rows_per_block);
  if (at.count <= 0) return;
  const DeviceMatrix W0 = table.W0[at.layer];
  for (int n = 0; n < num_concepts; ++n) {
    const int64_t first = table.first_token[n];
    dot_rows<T>(table.W[n * num_layers + at.layer], &W0, at.row, at.count, table.C[n],
                static_cast<int>(table.first_token[n + 1] - first), d, lane,
                coefficients + first * kRows);
  }
  keep_coefficients<T>(table, at.layer, at.row, at.count, S, lane, coefficients);
  if (table.out == nullptr) return;
  const DeviceMatrix out = table.out[at.layer];
  for (int64_t k = int64_t(lane) * kVec<T>; k < d; k += 32 * kVec<T>) {
    Acc<T> x[kRows][kVec<T>];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int64_t from = at.row + (r < at.count ? r : at.count - 1);
      load(row_of<const T>(W0, from) + k, x[r]);
    }
    for (int n = 0; n < num_concepts; ++n) {
      const int64_t first = table.first_token[n];
      expand<T>(coefficients + first * kRows, table.M[n],
                static_cast<int>(table.first_token[n + 1] - first), k, x);
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r)
      if (r < at.count) store(row_of<T>(out, at.row + r) + k, x[r]);
  }
}

// d_W_n = (d_out M_n^T) C_n, d_W0 = d_out - sum_n d_W_n.
template <class T>
__global__ void __launch_bounds__(kMaxWarps * 32, kBlocksPerSm<T>)
    projected_merge_bwd_kernel(ProjectTable table, int64_t num_layers, int num_concepts, int64_t d,
                               int64_t rows_per_block) {
  extern __shared__ double shared[];
  const int lane = threadIdx.x % 32;
  const int64_t S = table.first_token[num_concepts];
  Acc<T>* coefficients = reinterpret_cast<Acc<T>*>(shared) + (threadIdx.x / 32) * S * kRows;
  const WarpRows at = rows_of_warp(table, rows_per_block);
  if (at.count <= 0) return;
  const DeviceMatrix d_out = table.d_out[at.layer];
  for (int n = 0; n < num_concepts; ++n) {
    const int64_t first = table.first_token[n];
    dot_rows<T>(d_out, nullptr, at.row, at.count, table.M[n],
                static_cast<int>(table.first_token[n + 1] - first), d, lane,
                coefficients + first * kRows);
  }
  keep_coefficients<T>(table, at.layer, at.row, at.count, S, lane, coefficients);
  if (table.d_W == nullptr && table.d_W0 == nullptr) return;
  for (int64_t k = int64_t(lane) * kVec<T>; k < d; k += 32 * kVec<T>) {
    Acc<T> rest[kRows][kVec<T>];
    if (table.d_W0 != nullptr) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const int64_t from = at.row + (r < at.count ? r : at.count - 1);
        load(row_of<const T>(d_out, from) + k, rest[r]);
      }
    }
    for (int n = 0; n < num_concepts; ++n) {
      const int64_t first = table.first_token[n];
      Acc<T> x[kRows][kVec<T>];
#pragma unroll
      for (int r = 0; r < kRows; ++r)
#pragma unroll
        for (int v = 0; v < kVec<T>; ++v) x[r][v] = 0;
      expand<T>(coefficients + first * kRows, table.C[n],
                static_cast<int>(table.first_token[n + 1] - first), k, x);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        if (table.d_W != nullptr && r < at.count) {
          const DeviceMatrix d_W = table.d_W[n * num_layers + at.layer];
          store(row_of<T>(d_W, at.row + r) + k, x[r]);
        }
#pragma unroll
        for (int v = 0; v < kVec<T>; ++v) rest[r][v] -= x[r][v];
      }
    }
    if (table.d_W0 == nullptr) continue;
    const DeviceMatrix d_W0 = table.d_W0[at.layer];
#pragma unroll
    for (int r = 0; r < kRows; ++r)
      if (r < at.count) store(row_of<T>(d_W0, at.row + r) + k, rest[r]);
  }
}

constexpr int kSumThreads = 128;
constexpr int kSumTokens = 8;

// partial[chunk, token, k] = sum over the rows of a chunk of coefficients[row, token] X[row, k],
// where X = W_n - W0 (d_C) or, with W null, d_out (d_M). Threads share the columns, blockIdx.y is
// the tile of columns, blockIdx.z a tile of kSumTokens tokens of one concept (`tiles` [*, 2]:
// concept, first token of all). `chunks` [*, 3]: layer, first row, number of rows.
template <class T>
__global__ void __launch_bounds__(kSumThreads)
    projected_merge_sums_kernel(ProjectTable table, const int64_t* chunks, const int64_t* tiles,
                                bool differences, int64_t num_layers, int num_concepts, int64_t d,
                                Acc<T>* partial) {
  const int64_t layer = chunks[3 * blockIdx.x];
  const int64_t start = chunks[3 * blockIdx.x + 1];
  const int64_t count = chunks[3 * blockIdx.x + 2];
  const int64_t concept_ = tiles[2 * blockIdx.z];
  const int64_t token = tiles[2 * blockIdx.z + 1];
  const int64_t left = table.first_token[concept_ + 1] - token;
  const int num_tokens = static_cast<int>(left < kSumTokens ? left : kSumTokens);
  const int64_t S = table.first_token[num_concepts];
  const int64_t k = int64_t(blockIdx.y) * kSumThreads + threadIdx.x;
  if (k >= d) return;
  const DeviceMatrix X = differences ? table.W[concept_ * num_layers + layer] : table.d_out[layer];
  const Acc<T>* coefficients =
      static_cast<const Acc<T>*>(table.coefficients) + (table.first_row[layer] + start) * S + token;
  Acc<T> sums[kSumTokens];
#pragma unroll
  for (int t = 0; t < kSumTokens; ++t) sums[t] = 0;
  for (int64_t i = 0; i < count; ++i) {
    Acc<T> x = widen(row_of<const T>(X, start + i)[k]);
    if (differences) x -= widen(row_of<const T>(table.W0[layer], start + i)[k]);
#pragma unroll
    for (int t = 0; t < kSumTokens; ++t)
      if (t < num_tokens) sums[t] += coefficients[i * S + t] * x;
  }
#pragma unroll
  for (int t = 0; t < kSumTokens; ++t)
    if (t < num_tokens) partial[(int64_t(blockIdx.x) * S + token + t) * d + k] = sums[t];
}

}  // namespace cuda
}  // namespace mima
