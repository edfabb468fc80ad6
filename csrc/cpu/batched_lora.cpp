// batched_lora: blocks of tokens of one sample pass through the layer and the sample's adapter. The
// product with (s B)^T continues the sums of the base product, in registers: y is written once, and
// the adapter costs its own arithmetic only. The [tokens, r] intermediate stays in the first-level
// cache in the accumulator type. Where the base product is the caller's, y is updated in place.
//
// Where samples have very many tokens, adapters are added to the weight first, in panels of their
// own: r d o multiply-adds each, instead of r (d + o) for each token.
#include "cpu/blocks.h"
#include "cpu/ops.h"

namespace mima::cpu {
namespace {

// An adapter in panels; what a direction does not need is null.
template <class T>
struct Adapter {
  const T* A_rows = nullptr;  // not in panels: [r, d], rows ld_A apart
  int64_t ld_A = 0;
  const T* A_transposed = nullptr;  // of [d, r], where A_rows is null
  const T* A = nullptr;             // of [r, d]
  const T* B_transposed = nullptr;  // of [r, o], times the scale
  const T* B = nullptr;             // of [o, r]
  const T* merged = nullptr;        // of the transposed weight W + s B A, backward: of itself
};

template <class T>
struct Layout {
  const BatchedLoraParams& params;
  const Kernels& kernels;
  const StorageKernels& storage;
  const BlockKernels<T>& block;
  bool forward, direct, fused;
  bool merges;  // adapters into the weight
  int64_t num_adapters, max_rank, ldr, ld_d, ld_o, tokens_per_block, blocks_per_sample;
  int64_t W_k, W_n, W_width;          // of W^T in y = x W^T, of W in d_x = d_y W: [W_k, W_n]
  std::vector<int64_t> samples;       // grouped by adapter, those without one last
  std::vector<int64_t> first;         // [N + 2] into samples
  std::vector<int64_t> to_merge;      // adapters
  std::vector<int64_t> packed_start;  // [N + 1]
  Buffer<T> W, merged, packed;
  std::vector<Adapter<T>> adapters;

  Layout(const BatchedLoraParams& p, bool forward)
      : params(p),
        kernels(active_kernels()),
        storage(kernels.storage[static_cast<int>(p.dtype)]),
        block(block_kernels<T>(kernels)),
        forward(forward),
        direct(sizeof(T) == item_size(p.dtype)),
        fused(p.W.data != nullptr),
        merges(fused && merges_adapters(p.t, p.d, p.o)),
        num_adapters(static_cast<int64_t>(p.ranks.size())),
        max_rank(num_adapters ? *std::max_element(p.ranks.begin(), p.ranks.end()) : 0),
        ldr(leading_dimension<T>(max_rank)),
        ld_d(leading_dimension<T>(p.d)),
        ld_o(leading_dimension<T>(p.o)),
        tokens_per_block(block_of_tokens()),
        blocks_per_sample(p.t == 0 ? 0 : ceil_div(p.t, tokens_per_block)),
        W_k(forward ? p.d : p.o),
        W_n(forward ? p.o : p.d),
        W_width(panel_width<T>(kernels, W_n)),
        first(first_samples()),
        to_merge(adapters_to_merge()),
        packed_start(offsets_of_packed()),
        W(fused ? panels_size<T>(kernels, W_k, W_n) : 0),
        merged(static_cast<int64_t>(to_merge.size()) * panels_size<T>(kernels, W_k, W_n)),
        packed(packed_start.back()),
        adapters(num_adapters) {
    samples.resize(p.b);
    std::vector<int64_t> next(first.begin(), first.end() - 1);
    for (int64_t sample = 0; sample < p.b; ++sample)
      samples[next[group(p.index[sample])]++] = sample;
    const int64_t W_panels = fused ? ceil_div(W_n, W_width) : 0;
    // read and written; the adapters' factors in the order of their samples, so that most threads
    // will read what they have packed
    const double moved =
        2 * (double(W_panels) * W_width * W_k + double(num_adapters) * max_rank * (p.d + p.o));
    const int64_t items = std::max(W_panels, num_adapters);
    parallel_for(items, useful_threads(p.threads, moved), [&](int64_t item, int) {
      for (int64_t j = W_panels * item / items; j < W_panels * (item + 1) / items; ++j)
        block.pack_panel(static_cast<const T*>(p.W.data), forward ? 1 : p.W.ld,
                         forward ? p.W.ld : 1, W_k, W_n, T(1), W_width, j, W.get());
      for (int64_t i = num_adapters * item / items; i < num_adapters * (item + 1) / items; ++i)
        if (first[i + 1] > first[i]) pack(i);
    });
    const int64_t panels = static_cast<int64_t>(to_merge.size()) * W_panels;
    const double multiplied = double(panels) * W_k * W_width * (1 + max_rank / 4);
    parallel_for(panels, useful_threads(p.threads, multiplied),
                 [&](int64_t item, int) { merge(item / W_panels, item % W_panels); });
  }

