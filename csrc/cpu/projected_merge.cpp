// projected_merge, and its halves for one concept at a time: blocks of rows. Each block of W0 and
// of every W_n is read from memory once; its coefficients A_n = (W_n - W0) C_n^T and its result
// stay in the caches beside the packed C and M.
#include "cpu/blocks.h"
#include "cpu/ops.h"

namespace mima::cpu {
namespace {

// A multiple of what the product takes at a time.
constexpr int64_t kFewRows = 4;

template <class T>
struct Layout {
  const ProjectedMergeParams& params;
  const Kernels& kernels;
  const StorageKernels& storage;
  const BlockKernels<T>& block;
  int64_t num_layers, num_concepts;
  std::vector<int64_t> first_token;  // [N + 1]
  std::vector<int64_t> first_block;  // [L + 1]
  int64_t S, lds, ld, cols, rows_per_block;
  bool stream;     // results of the size of the weights go past the caches
  Buffer<T> C, M;  // [S, ld], zero-padded

  explicit Layout(const ProjectedMergeParams& p)
      : params(p),
        kernels(active_kernels()),
        storage(kernels.storage[static_cast<int>(p.dtype)]),
        block(block_kernels<T>(kernels)),
        num_layers(static_cast<int64_t>(p.rows.size())),
        num_concepts(static_cast<int64_t>(p.tokens.size())),
        first_token(offsets_of(p.tokens)),
        S(first_token.back()),
        lds(leading_dimension<T>(S)),
        ld(leading_dimension<T>(p.d)),
        cols(padded<T>(kernels, p.d)),
        rows_per_block(block_rows<T>(p.d)),
        stream(double(offsets_of(p.rows).back()) * p.d * item_size(p.dtype) >= kStreamBytes),
        C(S * ld),
        M(p.M.empty() ? 0 : S * ld) {
    std::vector<int64_t> blocks(p.rows.size());
    for (size_t l = 0; l < blocks.size(); ++l) blocks[l] = ceil_div(p.rows[l], rows_per_block);
    first_block = offsets_of(blocks);
    for (int64_t n = 0; n < num_concepts; ++n) {
      storage.load(p.C[n].data, p.C[n].ld, p.tokens[n], p.d, C.get() + first_token[n] * ld, ld);
      if (!p.M.empty())
        storage.load(p.M[n].data, p.M[n].ld, p.tokens[n], p.d, M.get() + first_token[n] * ld, ld);
    }
  }

  struct Rows {
    int64_t layer, start, count;
  };
  Rows rows_of(int64_t item) const {
    const int64_t layer =
        std::upper_bound(first_block.begin(), first_block.end(), item) - first_block.begin() - 1;
    const int64_t start = (item - first_block[layer]) * rows_per_block;
    return {layer, start, std::min(rows_per_block, params.rows[layer] - start)};
  }
  int64_t blocks() const { return first_block.back(); }

  int threads() const {
    return useful_threads(params.threads, double(blocks()) * rows_per_block * params.d *
                                              static_cast<double>(S + num_concepts + 1));
  }

