// The bodies behind kernels.h. Included by kernels_<level>.cpp once it has set the target; simd.h
// says why everything is in an anonymous namespace.

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

template <class T>
void load_rows(const void* src, int64_t ld_src, int64_t rows, int64_t cols, void* dst,
               int64_t ld_dst) {
  using Acc = typename Traits<T>::Acc;
  for (int64_t i = 0; i < rows; ++i) {
    const T* from = static_cast<const T*>(src) + i * ld_src;
    Acc* to = static_cast<Acc*>(dst) + i * ld_dst;
    int64_t j = 0;
    for (; j + kLanes<T> <= cols; j += kLanes<T>) store(to + j, load(from + j));
    if (j < cols) store(to + j, load_part(from + j, cols - j));
  }
}

template <class T>
void load_difference_rows(const void* src, int64_t ld_src, const void* base, int64_t ld_base,
                          int64_t rows, int64_t cols, void* dst, int64_t ld_dst) {
  using Acc = typename Traits<T>::Acc;
  for (int64_t i = 0; i < rows; ++i) {
    const T* from = static_cast<const T*>(src) + i * ld_src;
    const T* less = static_cast<const T*>(base) + i * ld_base;
    Acc* to = static_cast<Acc*>(dst) + i * ld_dst;
    int64_t j = 0;
    for (; j + kLanes<T> <= cols; j += kLanes<T>) store(to + j, load(from + j) - load(less + j));
    if (j < cols) store(to + j, load_part(from + j, cols - j) - load_part(less + j, cols - j));
  }
}

template <class T>
void add_rows(const void* src, int64_t ld_src, int64_t rows, int64_t cols, void* dst,
              int64_t ld_dst) {
  using Acc = typename Traits<T>::Acc;
  for (int64_t i = 0; i < rows; ++i) {
    const Acc* from = static_cast<const Acc*>(src) + i * ld_src;
    T* to = static_cast<T*>(dst) + i * ld_dst;
    int64_t j = 0;
    for (; j + kLanes<T> <= cols; j += kLanes<T>) store(to + j, load(to + j) + load(from + j));
    if (j < cols) store_part(to + j, load_part(to + j, cols - j) + load(from + j), cols - j);
  }
}

// Four vectors at a time keep enough loads in flight to reach the memory's bandwidth.
constexpr int kUnroll = 4;

template <class T>
bool may_stream(const void* p) {
  return reinterpret_cast<uintptr_t>(p) % (kLanes<T> * sizeof(T)) == 0;
}

template <class T, bool STREAM>
MIMA_INLINE void store_row(const typename Traits<T>::Acc* from, int64_t cols, T* to) {
  int64_t j = 0;
  for (; j + kLanes<T> <= cols; j += kLanes<T>) store_or_stream<STREAM>(to + j, load(from + j));
  if (j < cols) store_part(to + j, load(from + j), cols - j);
}

template <class T, bool STREAM>
void store_rows(const void* src, int64_t ld_src, int64_t rows, int64_t cols, void* dst,
                int64_t ld_dst) {
  using Acc = typename Traits<T>::Acc;
  for (int64_t i = 0; i < rows; ++i) {
    const Acc* from = static_cast<const Acc*>(src) + i * ld_src;
    T* to = static_cast<T*>(dst) + i * ld_dst;
    if (STREAM && may_stream<T>(to))
      store_row<T, true>(from, cols, to);
    else
      store_row<T, false>(from, cols, to);
  }
  if (STREAM) fence();
}

template <class T, bool STREAM>
void merge_run(T* to, const T* from, const void* const* thetas, const double* weights,
               int64_t num_concepts, int64_t size) {
  using Vec = typename Traits<T>::Vec;
  using Acc = typename Traits<T>::Acc;
  int64_t i = 0;
  for (; i + kUnroll * kLanes<T> <= size; i += kUnroll * kLanes<T>) {
    Vec b[kUnroll], total[kUnroll];
#pragma GCC unroll 4
    for (int u = 0; u < kUnroll; ++u) {
      b[u] = load(from + i + u * kLanes<T>);
      total[u] = Vec{};
    }
    for (int64_t n = 0; n < num_concepts; ++n) {
      const T* theta = static_cast<const T*>(thetas[n]) + i;
      const Vec w = broadcast<Vec>(static_cast<Acc>(weights[n]));
#pragma GCC unroll 4
      for (int u = 0; u < kUnroll; ++u) total[u] += w * (load(theta + u * kLanes<T>) - b[u]);
    }
#pragma GCC unroll 4
    for (int u = 0; u < kUnroll; ++u)
      store_or_stream<STREAM>(to + i + u * kLanes<T>, b[u] + total[u]);
  }
  for (; i < size; i += kLanes<T>) {
    const int64_t count = size - i < kLanes<T> ? size - i : kLanes<T>;
    const Vec b = load_part(from + i, count);
    Vec total = {};
    for (int64_t n = 0; n < num_concepts; ++n)
      total += static_cast<Acc>(weights[n]) *
               (load_part(static_cast<const T*>(thetas[n]) + i, count) - b);
    store_part(to + i, b + total, count);
  }
  if (STREAM) fence();
}

