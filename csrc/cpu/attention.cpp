// attention: a head at a time, its queries in strips. A strip has a row of the matrix for each of
// its queries, as many as the second-level cache holds; what is summed over queries is summed
// transposed, so that every product reads its operands along rows.
#include "cpu/blocks.h"
#include "cpu/ops.h"

namespace mima::cpu {
namespace {

constexpr int64_t kStripBytes = 128 << 10;

// One head's operands in the accumulator type, in memory of its own.
template <class T>
class Head {
 public:
  Head(const AttentionParams& params, const Kernels& kernels, int strips, int64_t head)
      : params_(params),
        kernels_(kernels),
        block_(block_kernels<T>(kernels)),
        storage_(kernels.storage[static_cast<int>(params.dtype)]),
        head_(head),
        ld_(leading_dimension<T>(params.S)),
        fitting_(kStripBytes / (ld_ * static_cast<int64_t>(sizeof(T))) / 6 * 6),
        rows_(std::min(params.T, std::clamp<int64_t>(fitting_, 6, 96))),
        width_(padded<T>(kernels, std::max(params.d, params.e))),
        memory_(strips * rows_ * ld_ + 4 * rows_ * width_) {
    T* next = memory_.get();
    for (int i = 0; i < strips; ++i, next += rows_ * ld_) strips_[i] = next;
    for (T*& part : parts_) part = next, next += rows_ * width_;
  }

  int64_t count() const { return ceil_div(params_.T, rows_); }
  int64_t rows(int64_t strip) const { return std::min(rows_, params_.T - strip * rows_); }
  int64_t ld() const { return ld_; }
  int64_t width() const { return width_; }
  T* strip(int i) const { return strips_[i]; }

  // The strip's rows of [n, T, cols], in the place `part`.
  const T* load(const void* x, int64_t cols, int64_t strip, int part) const {
    storage_.load(row(x, params_.T, cols, strip * rows_), cols, rows(strip), cols, parts_[part],
                  width_);
    return parts_[part];
  }

  // c[rows, cols] = the terms' sum
  void multiply(std::initializer_list<PanelTerm<T>> terms, T* c, int64_t ldc, int64_t strip,
                int64_t cols) const {
    block_.gemm_panels(terms.begin(), static_cast<int>(terms.size()), c, ldc, rows(strip), cols,
                       false);
  }

  // The same into the strip's rows of [n, T, cols]; overwrites the place 3.
  void multiply_into(void* out, std::initializer_list<PanelTerm<T>> terms, int64_t strip,
                     int64_t cols) const {
    if (out == nullptr) return;
    multiply(terms, parts_[3], width_, strip, cols);
    storage_.store(parts_[3], width_, rows(strip), cols, row(out, params_.T, cols, strip * rows_),
                   cols);
  }

  // total[cols, S] += x[rows, cols]^T s[rows, S]
  void add(T* total, const T* x, int64_t cols, const T* s, int64_t strip) const {
    block_.gemm_nn(x, 1, width_, s, ld_, total, ld_, cols, padded<T>(kernels_, params_.S),
                   rows(strip), true, nullptr);
  }

  // Panels of x [S, cols] of [n, S, cols], or of its transpose.
  PanelTerm<T> pack(const T* a, int64_t lda, const void* x, int64_t cols, bool transposed, T factor,
                    T* into) const {
    const Buffer<T> whole(params_.S * width_);
    storage_.load(row(x, params_.S, cols, 0), cols, params_.S, cols, whole.get(), width_);
    const int64_t k = transposed ? cols : params_.S, n = transposed ? params_.S : cols;
    const int64_t stride_k = transposed ? 1 : width_, stride_n = transposed ? width_ : 1;
    const int64_t width = panel_width<T>(kernels_, n);
    for (int64_t j = 0; j * width < n; ++j)
      block_.pack_panel(whole.get(), stride_k, stride_n, k, n, factor, width, j, into);
    return {a, lda, into, k};
  }

  // total[cols, S], transposed, into x [S, cols] of [n, S, cols]
  void store(const T* total, void* x, int64_t cols) const {
    const Buffer<T> whole(params_.S * padded<T>(kernels_, cols));
    const int64_t width = padded<T>(kernels_, cols);
    block_.pack_panel(total, 1, ld_, params_.S, cols, T(1), width, 0, whole.get());
    storage_.store(whole.get(), width, params_.S, cols, row(x, params_.S, cols, 0), cols);
  }