  int64_t group(int64_t adapter) const { return adapter < 0 ? num_adapters : adapter; }

  std::vector<int64_t> first_samples() const {
    std::vector<int64_t> count(num_adapters + 1, 0);
    for (int64_t adapter : params.index) ++count[group(adapter)];
    return offsets_of(count);
  }

  std::vector<int64_t> adapters_to_merge() const {
    std::vector<int64_t> found;
    for (int64_t i = 0; i < num_adapters; ++i)
      if (merges && params.ranks[i] > 0 && first[i] < first[i + 1]) found.push_back(i);
    return found;
  }

  // One panel of W + s B A, or of its transpose: W's and a product with the right factor's.
  void merge(int64_t i, int64_t panel) {
    const int64_t n = to_merge[i], r = params.ranks[n], size = W_k * W_width;
    Adapter<T>& adapter = adapters[n];
    T* const panels = merged.get() + i * panels_size<T>(kernels, W_k, W_n);
    if (panel == 0) adapter.merged = panels;
    T* const to = panels + panel * size;
    std::copy_n(W.get() + panel * size, size, to);
    if (!forward) {
      const PanelTerm<T> term{static_cast<const T*>(params.B[n].data), params.B[n].ld,
                              adapter.A + panel * r * W_width, r};
      return block.gemm_panels(&term, 1, to, W_width, W_k, W_width, true);
    }
    // A^T lies in panels of its own, each of them rows of so many of its columns
    const int64_t step = panel_width<T>(kernels, r);
    for (int64_t j = 0; j < r; j += step) {
      const PanelTerm<T> term{adapter.A_transposed + j * params.d, step,
                              adapter.B_transposed + (panel * r + j) * W_width,
                              std::min(step, r - j)};
      block.gemm_panels(&term, 1, to, W_width, W_k, W_width, true);
    }
  }

  // Samples that there is something to do for.
  int64_t num_samples() const { return fused ? params.b : first[num_adapters]; }

  void pack(int64_t n) {
    const int64_t r = params.ranks[n], d = params.d, o = params.o;
    if (r == 0) return;
    T* to = packed.get() + packed_start[n];
    const auto panels = [&](const T* b, int64_t stride_k, int64_t stride_n, int64_t k, int64_t cols,
                            double factor) {
      const T* const start = to;
      const int64_t width = panel_width<T>(kernels, cols);
      for (int64_t j = 0; j * width < cols; ++j)
        block.pack_panel(b, stride_k, stride_n, k, cols, static_cast<T>(factor), width, j, to);
      to += panels_size<T>(kernels, k, cols);
      return start;
    };
    // as given, in the accumulator type: where they lie, or behind the panels
    const T* A = static_cast<const T*>(params.A[n].data);
    const T* B = static_cast<const T*>(params.B[n].data);
    int64_t ld_A = params.A[n].ld;
    if (!direct) {
      T* A_converted = packed.get() + packed_start[n + 1] - converted_size(n);
      T* B_converted = A_converted + r * ld_d;
      storage.load(A, ld_A, r, d, A_converted, ld_d);
      storage.load(B, 0, 1, o * r, B_converted, 0);
      A = A_converted, B = B_converted, ld_A = ld_d;
    }
    Adapter<T>& adapter = adapters[n];
    if (packs_A_transposed(n))
      adapter.A_transposed = panels(A, 1, ld_A, d, r, 1);
    else
      adapter.A_rows = A, adapter.ld_A = ld_A;
    if (forward) {
      adapter.B_transposed = panels(B, 1, r, r, o, params.scale[n]);
    } else {
      adapter.A = panels(A, ld_A, 1, r, d, merges ? params.scale[n] : 1);
      adapter.B = panels(B, r, 1, o, r, 1);
    }
  }
  bool packs_A_transposed(int64_t n) const {
    if (forward && merges) return true;
    const bool is_kept = !forward && params.projection.data != nullptr;
    return !is_kept && !takes_dots(params.ranks[n]);
  }
  // Whether x A^T is formed by sums along d, from A as it lies: in a panel a rank below a vector's
  // lanes leaves the others idle. Needs whole vectors along d, which converted operands have.
  bool takes_dots(int64_t r) const {
    const int64_t lanes = kernels.vector_bytes / static_cast<int64_t>(sizeof(T));
    return r <= lanes && (!direct || params.d % lanes == 0);
  }
  // the last term leaves room for a whole vector past the end
  int64_t converted_size(int64_t n) const {
    return direct ? 0 : params.ranks[n] * (ld_d + ld_o) + 64;
  }
  std::vector<int64_t> offsets_of_packed() const {
    std::vector<int64_t> offsets(num_adapters + 1, 0);
    for (int64_t n = 0; n < num_adapters; ++n) {
      const int64_t r = params.ranks[n], d = params.d, o = params.o;
      offsets[n + 1] = offsets[n] + converted_size(n) +
                       (packs_A_transposed(n) ? panels_size<T>(kernels, d, r) : 0) +
                       (forward ? panels_size<T>(kernels, r, o)
                                : panels_size<T>(kernels, r, d) + panels_size<T>(kernels, o, r));
    }
    return offsets;
  }