  // dst = rows of W_n - W0
  void load_difference(const Rows& rows, int64_t n, T* dst) const {
    const Matrix& W0 = params.W0[rows.layer];
    const Matrix& W = params.W[n * num_layers + rows.layer];
    storage.load_difference(W.row(rows.start, params.dtype), W.ld, W0.row(rows.start, params.dtype),
                            W0.ld, rows.count, params.d, dst, ld);
  }
  // The rows that the next item reads, for the products of this one to fetch; `slots` holds them.
  Ahead next_rows(int64_t item, const char** slots) const {
    // no more than the second-level cache has room for beside the blocks in use
    constexpr int64_t kMostBytes = 256 << 10;
    const int64_t bytes = params.d * static_cast<int64_t>(item_size(params.dtype));
    const char** end = slots;
    if (item + 1 < blocks()) {
      const Rows rows = rows_of(item + 1);
      const int64_t most = kMostBytes / ((num_concepts + 1) * std::max<int64_t>(bytes, 1));
      for (int64_t i = rows.start; i < rows.start + std::min(rows.count, most); ++i) {
        *end++ = static_cast<const char*>(params.W0[rows.layer].row(i, params.dtype));
        for (int64_t n = 0; n < num_concepts; ++n)
          *end++ =
              static_cast<const char*>(params.W[n * num_layers + rows.layer].row(i, params.dtype));
      }
    }
    const int64_t lines = (end - slots) * ceil_div(bytes, 64);
    // a step is some 16 multiply-adds of vectors
    const int64_t vectors = cols * static_cast<int64_t>(sizeof(T)) / kernels.vector_bytes;
    const int64_t steps = std::max<int64_t>(2 * rows_per_block * S * vectors / 16, 1);
    return {slots, end, bytes, 0, static_cast<int>(std::clamp<int64_t>(lines / steps, 1, 4))};
  }
  void load(const Matrix& src, const Rows& rows, T* dst) const {
    storage.load(src.row(rows.start, params.dtype), src.ld, rows.count, params.d, dst, ld);
  }
  void store(const T* src, const Rows& rows, const Matrix& dst) const {
    (stream ? storage.stream : storage.store)(src, ld, rows.count, params.d,
                                              dst.row(rows.start, params.dtype), dst.ld);
  }
};

template <class T>
void forward(const ProjectedMergeParams& params) {
  const Layout<T> layout(params);
  const int threads = layout.threads();
  const int64_t rows_ld = layout.rows_per_block * layout.ld;
  const int64_t per_thread = 2 * rows_ld + layout.rows_per_block * layout.lds;
  const Buffer<T> scratch(threads * per_thread);
  const int64_t slots_per_thread = layout.rows_per_block * (layout.num_concepts + 1);
  std::vector<const char*> slots(threads * slots_per_thread);
  parallel_for(layout.blocks(), threads, [&](int64_t item, int thread) {
    T* difference = scratch.get() + thread * per_thread;
    T* result = difference + rows_ld;
    T* coefficients = result + rows_ld;  // [rows, S]
    const auto rows = layout.rows_of(item);
    Ahead ahead = layout.next_rows(item, slots.data() + thread * slots_per_thread);
    layout.load(params.W0[rows.layer], rows, result);
    // few rows at a time: their differences stay in the first-level cache for all tokens
    for (int64_t i = 0; i < rows.count; i += kFewRows) {
      const typename Layout<T>::Rows few{rows.layer, rows.start + i,
                                         std::min(kFewRows, rows.count - i)};
      for (int64_t n = 0; n < layout.num_concepts; ++n) {
        const int64_t first = layout.first_token[n];
        layout.load_difference(few, n, difference);
        layout.block.gemm_nt(difference, layout.ld, layout.C.get() + first * layout.ld, layout.ld,
                             coefficients + i * layout.lds + first, layout.lds, few.count,
                             params.tokens[n], layout.cols, &ahead);
      }
    }
    layout.block.gemm_nn(coefficients, layout.lds, 1, layout.M.get(), layout.ld, result, layout.ld,
                         rows.count, layout.cols, layout.S, true, &ahead);
    layout.store(result, rows, params.out[rows.layer]);
  });
}

template <class T>
void backward(const ProjectedMergeParams& params) {
  const Layout<T> layout(params);
  const bool need_W0 = !params.d_W0.empty(), need_W = !params.d_W.empty();
  const bool need_C = !params.d_C.empty(), need_M = !params.d_M.empty();
  const bool need_sums = need_C || need_M;
  const int threads = layout.threads();
  const int64_t ld = layout.ld, lds = layout.lds, S = layout.S;
  const int64_t rows_ld = layout.rows_per_block * ld;
  const int64_t per_thread = 3 * rows_ld + 2 * layout.rows_per_block * lds;
  const Buffer<T> scratch(threads * per_thread);
  // d_C and d_M are sums over all rows of all layers
  const int64_t num_slabs = need_sums ? std::min(layout.blocks(), kMaxSlabs) : layout.blocks();
  const int64_t slab_size = S * ld;
  const Buffer<T> d_C(need_C ? num_slabs * slab_size : 0);
  const Buffer<T> d_M(need_M ? num_slabs * slab_size : 0);

  parallel_for(num_slabs, threads, [&](int64_t slab, int thread) {
    T* upstream = scratch.get() + thread * per_thread;
    T* gradient = upstream + rows_ld;
    T* difference = gradient + rows_ld;
    T* d_coefficients = difference + rows_ld;  // [rows, S], d_out M^T
    T* coefficients = d_coefficients + layout.rows_per_block * lds;
    const int64_t begin = layout.blocks() * slab / num_slabs;
    const int64_t end = layout.blocks() * (slab + 1) / num_slabs;
    for (int64_t item = begin; item < end; ++item) {
      const auto rows = layout.rows_of(item);
      const bool accumulate = item > begin;
      layout.load(params.d_out[rows.layer], rows, upstream);
      layout.block.gemm_nt(upstream, ld, layout.M.get(), ld, d_coefficients, lds, rows.count, S,
                           layout.cols, nullptr);
      for (int64_t n = 0; n < layout.num_concepts; ++n) {
        const int64_t first = layout.first_token[n];
        if (need_W) {
          layout.block.gemm_nn(d_coefficients + first, lds, 1, layout.C.get() + first * ld, ld,
                               gradient, ld, rows.count, layout.cols, params.tokens[n], false,
                               nullptr);
          layout.store(gradient, rows, params.d_W[n * layout.num_layers + rows.layer]);
        }
        if (!need_sums) continue;
        layout.load_difference(rows, n, difference);
        if (need_C)
          layout.block.gemm_nn(d_coefficients + first, 1, lds, difference, ld,
                               d_C.get() + slab * slab_size + first * ld, ld, params.tokens[n],
                               layout.cols, rows.count, accumulate, nullptr);
        if (need_M)
          layout.block.gemm_nt(difference, ld, layout.C.get() + first * ld, ld,
                               coefficients + first, lds, rows.count, params.tokens[n], layout.cols,
                               nullptr);
      }
      if (need_M)
        layout.block.gemm_nn(coefficients, 1, lds, upstream, ld, d_M.get() + slab * slab_size, ld,
                             S, layout.cols, rows.count, accumulate, nullptr);
      if (need_W0) {
        for (int64_t i = 0; i < rows.count; ++i)
          for (int64_t j = 0; j < S; ++j) coefficients[i * lds + j] = -d_coefficients[i * lds + j];
        layout.block.gemm_nn(coefficients, lds, 1, layout.C.get(), ld, upstream, ld, rows.count,
                             layout.cols, S, true, nullptr);
        layout.store(upstream, rows, params.d_W0[rows.layer]);
      }
    }
  });

  std::vector<SlabSum<T>> sums;
  const auto add_sums = [&](const Buffer<T>& slabs, const std::vector<Matrix>& out) {
    for (size_t n = 0; n < out.size(); ++n)
      sums.push_back({slabs.get(), layout.first_token[n] * ld, num_slabs, slab_size, ld,
                      params.tokens[n], params.d, T(1), false, out[n]});
  };
  add_sums(d_C, params.d_C);
  add_sums(d_M, params.d_M);
  store_slab_sums(layout.kernels, params.dtype, sums, params.threads);
}

// A merge of the same layers and, where it is read, the same text.
ProjectedMergeParams as_merge(const TokenParams& params, bool reads_text) {
  ProjectedMergeParams merge{};
  merge.dtype = params.dtype;
  merge.threads = params.threads;
  merge.d = params.d;
  merge.rows = params.rows;
  if (reads_text) {
    merge.tokens = {params.S};
    merge.C = {params.C};
  }
  return merge;
}

enum class TokenJob { kOutputs, kAdd, kSums };

template <class T, TokenJob JOB>
void token_job(const TokenParams& params) {
  const ProjectedMergeParams merge = as_merge(params, JOB != TokenJob::kSums);
  const Layout<T> layout(merge);
  const int64_t ld = layout.ld, S = params.S, lds = leading_dimension<T>(S);
  const int threads = useful_threads(
      params.threads, double(layout.blocks()) * layout.rows_per_block * params.d * (S + 1));
  const int64_t rows_ld = layout.rows_per_block * ld;
  const int64_t per_thread = rows_ld + layout.rows_per_block * lds;
  const Buffer<T> scratch(threads * per_thread);
  const std::vector<int64_t> first_row = offsets_of(params.rows);
  const int64_t num_slabs =
      JOB == TokenJob::kSums ? std::min(layout.blocks(), kMaxSlabs) : layout.blocks();
  const int64_t slab_size = S * ld;
  const Buffer<T> slabs(JOB == TokenJob::kSums ? num_slabs * slab_size : 0);
  parallel_for(num_slabs, threads, [&](int64_t slab, int thread) {
    T* x = scratch.get() + thread * per_thread;
    T* a = x + rows_ld;  // [rows, S]
    const int64_t begin = layout.blocks() * slab / num_slabs;
    const int64_t end = layout.blocks() * (slab + 1) / num_slabs;
    for (int64_t item = begin; item < end; ++item) {
      const auto rows = layout.rows_of(item);
      const Matrix& X = params.X[rows.layer];
      void* A = params.A.row(first_row[rows.layer] + rows.start, params.dtype);
      layout.load(X, rows, x);
      if (JOB == TokenJob::kOutputs) {
        layout.block.gemm_nt(x, ld, layout.C.get(), ld, a, lds, rows.count, S, layout.cols,
                             nullptr);
        layout.storage.store(a, lds, rows.count, S, A, params.A.ld);
        continue;
      }
      layout.storage.load(A, params.A.ld, rows.count, S, a, lds);
      if (JOB == TokenJob::kAdd) {
        layout.block.gemm_nn(a, lds, 1, layout.C.get(), ld, x, ld, rows.count, layout.cols, S, true,
                             nullptr);
        layout.storage.store(x, ld, rows.count, params.d, X.row(rows.start, params.dtype), X.ld);
      } else {
        layout.block.gemm_nn(a, 1, lds, x, ld, slabs.get() + slab * slab_size, ld, S, layout.cols,
                             rows.count, item > begin, nullptr);
      }
    }
  });
  if (JOB != TokenJob::kSums) return;
  const std::vector<SlabSum<T>> sums = {
      {slabs.get(), 0, num_slabs, slab_size, ld, S, params.d, T(1), false, params.C}};
  store_slab_sums(layout.kernels, params.dtype, sums, params.threads);
}

template <TokenJob JOB>
void token_job(const TokenParams& params) {
  params.dtype == DType::kFloat64 ? token_job<double, JOB>(params) : token_job<float, JOB>(params);
}

}  // namespace

void token_outputs(const TokenParams& params) {
  token_job<TokenJob::kOutputs>(params);
}

void add_token_outputs(const TokenParams& params) {
  token_job<TokenJob::kAdd>(params);
}

void token_sums(const TokenParams& params) {
  token_job<TokenJob::kSums>(params);
}

void projected_merge_forward(const ProjectedMergeParams& params) {
  params.dtype == DType::kFloat64 ? forward<double>(params) : forward<float>(params);
}

void projected_merge_backward(const ProjectedMergeParams& params) {
  params.dtype == DType::kFloat64 ? backward<double>(params) : backward<float>(params);
}

}  // namespace mima::cpu