 private:
  void* row(const void* x, int64_t length, int64_t cols, int64_t index) const {
    return at(const_cast<void*>(x), (head_ * length + index) * cols, params_.dtype);
  }

  const AttentionParams& params_;
  const Kernels& kernels_;
  const BlockKernels<T>& block_;
  const StorageKernels& storage_;
  int64_t head_, ld_, fitting_, rows_, width_;
  Buffer<T> memory_;
  T* strips_[4];
  T* parts_[4];
};

// Whole cache lines, of either type.
int64_t rounded(int64_t size) {
  return ceil_div(size, 16) * 16;
}

// Memory for packed operands and totals, one after the other.
template <class T>
class Arena {
 public:
  explicit Arena(int64_t size) : memory_(size), next_(memory_.get()) {}
  T* take(int64_t size) { return std::exchange(next_, next_ + rounded(size)); }
  T* zeros(int64_t size) {
    T* taken = take(size);
    std::fill_n(taken, size, T(0));
    return taken;
  }

 private:
  Buffer<T> memory_;
  T* next_;
};

// What an arena hands out for each.
template <class T>
struct Sizes {
  int64_t across, along_d, along_e;  // panels of [cols, S], of [S, d], of [S, e]
  int64_t totals;                    // of [d, S] and [e, S]