  double operations() const {
    return double(params.b) * params.t * double(params.d + params.o) * (1 + max_rank / 4);
  }
  int threads() const { return useful_threads(params.threads, operations()); }

  // Whole tiles of 6 rows. Tokens of a block share a pass over W, which need not fit the
  // second-level cache: up to 96 of them, 512 KiB, beside one panel of W. Fewer where threads, or
  // slabs, whose number is the same for any number of threads, would have nothing to do; of slabs
  // of fewer than 48 tokens, the sums would take longer than the products.
  int64_t block_of_tokens() const {
    const int64_t row = std::max<int64_t>({params.d, params.o, 1}) * int64_t(sizeof(T));
    const int parts = useful_threads(forward ? 2 * params.threads : kMaxSlabs, operations());
    const int64_t share = std::max<int64_t>(ceil_div(params.b * params.t, parts), forward ? 0 : 48);
    const int64_t rows = std::min((int64_t(512) << 10) / row, ceil_div(share, 6) * 6);
    return std::min(params.t, std::clamp<int64_t>(rows / 6 * 6, 6, 96));
  }

  // Rows of src in the accumulator type: src itself where that is what it holds.
  const T* rows(const Matrix& src, int64_t start, int64_t count, int64_t cols, bool where_they_lie,
                T* scratch, int64_t ld_scratch, int64_t* ld) const {
    if (where_they_lie) {
      *ld = src.ld;
      return static_cast<const T*>(src.row(start, params.dtype));
    }
    storage.load(src.row(start, params.dtype), src.ld, count, cols, scratch, ld_scratch);
    *ld = ld_scratch;
    return scratch;
  }

  // h[count, r] = x A^T
  void down(const Adapter<T>& adapter, int64_t r, const T* x, int64_t ldx, int64_t count, T* h,
            int64_t ldh) const {
    if (adapter.A_rows != nullptr) {
      block.gemm_nt(x, ldx, adapter.A_rows, adapter.ld_A, h, ldh, count, r,
                    padded<T>(kernels, params.d), nullptr);
      return;
    }
    const PanelTerm<T> term{x, ldx, adapter.A_transposed, params.d};
    block.gemm_panels(&term, 1, h, ldh, count, padded<T>(kernels, r), false);
  }
  // Rows of x A^T from `start` on, where they are kept: null if not.
  T* projection(int64_t start) const {
    T* first = static_cast<T*>(params.projection.data);
    return first == nullptr ? nullptr : first + start * params.projection.ld;
  }

