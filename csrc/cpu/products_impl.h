// The bodies behind kernels.h for products of matrices, in tiles of registers: along rows, or from
// packed panels. Included by kernels_impl.h.
#pragma once

#include "cpu/simd.h"

namespace mima {
namespace {

// Rows of a that one tile keeps in registers: 4 x 4 accumulators, and operands, fill 32 registers
// well; 16 registers hold 2 x 4.
constexpr int kTileRows = MIMA_VECTOR_REGISTERS >= 32 ? 4 : 2;
constexpr int kTileCols = 4;

// One step's share.
MIMA_INLINE void fetch(Ahead* ahead) {
  if (ahead == nullptr) return;
  for (int i = 0; i < ahead->lines_per_step && ahead->row != ahead->end; ++i) {
    __builtin_prefetch(*ahead->row + ahead->fetched, 0, 2);
    ahead->fetched += 64;
    if (ahead->fetched < ahead->bytes) continue;
    ahead->fetched = 0;
    ++ahead->row;
  }
}

// c[ROWS, COLS] = a[ROWS, k] b[COLS, k]^T: one accumulator vector per element, along k.
template <class T, int ROWS, int COLS>
MIMA_INLINE void nt_tile(const T* a, int64_t lda, const T* b, int64_t ldb, T* c, int64_t ldc,
                         int64_t k, Ahead* ahead) {
  using Vec = typename Traits<T>::Vec;
  Vec total[ROWS][COLS] = {};
  for (int64_t p = 0; p < k; p += kLanes<T>) {
    fetch(ahead);
    Vec a_p[ROWS];
#pragma GCC unroll 4
    for (int i = 0; i < ROWS; ++i) a_p[i] = load(a + i * lda + p);
#pragma GCC unroll 4
    for (int j = 0; j < COLS; ++j) {
      const Vec b_p = load(b + j * ldb + p);
#pragma GCC unroll 4
      for (int i = 0; i < ROWS; ++i) total[i][j] += a_p[i] * b_p;
    }
  }
  if constexpr (ROWS * COLS % kLanes<T> == 0) {
    T sums[ROWS * COLS];
#pragma GCC unroll 4
    for (int first = 0; first < ROWS * COLS; first += kLanes<T>)
      store(sums + first, sum_each<T>(&total[0][0] + first));
    for (int i = 0; i < ROWS; ++i)
      for (int j = 0; j < COLS; ++j) c[i * ldc + j] = sums[i * COLS + j];
    return;
  }
#pragma GCC unroll 4
  for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < COLS; ++j) c[i * ldc + j] = sum(total[i][j]);
}

template <class T, int COLS>
void nt_columns(const T* a, int64_t lda, const T* b, int64_t ldb, T* c, int64_t ldc, int64_t m,
                int64_t k, Ahead* ahead) {
  int64_t i = 0;
  for (; i + kTileRows <= m; i += kTileRows)
    nt_tile<T, kTileRows, COLS>(a + i * lda, lda, b, ldb, c + i * ldc, ldc, k, ahead);
  for (; i < m; ++i) nt_tile<T, 1, COLS>(a + i * lda, lda, b, ldb, c + i * ldc, ldc, k, ahead);
}

template <class T>
void gemm_nt(const T* a, int64_t lda, const T* b, int64_t ldb, T* c, int64_t ldc, int64_t m,
             int64_t n, int64_t k, Ahead* ahead) {
  // columns outside: kTileCols rows of b stay in the first-level cache while a passes
  int64_t j = 0;
  for (; j + kTileCols <= n; j += kTileCols)
    nt_columns<T, kTileCols>(a, lda, b + j * ldb, ldb, c + j, ldc, m, k, ahead);
  switch (n - j) {
    case 3:
      return nt_columns<T, 3>(a, lda, b + j * ldb, ldb, c + j, ldc, m, k, ahead);
    case 2:
      return nt_columns<T, 2>(a, lda, b + j * ldb, ldb, c + j, ldc, m, k, ahead);
    case 1:
      return nt_columns<T, 1>(a, lda, b + j * ldb, ldb, c + j, ldc, m, k, ahead);
  }
}

// c[ROWS, VECS lanes] (+)= a b: elements of a broadcast against rows of b.
template <class T, int ROWS, int VECS>
MIMA_INLINE void nn_tile(const T* a, int64_t stride_am, int64_t stride_ak, const T* b, int64_t ldb,
                         T* c, int64_t ldc, int64_t k, bool accumulate, Ahead* ahead) {
  using Vec = typename Traits<T>::Vec;
  Vec total[ROWS][VECS] = {};
  if (accumulate) {
#pragma GCC unroll 4
    for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 4
      for (int v = 0; v < VECS; ++v) total[i][v] = load(c + i * ldc + v * kLanes<T>);
  }
  for (int64_t p = 0; p < k; ++p) {
    fetch(ahead);
    Vec b_p[VECS];
#pragma GCC unroll 4
    for (int v = 0; v < VECS; ++v) b_p[v] = load(b + p * ldb + v * kLanes<T>);
#pragma GCC unroll 4
    for (int i = 0; i < ROWS; ++i) {
      const Vec a_ip = broadcast<Vec>(a[i * stride_am + p * stride_ak]);
#pragma GCC unroll 4
      for (int v = 0; v < VECS; ++v) total[i][v] += a_ip * b_p[v];
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < VECS; ++v) store(c + i * ldc + v * kLanes<T>, total[i][v]);
}

template <class T, int VECS>
void nn_columns(const T* a, int64_t stride_am, int64_t stride_ak, const T* b, int64_t ldb, T* c,
                int64_t ldc, int64_t m, int64_t k, bool accumulate, Ahead* ahead) {
  int64_t i = 0;
  for (; i + kTileRows <= m; i += kTileRows)
    nn_tile<T, kTileRows, VECS>(a + i * stride_am, stride_am, stride_ak, b, ldb, c + i * ldc, ldc,
                                k, accumulate, ahead);
  for (; i < m; ++i)
    nn_tile<T, 1, VECS>(a + i * stride_am, stride_am, stride_ak, b, ldb, c + i * ldc, ldc, k,
                        accumulate, ahead);
}

template <class T>
void gemm_nn(const T* a, int64_t stride_am, int64_t stride_ak, const T* b, int64_t ldb, T* c,
             int64_t ldc, int64_t m, int64_t n, int64_t k, bool accumulate, Ahead* ahead) {
  int64_t j = 0;
  for (; j + kTileCols * kLanes<T> <= n; j += kTileCols * kLanes<T>)
    nn_columns<T, kTileCols>(a, stride_am, stride_ak, b + j, ldb, c + j, ldc, m, k, accumulate,
                             ahead);
  for (; j < n; j += kLanes<T>)
    nn_columns<T, 1>(a, stride_am, stride_ak, b + j, ldb, c + j, ldc, m, k, accumulate, ahead);
}

// A whole product from packed panels, at the rate of the multiply-add units: 6 x 4 accumulators, 4
// vectors of a panel and one broadcast element fill 32 registers, 6 x 2 fill 16. Panels are read in
// order, which the prefetchers follow, so k needs no blocking: a panel need not fit the first-level
// cache.
constexpr int kPanelRows = 6;
constexpr int kPanelVecs = MIMA_VECTOR_REGISTERS >= 32 ? 4 : 2;

// Elements of a panel whose next one is worth fetching ahead.
constexpr int64_t kFetchedPanel = 16 << 10;

// c[ROWS, cols], VECS - 1 < cols / lanes <= VECS, from one panel of each term. Of the first term's
// next panel, part `strip` of `strips` is fetched meanwhile: large matrices come from the
// third-level cache, and the first strip would wait for them. No strips: there is no next panel.
template <class T, int ROWS, int VECS>
void panel_tile(const PanelTerm<T>* terms, int num_terms, int64_t row, int64_t panel, T* c,
                int64_t ldc, int64_t width, int64_t cols, bool accumulate, int64_t strip,
                int64_t strips) {
  using Vec = typename Traits<T>::Vec;
  const int64_t last = cols - (VECS - 1) * kLanes<T>;  // columns of the last vector
  Vec total[ROWS][VECS] = {};
  if (accumulate) {
#pragma GCC unroll 6
    for (int i = 0; i < ROWS; ++i) {
      T* c_i = c + i * ldc;
#pragma GCC unroll 4
      for (int v = 0; v + 1 < VECS; ++v) total[i][v] = load(c_i + v * kLanes<T>);
      T* c_last = c_i + (VECS - 1) * kLanes<T>;
      total[i][VECS - 1] = last == kLanes<T> ? load(c_last) : load_part(c_last, last);
    }
  }
  for (int term = 0; term < num_terms; ++term) {
    const int64_t lda = terms[term].lda, k = terms[term].k;
    const T* a = terms[term].a + row * lda;
    const T* b = terms[term].panels + panel * k * width;
    const bool fetches = term == 0 && strips > 0 && k * width >= kFetchedPanel;
    const int64_t fetched = fetches ? width / strips : 0;
    const T* next = fetches ? b + k * width + strip * k * fetched : b;
    int64_t p = 0;
    for (int part = 1; part <= ROWS; ++part) {
      // a row of c at a time, spread over the product: written all at once, they would take the
      // buffers through which the panels come
      if (term == 0)
#pragma GCC unroll 4
        for (int v = 0; v < VECS; ++v)
          __builtin_prefetch(c + (part - 1) * ldc + v * kLanes<T>, 1, 3);
      for (const int64_t end = k * part / ROWS; p < end; ++p) {
        __builtin_prefetch(next + p * fetched, 0, 2);
        Vec b_p[VECS];
#pragma GCC unroll 4
        for (int v = 0; v < VECS; ++v) b_p[v] = load(b + p * width + v * kLanes<T>);
#pragma GCC unroll 6
        for (int i = 0; i < ROWS; ++i) {
          const Vec a_ip = broadcast<Vec>(a[i * lda + p]);
#pragma GCC unroll 4
          for (int v = 0; v < VECS; ++v) total[i][v] += a_ip * b_p[v];
        }
      }
    }
  }
#pragma GCC unroll 6
  for (int i = 0; i < ROWS; ++i) {
    T* c_i = c + i * ldc;
#pragma GCC unroll 4
    for (int v = 0; v + 1 < VECS; ++v) store(c_i + v * kLanes<T>, total[i][v]);
    T* c_last = c_i + (VECS - 1) * kLanes<T>;
    if (last == kLanes<T>)
      store(c_last, total[i][VECS - 1]);
    else
      store_part(c_last, total[i][VECS - 1], last);
  }
}

template <class T>
using PanelTile = void (*)(const PanelTerm<T>* terms, int num_terms, int64_t row, int64_t panel,
                           T* c, int64_t ldc, int64_t width, int64_t cols, bool accumulate,
                           int64_t strip, int64_t strips);

// By number of vectors and rows, both counted from one.
template <class T>
constexpr PanelTile<T> kPanelTiles[kPanelVecs][kPanelRows] = {
#define MIMA_TILES(VECS)                                                   \
  {panel_tile<T, 1, VECS>, panel_tile<T, 2, VECS>, panel_tile<T, 3, VECS>, \
   panel_tile<T, 4, VECS>, panel_tile<T, 5, VECS>, panel_tile<T, 6, VECS>}
    MIMA_TILES(1),
    MIMA_TILES(2),
#if MIMA_VECTOR_REGISTERS >= 32
    MIMA_TILES(3),
    MIMA_TILES(4),
#endif
#undef MIMA_TILES
};

template <class T>
void gemm_panels(const PanelTerm<T>* terms, int num_terms, T* c, int64_t ldc, int64_t m, int64_t n,
                 bool accumulate) {
  constexpr int64_t kWidest = kPanelVecs * kLanes<T>;
  const int64_t vectors = (n + kLanes<T> - 1) / kLanes<T>;
  const int64_t width = n < kWidest ? vectors * kLanes<T> : kWidest;
  for (int64_t j = 0; j < n; j += width) {
    const int64_t cols = n - j < width ? n - j : width;
    const PanelTile<T>* tiles = kPanelTiles<T>[(cols - 1) / kLanes<T>];
    // strips as even as can be: a last one of a single row would take as long as four rows
    const int64_t strips = (m + kPanelRows - 1) / kPanelRows;
    int64_t i = 0;
    for (int64_t strip = 0; strip < strips; ++strip) {
      const int64_t rows = (m - i + strips - strip - 1) / (strips - strip);
      tiles[rows - 1](terms, num_terms, i, j / width, c + i * ldc + j, ldc, width, cols, accumulate,
                      strip, j + width < n ? strips : 0);
      i += rows;
    }
  }
}

template <class T>
void pack_panel(const T* b, int64_t stride_k, int64_t stride_n, int64_t k, int64_t n, T factor,
                int64_t width, int64_t j, T* panels) {
  T* to = panels + j * k * width;
  const int64_t first = j * width, cols = n - first < width ? n - first : width;
  if (cols < width)
    for (int64_t i = 0; i < k * width; ++i) to[i] = 0;
  if (stride_n == 1) {
    for (int64_t p = 0; p < k; ++p)
      for (int64_t c = 0; c < cols; ++c) to[p * width + c] = factor * b[p * stride_k + first + c];
    return;
  }
  // a transposition, in squares of vectors
  constexpr int64_t kSide = kLanes<T>;
  const int64_t whole = k / kSide * kSide;
  for (int64_t c = 0; c < cols; c += kSide) {
    const T* from = b + (first + c) * stride_n;
    T* const into = to + c;
    const int64_t rows = cols - c < kSide ? cols - c : kSide;
    for (int64_t p = 0; p < whole; p += kSide) {
      typename Traits<T>::Vec square[kSide];
#pragma GCC unroll 16
      for (int64_t i = 0; i < kSide; ++i)
        square[i] = i < rows ? load(from + i * stride_n + p) : typename Traits<T>::Vec{};
      transpose<T>(square);
#pragma GCC unroll 16
      for (int64_t i = 0; i < kSide; ++i) store(into + (p + i) * width, factor * square[i]);
    }
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t p = whole; p < k; ++p) into[p * width + i] = factor * from[i * stride_n + p];
  }
}

template <class T>
void sum_runs(const T* runs, int64_t count, int64_t stride, int64_t size, T factor, T* total) {
  for (int64_t j = 0; j < size; j += kLanes<T>) {
    typename Traits<T>::Vec sum = load(runs + j);
    for (int64_t i = 1; i < count; ++i) sum += load(runs + i * stride + j);
    store(total + j, factor * sum);
  }
}

}  // namespace
}  // namespace mima