template <class T>
void merge(void* out, const void* base, const void* const* thetas, const double* weights,
           int64_t num_concepts, int64_t size, bool stream) {
  const auto run = stream && may_stream<T>(out) ? merge_run<T, true> : merge_run<T, false>;
  run(static_cast<T*>(out), static_cast<const T*>(base), thetas, weights, num_concepts, size);
}

// to = factor * from
template <class T, bool STREAM>
MIMA_INLINE void scale_run(const T* from, typename Traits<T>::Acc factor, T* to, int64_t size) {
  int64_t i = 0;
  for (; i + kLanes<T> <= size; i += kLanes<T>)
    store_or_stream<STREAM>(to + i, factor * load(from + i));
  if (i < size) store_part(to + i, factor * load_part(from + i, size - i), size - i);
}

// <upstream, theta - base>, and to = w * upstream where `to` is not null.
template <class T, bool STREAM>
MIMA_INLINE typename Traits<T>::Acc dot_run(const T* upstream, const T* theta, const T* base,
                                            typename Traits<T>::Acc w, T* to, int64_t size) {
  using Vec = typename Traits<T>::Vec;
  Vec total[kUnroll] = {};
  int64_t i = 0;
  for (; i + kUnroll * kLanes<T> <= size; i += kUnroll * kLanes<T>) {
#pragma GCC unroll 4
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t at = i + u * kLanes<T>;
      const Vec g = load(upstream + at);
      total[u] += g * (load(theta + at) - load(base + at));
      if (to != nullptr) store_or_stream<STREAM>(to + at, w * g);
    }
  }
  for (; i < size; i += kLanes<T>) {
    const int64_t count = size - i < kLanes<T> ? size - i : kLanes<T>;
    const Vec g = load_part(upstream + i, count);
    total[0] += g * (load_part(theta + i, count) - load_part(base + i, count));
    if (to != nullptr) store_part(to + i, w * g, count);
  }
  return sum((total[0] + total[1]) + (total[2] + total[3]));
}

template <class T, bool STREAM>
void merge_backward_run(const T* upstream, const T* base, const void* const* thetas,
                        const double* weights, int64_t num_concepts, int64_t size, T* d_base,
                        void* const* d_thetas, double* d_weights) {
  using Acc = typename Traits<T>::Acc;
  double rest = 1;
  for (int64_t n = 0; n < num_concepts; ++n) rest -= weights[n];
  // one concept at a time over pieces that stay in the first-level cache
  constexpr int64_t kPiece = 2048;
  for (int64_t at = 0; at < size; at += kPiece) {
    const int64_t count = size - at < kPiece ? size - at : kPiece;
    if (d_base != nullptr)
      scale_run<T, STREAM>(upstream + at, static_cast<Acc>(rest), d_base + at, count);
    for (int64_t n = 0; n < num_concepts; ++n) {
      const Acc w = static_cast<Acc>(weights[n]);
      T* to = d_thetas == nullptr ? nullptr : static_cast<T*>(d_thetas[n]) + at;
      if (d_weights != nullptr)
        // pieces are summed in double: a model has 10^9 terms
        d_weights[n] += static_cast<double>(dot_run<T, STREAM>(
            upstream + at, static_cast<const T*>(thetas[n]) + at, base + at, w, to, count));
      else if (to != nullptr)
        scale_run<T, STREAM>(upstream + at, w, to, count);
    }
  }
  if (STREAM) fence();
}