  // dst[count, cols] = [dst] + the sum of the terms
  void write(const PanelTerm<T>* terms, int num_terms, const Matrix& dst, int64_t start,
             int64_t count, int64_t cols, bool add, T* scratch, int64_t ld_scratch) const {
    if (direct) {
      block.gemm_panels(terms, num_terms, static_cast<T*>(dst.row(start, params.dtype)), dst.ld,
                        count, cols, add);
      return;
    }
    block.gemm_panels(terms, num_terms, scratch, ld_scratch, count, padded<T>(kernels, cols),
                      false);
    storage.add(scratch, ld_scratch, count, cols, dst.row(start, params.dtype), dst.ld);
  }
};

template <class T>
void forward(const BatchedLoraParams& params) {
  const Layout<T> layout(params, true);
  const int threads = layout.threads();
  const int64_t tokens = layout.tokens_per_block, blocks = layout.blocks_per_sample;
  const int64_t per_thread = tokens * (layout.ld_d + layout.ld_o + layout.ldr);
  const Buffer<T> scratch(threads * per_thread);
  parallel_for(layout.num_samples() * blocks, threads, [&](int64_t item, int thread) {
    const int64_t sample = layout.samples[item / blocks];
    const int64_t n = params.index[sample];
    const int64_t token = item % blocks * tokens;
    const int64_t count = std::min(tokens, params.t - token);
    const int64_t start = sample * params.t + token;
    T* x_scratch = scratch.get() + thread * per_thread;
    T* y_scratch = x_scratch + tokens * layout.ld_d;
    T* h = y_scratch + tokens * layout.ld_o;
    int64_t ldx;
    const T* x =
        layout.rows(params.x, start, count, params.d, layout.direct, x_scratch, layout.ld_d, &ldx);
    PanelTerm<T> terms[2];
    int num_terms = 0;
    const Adapter<T> adapter = n < 0 ? Adapter<T>{} : layout.adapters[n];
    if (layout.fused)
      terms[num_terms++] = {x, ldx, adapter.merged ? adapter.merged : layout.W.get(), params.d};
    if (n >= 0 && params.ranks[n] > 0 && adapter.merged == nullptr) {
      const int64_t r = params.ranks[n];
      T* const kept = layout.projection(start);
      if (kept != nullptr) h = kept;
      const int64_t ldh = kept != nullptr ? params.projection.ld : layout.ldr;
      layout.down(adapter, r, x, ldx, count, h, ldh);
      terms[num_terms++] = {h, ldh, adapter.B_transposed, r};
    }
    if (num_terms > 0)
      layout.write(terms, num_terms, params.y, start, count, params.o, params.add, y_scratch,
                   layout.ld_o);
  });
}

template <class T>
void backward(BatchedLoraParams& params) {
  const Layout<T> layout(params, false);
  const bool need_x = params.d_x.data != nullptr;
  const bool need_A = !params.d_A.empty(), need_B = !params.d_B.empty();
  const int threads = layout.threads();
  const int64_t tokens = layout.tokens_per_block, blocks = layout.blocks_per_sample;
  const int64_t ld_d = layout.ld_d, ld_o = layout.ld_o, ldr = layout.ldr;
  // the sums over tokens read whole vectors of x and d_y
  const int64_t cols_d = padded<T>(layout.kernels, params.d);
  const int64_t cols_o = padded<T>(layout.kernels, params.o);
  const bool direct_x = layout.direct && cols_d == params.d;
  const bool direct_y = layout.direct && cols_o == params.o;

  // d_A, d_B and d_scale are sums over the tokens of all samples of an adapter: slabs of that
  // adapter's blocks, as many for each adapter as its share of them. The last group, without an
  // adapter, has no sums.
  struct Slab {
    int64_t group, begin, end;  // blocks of this group
  };
  std::vector<Slab> slabs;
  std::vector<int64_t> first_slab(layout.num_adapters + 2, 0);
  const int64_t all_blocks = layout.num_samples() * blocks;
  for (int64_t n = 0; n <= layout.num_adapters; ++n) {
    const int64_t last = std::min(layout.first[n + 1], layout.num_samples());
    const int64_t own = (last - layout.first[n]) * blocks;
    const int64_t share = own <= 0 ? 0 : std::clamp<int64_t>(own * kMaxSlabs / all_blocks, 1, own);
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
    const bool adapted = slab.group < layout.num_adapters;
    const Adapter<T> adapter = adapted ? layout.adapters[slab.group] : Adapter<T>{};
    const int64_t r = adapted ? params.ranks[slab.group] : 0;
    const T scale = adapted ? static_cast<T>(params.scale[slab.group]) : T(0);
    T* x_scratch = scratch.get() + thread * per_thread;
    T* y_scratch = x_scratch + tokens * ld_d;
    T* d_x_scratch = y_scratch + tokens * ld_o;
    T* h = d_x_scratch + tokens * ld_d;  // x A^T
    T* d_h = h + tokens * ldr;           // d_y B, then times the scale
    for (int64_t item = slab.begin; item < slab.end; ++item) {
      const int64_t sample = layout.samples[layout.first[slab.group] + item / blocks];
      const int64_t token = item % blocks * tokens;
      const int64_t count = std::min(tokens, params.t - token);
      const bool accumulate = item > slab.begin;
      const int64_t start = sample * params.t + token;
      int64_t ldx = 0, ldy;
      const T* x = nullptr;
      const T* const kept = layout.projection(start);
      const bool extends = r > 0 && need_x && adapter.merged == nullptr;
      if (r > 0 && (need_A || (kept == nullptr && (need_B || params.need_scale))))
        x = layout.rows(params.x, start, count, params.d, direct_x, x_scratch, ld_d, &ldx);
      const T* d_y =
          layout.rows(params.d_y, start, count, params.o, direct_y, y_scratch, ld_o, &ldy);
      if (r > 0 && (need_B || params.need_scale)) {
        if (kept == nullptr)
          layout.down(adapter, r, x, ldx, count, h, ldr);
        else
          for (int64_t i = 0; i < count; ++i)
            std::copy_n(kept + i * params.projection.ld, r, h + i * ldr);
      }
      if (extends || (r > 0 && (need_A || params.need_scale))) {
        const PanelTerm<T> up{d_y, ldy, adapter.B, params.o};
        layout.block.gemm_panels(&up, 1, d_h, ldr, count, padded<T>(layout.kernels, r), false);
      }
      if (params.need_scale) {
        double total = 0;
        for (int64_t i = 0; i < count; ++i)
          for (int64_t j = 0; j < r; ++j) total += double(d_h[i * ldr + j]) * h[i * ldr + j];
        d_scale[index] += total;
      }
      for (int64_t i = 0; i < count; ++i) {
        if (need_B)
          for (int64_t j = 0; j < r; ++j) h[i * ldr + j] *= scale;
        if (extends || need_A)
          for (int64_t j = 0; j < r; ++j) d_h[i * ldr + j] *= scale;
      }
      if (r > 0 && need_B)
        layout.block.gemm_nn(h, 1, ldr, d_y, ldy, d_B.get() + index * stride_B, ld_o, r, cols_o,
                             count, accumulate, nullptr);
      if (r > 0 && need_A)
        layout.block.gemm_nn(d_h, 1, ldr, x, ldx, d_A.get() + index * stride_A, ld_d, r, cols_d,
                             count, accumulate, nullptr);
      if (!need_x) continue;
      PanelTerm<T> terms[2];
      int num_terms = 0;
      if (layout.fused)
        terms[num_terms++] = {d_y, ldy, adapter.merged ? adapter.merged : layout.W.get(), params.o};
      if (extends) terms[num_terms++] = {d_h, ldr, adapter.A, r};
      if (num_terms > 0)
        layout.write(terms, num_terms, params.d_x, start, count, params.d, !layout.fused,
                     d_x_scratch, ld_d);
    }
  });

