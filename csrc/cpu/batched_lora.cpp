// batched_lora: the low-rank part, added in place to the caller's base product. Blocks of tokens of
// one sample pass through its adapter: x is read once, the [tokens, r] intermediate stays in the
// first-level cache in the accumulator type, y is read and written once.
#include <tuple>

#include "cpu/blocks.h"
#include "cpu/ops.h"

namespace mima::cpu {
namespace {

// An adapter in the accumulator type, ready for the block kernels.
template <class T>
struct Adapter {
  const T* A = nullptr;  // [r, ld_A]
  const T* B = nullptr;  // [r, ld_B], B transposed
};

template <class T>
struct Layout {
  const BatchedLoraParams& params;
  const Kernels& kernels;
  const StorageKernels& storage;
  const BlockKernels<T>& block;
  int64_t num_adapters, max_rank, ldr, ld_d, ld_o, cols_d, cols_o, tokens_per_block;
  std::vector<int64_t> samples;  // samples that have an adapter, grouped by adapter
  std::vector<int64_t> first;    // [N + 1] into samples
  std::vector<int64_t> first_packed;
  Buffer<T> packed;
  std::vector<Adapter<T>> adapters;
  bool direct_x, direct_y;  // rows of x (y) can be used where they lie

  // `scaled`: B is packed times its adapter's scale
  Layout(const BatchedLoraParams& p, bool scaled)
      : params(p),
        kernels(active_kernels()),
        storage(kernels.storage[static_cast<int>(p.dtype)]),
        block(block_kernels<T>(kernels)),
        num_adapters(static_cast<int64_t>(p.ranks.size())),
        max_rank(num_adapters ? *std::max_element(p.ranks.begin(), p.ranks.end()) : 0),
        ldr(leading_dimension<T>(max_rank)),
        ld_d(leading_dimension<T>(p.d)),
        ld_o(leading_dimension<T>(p.o)),
        cols_d(padded<T>(kernels, p.d)),
        cols_o(padded<T>(kernels, p.o)),
        tokens_per_block(block_rows<T>(std::max(p.d, p.o))),
        first(num_adapters + 1, 0),
        first_packed(offsets_of(p.ranks)),
        packed(packed_start(num_adapters)),
        adapters(num_adapters),
        direct_x(sizeof(T) == item_size(p.dtype) && cols_d == p.d),
        direct_y(sizeof(T) == item_size(p.dtype) && cols_o == p.o) {
    for (int64_t n : p.index)
      if (n >= 0) ++first[n + 1];
    for (int64_t n = 0; n < num_adapters; ++n) first[n + 1] += first[n];
    samples.resize(first.back());
    std::vector<int64_t> next(first.begin(), first.end() - 1);
    for (int64_t sample = 0; sample < p.b; ++sample)
      if (p.index[sample] >= 0) samples[next[p.index[sample]]++] = sample;
    parallel_for(num_adapters, useful_threads(p.threads, double(first_packed.back()) * (p.d + p.o)),
                 [&](int64_t n, int) {
                   if (first[n + 1] > first[n]) pack(n, scaled);
                 });
  }

  void pack(int64_t n, bool scaled) {
    const int64_t r = params.ranks[n];
    T* A = packed.get() + packed_start(n);
    T* B = A + r * ld_d;
    T* B_as_given = B + r * ld_o;  // [o, r], contiguous
    storage.load(params.A[n].data, params.A[n].ld, r, params.d, A, ld_d);
    storage.load(params.B[n].data, 0, 1, params.o * r, B_as_given, 0);
    const T factor = scaled ? static_cast<T>(params.scale[n]) : T(1);
    for (int64_t i = 0; i < r; ++i) {
      for (int64_t j = 0; j < params.o; ++j) B[i * ld_o + j] = factor * B_as_given[j * r + i];
      std::fill(B + i * ld_o + params.o, B + (i + 1) * ld_o, T(0));
    }
    adapters[n] = {A, B};
  }
  // the last term leaves room for a whole vector past the end of B as given
  int64_t packed_start(int64_t n) const { return first_packed[n] * (ld_d + 2 * ld_o) + n * 64; }

  int64_t blocks_per_sample() const { return ceil_div(params.t, tokens_per_block); }
  int threads() const {
    return useful_threads(params.threads, double(samples.size()) * params.t *
                                              double(params.d + params.o) * (1 + max_rank / 4));
  }

