// merge_lora: blocks of rows of W; all adapters side by side as one factor of rank R = sum of r_n.
#include "cpu/blocks.h"
#include "cpu/ops.h"

namespace mima::cpu {
namespace {

template <class T>
struct Layout {
  const MergeLoraParams& params;
  const Kernels& kernels;
  const StorageKernels& storage;
  const BlockKernels<T>& block;
  int64_t num_adapters;
  std::vector<int64_t> first;  // [N + 1] into the R rows of A
  std::vector<T> factor;       // [N] w_n s_n
  int64_t R, ldr, ld, cols, rows_per_block;
  Buffer<T> A;  // [R, ld]

  explicit Layout(const MergeLoraParams& p)
      : params(p),
        kernels(active_kernels()),
        storage(kernels.storage[static_cast<int>(p.dtype)]),
        block(block_kernels<T>(kernels)),
        num_adapters(static_cast<int64_t>(p.ranks.size())),
        first(offsets_of(p.ranks)),
        factor(num_adapters),
        R(first.back()),
        ldr(leading_dimension<T>(R)),
        ld(leading_dimension<T>(p.d)),
        cols(padded<T>(kernels, p.d)),
        rows_per_block(block_rows<T>(p.d)),
        A(R * ld) {
    for (int64_t n = 0; n < num_adapters; ++n) {
      factor[n] = static_cast<T>(p.scale[n] * p.weights[n]);
      storage.load(p.A[n].data, p.A[n].ld, p.ranks[n], p.d, A.get() + first[n] * ld, ld);
    }
  }
  int64_t blocks() const { return ceil_div(params.o, rows_per_block); }
  int threads() const {
    return useful_threads(params.threads, double(params.o) * params.d * (2 + R));
  }
  // dst[rows, R] = rows of all B_n side by side
  void load_B(int64_t start, int64_t rows, T* dst) const {
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t n = 0; n < num_adapters; ++n) {
        // a load pads with zeros up to a whole vector: the next adapter's load overwrites them
        storage.load(params.B[n].row(start + i, params.dtype), 0, 1, params.ranks[n],
                     dst + i * ldr + first[n], 0);
      }
    }
  }
};

template <class T>
void forward(const MergeLoraParams& params) {
  const Layout<T> layout(params);
  const int threads = layout.threads();
  const int64_t rows_ldr = layout.rows_per_block * layout.ldr;
  const int64_t per_thread = layout.rows_per_block * layout.ld + rows_ldr + 64;
  const Buffer<T> scratch(threads * per_thread);
  parallel_for(layout.blocks(), threads, [&](int64_t item, int thread) {
    T* result = scratch.get() + thread * per_thread;
    T* B = result + layout.rows_per_block * layout.ld;
    const int64_t start = item * layout.rows_per_block;
    const int64_t rows = std::min(layout.rows_per_block, params.o - start);
    layout.storage.load(params.W.row(start, params.dtype), params.W.ld, rows, params.d, result,
                        layout.ld);
    layout.load_B(start, rows, B);
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t n = 0; n < layout.num_adapters; ++n)
        for (int64_t j = layout.first[n]; j < layout.first[n + 1]; ++j)
          B[i * layout.ldr + j] *= layout.factor[n];
    layout.block.gemm_nn(B, layout.ldr, 1, layout.A.get(), layout.ld, result, layout.ld, rows,
                         layout.cols, layout.R, true, nullptr);
    layout.storage.store(result, layout.ld, rows, params.d, params.out.row(start, params.dtype),
                         params.out.ld);
  });
}

template <class T>
void backward(MergeLoraParams& params) {
  const Layout<T> layout(params);
  const bool need_A = !params.d_A.empty(), need_B = !params.d_B.empty();
  const int threads = layout.threads();
  const int64_t ld = layout.ld, ldr = layout.ldr, R = layout.R;
  const int64_t rows_ldr = layout.rows_per_block * ldr;
  const int64_t per_thread = layout.rows_per_block * ld + 2 * rows_ldr + 64;
  const Buffer<T> scratch(threads * per_thread);
  const int64_t num_slabs = std::min(layout.blocks(), kMaxSlabs);
  const int64_t stride = R * ld;
  const Buffer<T> d_A(need_A ? num_slabs * stride : 0);
  std::vector<double> products(num_slabs * layout.num_adapters, 0.0);

  parallel_for(num_slabs, threads, [&](int64_t slab, int thread) {
    T* upstream = scratch.get() + thread * per_thread;
    T* d_B = upstream + layout.rows_per_block * ld;  // [rows, R], d_out A^T
    T* B = d_B + rows_ldr;
    const int64_t begin = layout.blocks() * slab / num_slabs;
    const int64_t end = layout.blocks() * (slab + 1) / num_slabs;
    for (int64_t item = begin; item < end; ++item) {
      const int64_t start = item * layout.rows_per_block;
      const int64_t rows = std::min(layout.rows_per_block, params.o - start);
      layout.storage.load(params.d_out.row(start, params.dtype), params.d_out.ld, rows, params.d,
                          upstream, ld);
      if (need_A || params.need_products) layout.load_B(start, rows, B);
      if (need_B || params.need_products)
        layout.block.gemm_nt(upstream, ld, layout.A.get(), ld, d_B, ldr, rows, R, layout.cols,
                             nullptr);
      if (params.need_products) {
        for (int64_t n = 0; n < layout.num_adapters; ++n) {
          double total = 0;
          for (int64_t i = 0; i < rows; ++i)
            for (int64_t j = layout.first[n]; j < layout.first[n + 1]; ++j)
              total += double(d_B[i * ldr + j]) * B[i * ldr + j];
          products[slab * layout.num_adapters + n] += total;
        }
      }
      if (need_A)
        layout.block.gemm_nn(B, 1, ldr, upstream, ld, d_A.get() + slab * stride, ld, R, layout.cols,
                             rows, item > begin, nullptr);
      if (need_B) {
        for (int64_t n = 0; n < layout.num_adapters; ++n) {
          for (int64_t i = 0; i < rows; ++i)
            for (int64_t j = layout.first[n]; j < layout.first[n + 1]; ++j)
              d_B[i * ldr + j] *= layout.factor[n];
          layout.storage.store(d_B + layout.first[n], ldr, rows, params.ranks[n],
                               params.d_B[n].row(start, params.dtype), params.d_B[n].ld);
        }
      }
    }
  });

  std::vector<SlabSum<T>> sums;
  for (int64_t n = 0; n < layout.num_adapters; ++n) {
    if (params.need_products)
      for (int64_t slab = 0; slab < num_slabs; ++slab)
        params.products[n] += products[slab * layout.num_adapters + n];
    if (need_A)
      sums.push_back({d_A.get(), layout.first[n] * ld, num_slabs, stride, ld, params.ranks[n],
                      params.d, layout.factor[n], false, params.d_A[n]});
  }
  store_slab_sums(layout.kernels, params.dtype, sums, params.threads);
}

}  // namespace

void merge_lora_forward(const MergeLoraParams& params) {
  params.dtype == DType::kFloat64 ? forward<double>(params) : forward<float>(params);
}

void merge_lora_backward(MergeLoraParams& params) {
  params.dtype == DType::kFloat64 ? backward<double>(params) : backward<float>(params);
}

}  // namespace mima::cpu