  std::vector<SlabSum<T>> sums;
  for (int64_t n = 0; n < layout.num_adapters; ++n) {
    const int64_t r = params.ranks[n];
    const int64_t at = first_slab[n], count = first_slab[n + 1] - at;
    if (params.need_scale)
      for (int64_t i = at; i < at + count; ++i) params.d_scale[n] += d_scale[i];
    if (need_A)
      sums.push_back({d_A.get(), at * stride_A, count, stride_A, ld_d, r, params.d, T(1), false,
                      params.d_A[n]});
    if (need_B)
      sums.push_back({d_B.get(), at * stride_B, count, stride_B, ld_o, r, params.o, T(1), true,
                      params.d_B[n]});
  }
  store_slab_sums(layout.kernels, params.dtype, sums, params.threads);
}

}  // namespace

bool merges_adapters(int64_t t, int64_t d, int64_t o) {
  return double(t) * (d + o) >= 4.0 * d * o;
}

void batched_lora_forward(const BatchedLoraParams& params) {
  params.dtype == DType::kFloat64 ? forward<double>(params) : forward<float>(params);
}

void batched_lora_backward(BatchedLoraParams& params) {
  params.dtype == DType::kFloat64 ? backward<double>(params) : backward<float>(params);
}

}  // namespace mima::cpu