  // Rows of src in the accumulator type: src itself where that is what it holds.
  const T* rows(const Matrix& src, int64_t start, int64_t count, int64_t cols, bool direct,
                T* scratch, int64_t ld_scratch, int64_t* ld) const {
    if (direct) {
      *ld = src.ld;
      return static_cast<const T*>(src.row(start, params.dtype));
    }
    storage.load(src.row(start, params.dtype), src.ld, count, cols, scratch, ld_scratch);
    *ld = ld_scratch;
    return scratch;
  }

  // dst[count, cols] += h[count, r] factor[r, cols]
  void add_product(const T* h, int64_t count, int64_t r, const T* factor, int64_t ld_factor,
                   const Matrix& dst, int64_t start, int64_t cols, bool direct, T* scratch) const {
    const int64_t whole = padded<T>(kernels, cols);
    if (direct) {
      block.gemm_nn(h, ldr, 1, factor, ld_factor, static_cast<T*>(dst.row(start, params.dtype)),
                    dst.ld, count, whole, r, true);
      return;
    }
    block.gemm_nn(h, ldr, 1, factor, ld_factor, scratch, ld_factor, count, whole, r, false);
    storage.add(scratch, ld_factor, count, cols, dst.row(start, params.dtype), dst.ld);
  }
};

template <class T>
void forward(const BatchedLoraParams& params) {
  const Layout<T> layout(params, true);
  const int threads = layout.threads();
  const int64_t tokens = layout.tokens_per_block;
  const int64_t per_thread = tokens * (layout.ld_d + layout.ld_o + layout.ldr);
  const Buffer<T> scratch(threads * per_thread);
  const int64_t blocks = layout.blocks_per_sample();
  parallel_for(static_cast<int64_t>(layout.samples.size()) * blocks, threads,
               [&](int64_t item, int thread) {
                 const int64_t sample = layout.samples[item / blocks];
                 const int64_t n = params.index[sample];
                 const int64_t token = item % blocks * tokens;
                 const int64_t count = std::min(tokens, params.t - token);
                 const int64_t start = sample * params.t + token;
                 T* x_scratch = scratch.get() + thread * per_thread;
                 T* y_scratch = x_scratch + tokens * layout.ld_d;
                 T* h = y_scratch + tokens * layout.ld_o;
                 int64_t ldx;
                 const T* x = layout.rows(params.x, start, count, params.d, layout.direct_x,
                                          x_scratch, layout.ld_d, &ldx);
                 const Adapter<T>& adapter = layout.adapters[n];
                 const int64_t r = params.ranks[n];
                 layout.block.gemm_nt(x, ldx, adapter.A, layout.ld_d, h, layout.ldr, count, r,
                                      layout.cols_d);
                 layout.add_product(h, count, r, adapter.B, layout.ld_o, params.y, start, params.o,
                                    layout.direct_y, y_scratch);
               });
}

template <class T>
void backward(BatchedLoraParams& params) {
  const Layout<T> layout(params, false);
  const bool need_x = params.d_x.data != nullptr;
  const bool need_A = !params.d_A.empty(), need_B = !params.d_B.empty();
  const int threads = layout.threads();
  const int64_t tokens = layout.tokens_per_block;
  const int64_t blocks = layout.blocks_per_sample();
  const int64_t ld_d = layout.ld_d, ld_o = layout.ld_o, ldr = layout.ldr;

  // d_A, d_B and d_scale are sums over the tokens of all samples of an adapter: slabs of that
  // adapter's blocks, as many for each adapter as its share of them
  struct Slab {
    int64_t adapter, begin, end;  // blocks of this adapter
  };
  std::vector<Slab> slabs;
  std::vector<int64_t> first_slab(layout.num_adapters + 1, 0);
  const int64_t all_blocks = static_cast<int64_t>(layout.samples.size()) * blocks;
  for (int64_t n = 0; n < layout.num_adapters; ++n) {
    const int64_t own = (layout.first[n + 1] - layout.first[n]) * blocks;
    const int64_t share = own == 0 ? 0 : std::clamp<int64_t>(own * kMaxSlabs / all_blocks, 1, own);
    for (int64_t i = 0; i < share; ++i)
      slabs.push_back({n, own * i / share, own * (i + 1) / share});
    first_slab[n + 1] = static_cast<int64_t>(slabs.size());
  }
  const int64_t num_slabs = static_cast<int64_t>(slabs.size());
  const int64_t stride_A = layout.max_rank * ld_d, stride_B = layout.max_rank * ld_o;
  const Buffer<T> d_A(need_A ? num_slabs * stride_A : 0);
  const Buffer<T> d_B(need_B ? num_slabs * stride_B : 0);  // transposed
  std::vector<double> d_scale(num_slabs, 0.0);
  const int64_t per_thread = tokens * (2 * ld_d + ld_o + 2 * ldr);
  const Buffer<T> scratch(threads * per_thread);

  parallel_for(num_slabs, threads, [&](int64_t index, int thread) {
    const Slab& slab = slabs[index];
    const Adapter<T>& adapter = layout.adapters[slab.adapter];
    const int64_t r = params.ranks[slab.adapter];
    const T scale = static_cast<T>(params.scale[slab.adapter]);
    T* x_scratch = scratch.get() + thread * per_thread;
    T* y_scratch = x_scratch + tokens * ld_d;
    T* d_x_scratch = y_scratch + tokens * ld_o;
    T* h = d_x_scratch + tokens * ld_d;  // x A^T
    T* d_h = h + tokens * ldr;           // d_y B, then times the scale
    for (int64_t item = slab.begin; item < slab.end; ++item) {
      const int64_t sample = layout.samples[layout.first[slab.adapter] + item / blocks];
      const int64_t token = item % blocks * tokens;
      const int64_t count = std::min(tokens, params.t - token);
      const int64_t start = sample * params.t + token;
      const bool accumulate = item > slab.begin;
      int64_t ldx = 0, ldy;
      const T* x = nullptr;
      if (need_A || need_B || params.need_scale)
        x = layout.rows(params.x, start, count, params.d, layout.direct_x, x_scratch, ld_d, &ldx);
      const T* d_y =
          layout.rows(params.d_y, start, count, params.o, layout.direct_y, y_scratch, ld_o, &ldy);
      if (need_B || params.need_scale)
        layout.block.gemm_nt(x, ldx, adapter.A, ld_d, h, ldr, count, r, layout.cols_d);
      if (need_x || need_A || params.need_scale)
        layout.block.gemm_nt(d_y, ldy, adapter.B, ld_o, d_h, ldr, count, r, layout.cols_o);
      if (params.need_scale) {
        double total = 0;
        for (int64_t i = 0; i < count; ++i)
          for (int64_t j = 0; j < r; ++j) total += double(d_h[i * ldr + j]) * h[i * ldr + j];
        d_scale[index] += total;
      }
      for (int64_t i = 0; i < count; ++i) {
        if (need_B)
          for (int64_t j = 0; j < r; ++j) h[i * ldr + j] *= scale;
        if (need_x || need_A)
          for (int64_t j = 0; j < r; ++j) d_h[i * ldr + j] *= scale;
      }
      if (need_B)
        layout.block.gemm_nn(h, 1, ldr, d_y, ldy, d_B.get() + index * stride_B, ld_o, r,
                             layout.cols_o, count, accumulate);
      if (need_A)
        layout.block.gemm_nn(d_h, 1, ldr, x, ldx, d_A.get() + index * stride_A, ld_d, r,
                             layout.cols_d, count, accumulate);
      if (need_x)
        layout.add_product(d_h, count, r, adapter.A, ld_d, params.d_x, start, params.d,
                           layout.direct_x, d_x_scratch);
    }
  });

  for (int64_t n = 0; n < layout.num_adapters; ++n) {
    const int64_t r = params.ranks[n];
    const int64_t count = first_slab[n + 1] - first_slab[n];
    if (params.need_scale)
      for (int64_t i = first_slab[n]; i < first_slab[n + 1]; ++i) params.d_scale[n] += d_scale[i];
    if (need_A) {
      if (count == 0)
        store_zeros(params.dtype, r, params.d, params.d_A[n]);
      else
        store_slab_sum(layout.kernels, params.dtype, d_A.get() + first_slab[n] * stride_A, count,
                       stride_A, ld_d, r, params.d, params.d_A[n], params.threads);
    }
    if (need_B) {
      if (count == 0)
        store_zeros(params.dtype, params.o, r, params.d_B[n]);
      else
        store_slab_sum_transposed(layout.kernels, params.dtype,
                                  d_B.get() + first_slab[n] * stride_B, count, stride_B, ld_o, r,
                                  params.o, params.d_B[n], params.threads);
    }
  }
}

}  // namespace

void batched_lora_forward(const BatchedLoraParams& params) {
  params.dtype == DType::kFloat64 ? forward<double>(params) : forward<float>(params);
}

void batched_lora_backward(BatchedLoraParams& params) {
  params.dtype == DType::kFloat64 ? backward<double>(params) : backward<float>(params);
}

}  // namespace mima::cpu