template <class T>
void merge_backward(const void* d_out, const void* base, const void* const* thetas,
                    const double* weights, int64_t num_concepts, int64_t size, void* d_base,
                    void* const* d_thetas, double* d_weights, bool stream) {
  stream = stream && may_stream<T>(d_base);
  for (int64_t n = 0; n < num_concepts && d_thetas != nullptr; ++n)
    stream = stream && may_stream<T>(d_thetas[n]);
  const auto run = stream ? merge_backward_run<T, true> : merge_backward_run<T, false>;
  run(static_cast<const T*>(d_out), static_cast<const T*>(base), thetas, weights, num_concepts,
      size, static_cast<T*>(d_base), d_thetas, d_weights);
}

// A rule's numbers in the accumulator type.
template <class T>
struct Adam {
  using Vec = typename Traits<T>::Vec;
  using Acc = typename Traits<T>::Acc;
  Acc step, keep, beta1, rest1, beta2, rest2, eps, inverse2;

  explicit Adam(const AdamRule& rule)
      : step(static_cast<Acc>(rule.step)),
        keep(static_cast<Acc>(rule.keep)),
        beta1(static_cast<Acc>(rule.beta1)),
        rest1(static_cast<Acc>(rule.rest1)),
        beta2(static_cast<Acc>(rule.beta2)),
        rest2(static_cast<Acc>(rule.rest2)),
        eps(static_cast<Acc>(rule.eps)),
        inverse2(static_cast<Acc>(1 / rule.correction2)) {}

  MIMA_INLINE Vec first(Vec g, Vec m) const { return beta1 * m + rest1 * g; }
  MIMA_INLINE Vec second(Vec g, Vec v) const { return beta2 * v + rest2 * g * g; }
  MIMA_INLINE Vec root(Vec v) const {
    const Vec corrected = inverse2 * v;
    return square_root(corrected > Vec{} ? corrected : Vec{});
  }

  // in and out as StorageKernels::adam has them
  MIMA_INLINE void forward(const Vec in[4], Vec out[3]) const {
    out[1] = first(in[1], in[2]);
    out[2] = second(in[1], in[3]);
    out[0] = keep * in[0] - step * out[1] / (root(out[2]) + eps);
  }

  // in and out as StorageKernels::adam_backward has them
  MIMA_INLINE void backward(const Vec in[6], Vec out[4]) const {
    const Vec bar_z = in[0], g = in[3], m = first(g, in[4]), v = second(g, in[5]);
    const Vec r = root(v), inverse = Acc(1) / (r + eps);
    const Vec slope = step * bar_z * inverse;
    const Vec bar_m = in[1] - slope;
    // the root has slope 0 at 0
    const Vec through_root = slope * m * inverse * (inverse2 / 2) / (r > Vec{} ? r : Vec{} + 1);
    const Vec bar_v = in[2] + (r > Vec{} ? through_root : Vec{});
    out[0] = keep * bar_z;
    out[1] = rest1 * bar_m + 2 * rest2 * g * bar_v;
    out[2] = beta1 * bar_m;
    out[3] = beta2 * bar_v;
  }
};

// out[size] = f(in[size]), vector by vector; an `out` that is null is not needed.
template <class T, bool STREAM, int IN, int OUT, class F>
MIMA_INLINE void map_run(const void* const* in, void* const* out, int64_t size, const F& f) {
  using Vec = typename Traits<T>::Vec;
  Vec given[IN], made[OUT];
  int64_t i = 0;
  for (; i + kLanes<T> <= size; i += kLanes<T>) {
#pragma GCC unroll 6
    for (int k = 0; k < IN; ++k) given[k] = load(static_cast<const T*>(in[k]) + i);
    f(given, made);
#pragma GCC unroll 4
    for (int k = 0; k < OUT; ++k)
      if (out[k] != nullptr) store_or_stream<STREAM>(static_cast<T*>(out[k]) + i, made[k]);
  }
  if (i < size) {
    for (int k = 0; k < IN; ++k) given[k] = load_part(static_cast<const T*>(in[k]) + i, size - i);
    f(given, made);
    for (int k = 0; k < OUT; ++k)
      if (out[k] != nullptr) store_part(static_cast<T*>(out[k]) + i, made[k], size - i);
  }
  if (STREAM) fence();
}

template <class T, int OUT>
bool may_stream_all(void* const* out) {
  for (int k = 0; k < OUT; ++k)
    if (!may_stream<T>(out[k])) return false;
  return true;
}