  Sizes(const AttentionParams& params, const Kernels& kernels)
      : across(rounded(panels_size<T>(kernels, std::max(params.d, params.e), params.S))),
        along_d(rounded(panels_size<T>(kernels, params.S, params.d))),
        along_e(rounded(panels_size<T>(kernels, params.S, params.e))),
        totals(rounded(params.d * leading_dimension<T>(params.S)) +
               rounded(params.e * leading_dimension<T>(params.S))) {}
};

template <class T>
void forward_head(const AttentionParams& params, const Kernels& kernels, int64_t index) {
  const Head<T> head(params, kernels, 1, index);
  const Sizes<T> sizes(params, kernels);
  Arena<T> arena(sizes.across + sizes.along_e);
  const T scale = static_cast<T>(params.scale);
  const int64_t width = head.width();
  const T* q = nullptr;
  PanelTerm<T> scores =
      head.pack(q, width, params.k, params.d, true, scale, arena.take(sizes.across));
  const PanelTerm<T> values = head.pack(head.strip(0), head.ld(), params.v, params.e, false, T(1),
                                        arena.take(sizes.along_e));
  for (int64_t i = 0; i < head.count(); ++i) {
    scores.a = head.load(params.q, params.d, i, 0);
    head.multiply({scores}, head.strip(0), head.ld(), i, params.S);
    block_kernels<T>(kernels).softmax(head.strip(0), head.ld(), head.rows(i), params.S);
    head.multiply_into(params.out, {values}, i, params.e);
  }
}

template <class T>
void backward_head(const AttentionParams& params, const Kernels& kernels, int64_t index) {
  const BlockKernels<T>& block = block_kernels<T>(kernels);
  const Head<T> head(params, kernels, 2, index);
  const Sizes<T> sizes(params, kernels);
  const int64_t ld = head.ld(), width = head.width(), S = params.S, d = params.d, e = params.e;
  Arena<T> arena(2 * sizes.across + sizes.along_d + sizes.totals);
  const T scale = static_cast<T>(params.scale);
  T *const P = head.strip(0), *const G = head.strip(1);
  PanelTerm<T> scores =
      head.pack(nullptr, width, params.k, d, true, scale, arena.take(sizes.across));
  PanelTerm<T> weights =
      head.pack(nullptr, width, params.v, e, true, T(1), arena.take(sizes.across));
  const PanelTerm<T> keys = head.pack(G, ld, params.k, d, false, T(1), arena.take(sizes.along_d));
  T *const d_k = arena.zeros(d * ld), *const d_v = arena.zeros(e * ld);
  for (int64_t i = 0; i < head.count(); ++i) {
    const T* q = scores.a = head.load(params.q, d, i, 0);
    const T* d_out = weights.a = head.load(params.d_out, e, i, 1);
    head.multiply({scores}, P, ld, i, S);
    head.multiply({weights}, G, ld, i, S);
    block.softmax(P, ld, head.rows(i), S);
    block.softmax_backward(P, G, ld, head.rows(i), S, scale);
    head.multiply_into(params.d_q, {keys}, i, d);
    if (params.d_k != nullptr) head.add(d_k, q, d, G, i);
    if (params.d_v != nullptr) head.add(d_v, d_out, e, P, i);
  }
  if (params.d_k != nullptr) head.store(d_k, params.d_k, d);
  if (params.d_v != nullptr) head.store(d_v, params.d_v, e);
}

template <class T>
void double_backward_head(const AttentionParams& params, const Kernels& kernels, int64_t index) {
  const BlockKernels<T>& block = block_kernels<T>(kernels);
  const Head<T> head(params, kernels, 4, index);
  const Sizes<T> sizes(params, kernels);
  const int64_t ld = head.ld(), width = head.width(), S = params.S, d = params.d, e = params.e;
  Arena<T> arena(4 * sizes.across + 2 * (sizes.along_d + sizes.along_e) + sizes.totals);
  const T scale = static_cast<T>(params.scale);
  // after the rows' step: P, its derivative, and the gradients at the scores of this and of the
  // first backward
  T *const P = head.strip(0), *const P_dot = head.strip(1);
  T *const first = head.strip(2), *const second = head.strip(3);
  const auto across = [&](const void* x, int64_t cols, T factor) {
    return head.pack(nullptr, width, x, cols, true, factor, arena.take(sizes.across));
  };
  const auto along = [&](const T* a, const void* x, int64_t cols, int64_t size) {
    return head.pack(a, ld, x, cols, false, T(1), arena.take(size));
  };
  PanelTerm<T> to_k = across(params.k, d, scale), to_u_k = across(params.u_k, d, scale);
  PanelTerm<T> to_v = across(params.v, e, T(1)), to_u_v = across(params.u_v, e, T(1));
  const PanelTerm<T> of_v = along(P_dot, params.v, e, sizes.along_e);
  const PanelTerm<T> of_u_v = along(P, params.u_v, e, sizes.along_e);
  const PanelTerm<T> of_k = along(second, params.k, d, sizes.along_d);
  const PanelTerm<T> of_u_k = along(first, params.u_k, d, sizes.along_d);
  T *const d_k = arena.zeros(d * ld), *const d_v = arena.zeros(e * ld);
  for (int64_t i = 0; i < head.count(); ++i) {
    const T* q = head.load(params.q, d, i, 0);
    const T* u_q = head.load(params.u_q, d, i, 1);
    const T* d_out = head.load(params.d_out, e, i, 2);
    to_k.a = q;
    head.multiply({to_k}, P, ld, i, S);
    block.softmax(P, ld, head.rows(i), S);
    to_k.a = u_q, to_u_k.a = q;
    head.multiply({to_k, to_u_k}, P_dot, ld, i, S);
    to_v.a = to_u_v.a = d_out;
    head.multiply({to_v}, first, ld, i, S);
    head.multiply({to_u_v}, second, ld, i, S);
    block.softmax_double_backward(P, P_dot, first, second, ld, head.rows(i), S, scale);
    head.multiply_into(params.d_d_out, {of_v, of_u_v}, i, e);
    head.multiply_into(params.d_q, {of_k, of_u_k}, i, d);
    if (params.d_k != nullptr) {
      head.add(d_k, q, d, second, i);
      head.add(d_k, u_q, d, first, i);
    }
    if (params.d_v != nullptr) head.add(d_v, d_out, e, P_dot, i);
  }
  if (params.d_k != nullptr) head.store(d_k, params.d_k, d);
  if (params.d_v != nullptr) head.store(d_v, params.d_v, e);
}

template <class T>
using HeadFunction = void (*)(const AttentionParams&, const Kernels&, int64_t);

void for_heads(const AttentionParams& params, HeadFunction<float> in_float,
               HeadFunction<double> in_double) {
  const Kernels& kernels = active_kernels();
  const double operations = double(params.n) * params.T * params.S * (params.d + params.e);
  const int threads = useful_threads(params.threads, operations / 8);
  const auto run = params.dtype == DType::kFloat64 ? in_double : in_float;
  parallel_for(params.n, threads, [&](int64_t head, int) { run(params, kernels, head); });
}

}  // namespace

void attention_forward(const AttentionParams& params) {
  for_heads(params, forward_head<float>, forward_head<double>);
}

void attention_backward(const AttentionParams& params) {
  for_heads(params, backward_head<float>, backward_head<double>);
}

void attention_double_backward(const AttentionParams& params) {
  for_heads(params, double_backward_head<float>, double_backward_head<double>);
}

}  // namespace mima::cpu