template <class T>
void adam(const AdamRule& rule, const void* const in[4], void* const out[3], int64_t size,
          bool stream) {
  using Vec = typename Traits<T>::Vec;
  const Adam<T> numbers(rule);
  const auto f = [&](const Vec* given, Vec* made)
                     __attribute__((always_inline)) { numbers.forward(given, made); };
  if (stream && may_stream_all<T, 3>(out))
    map_run<T, true, 4, 3>(in, out, size, f);
  else
    map_run<T, false, 4, 3>(in, out, size, f);
}

template <class T>
void adam_backward(const AdamRule& rule, const void* const in[6], void* const out[4], int64_t size,
                   bool stream) {
  using Vec = typename Traits<T>::Vec;
  const Adam<T> numbers(rule);
  const auto f = [&](const Vec* given, Vec* made)
                     __attribute__((always_inline)) { numbers.backward(given, made); };
  if (stream && may_stream_all<T, 4>(out))
    map_run<T, true, 6, 4>(in, out, size, f);
  else
    map_run<T, false, 6, 4>(in, out, size, f);
}

template <class T, bool STREAM, int IN, int OUT>
MIMA_INLINE void combine_run(const double* factors, const void* const* in, void* const* out,
                             int64_t size) {
  using Vec = typename Traits<T>::Vec;
  using Acc = typename Traits<T>::Acc;
  Acc factor[OUT][IN];
  for (int i = 0; i < OUT; ++i)
    for (int j = 0; j < IN; ++j) factor[i][j] = static_cast<Acc>(factors[i * IN + j]);
  map_run<T, STREAM, IN, OUT>(in, out, size,
                              [&](const Vec* given, Vec* made) __attribute__((always_inline)) {
#pragma GCC unroll 3
                                for (int i = 0; i < OUT; ++i) {
                                  Vec sum{};
#pragma GCC unroll 3
                                  for (int j = 0; j < IN; ++j)
                                    // infinity times 0 would be NaN
                                    if (factor[i][j] != 0) sum += factor[i][j] * given[j];
                                  made[i] = sum;
                                }
                              });
}

template <class T, int IN, int OUT>
void combine_of(const double* factors, const void* const* in, void* const* out, int64_t size,
                bool stream) {
  if (stream && may_stream_all<T, OUT>(out))
    combine_run<T, true, IN, OUT>(factors, in, out, size);
  else
    combine_run<T, false, IN, OUT>(factors, in, out, size);
}

template <class T>
void combine(const double* factors, int num_in, int num_out, const void* const* in,
             void* const* out, int64_t size, bool stream) {
  static_assert(CombineParams::kMost == 3);
  using Run = void (*)(const double*, const void* const*, void* const*, int64_t, bool);
  static constexpr Run kRuns[3][3] = {
      {combine_of<T, 1, 1>, combine_of<T, 1, 2>, combine_of<T, 1, 3>},
      {combine_of<T, 2, 1>, combine_of<T, 2, 2>, combine_of<T, 2, 3>},
      {combine_of<T, 3, 1>, combine_of<T, 3, 2>, combine_of<T, 3, 3>}};
  kRuns[num_in - 1][num_out - 1](factors, in, out, size, stream);
}

}  // namespace
}  // namespace mima

#include "cpu/layers_impl.h"

namespace mima {
namespace {

template <class T>
constexpr BlockKernels<T> kBlock = {gemm_nt<T>,
                                    gemm_nn<T>,
                                    gemm_panels<T>,
                                    pack_panel<T>,
                                    sum_runs<T>,
                                    softmax_rows<T>,
                                    softmax_backward_rows<T>,
                                    softmax_double_backward_rows<T>,
                                    kPanelVecs * kLanes<T>};

template <class T>
constexpr StorageKernels kStorage = {load_rows<T>,
                                     load_difference_rows<T>,
                                     store_rows<T, false>,
                                     store_rows<T, true>,
                                     add_rows<T>,
                                     merge<T>,
                                     merge_backward<T>,
                                     combine<T>,
                                     adam<T>,
                                     adam_backward<T>,
                                     norm<T>,
                                     norm_backward<T>,
                                     norm_double_backward<T>,
                                     geglu<T>,
                                     geglu_backward<T>,
                                     geglu_double_backward<T>};

}  // namespace

extern const Kernels MIMA_KERNELS = {
    MIMA_VECTOR_BYTES,
    kBlock<float>,
    kBlock<double>,
    {kStorage<float>, kStorage<double>, kStorage<BFloat16>, kStorage<Float16>}};

}  // namespace mima
