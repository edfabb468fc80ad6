// combine and adam_step: the table of a call, and its launches.
#include <algorithm>
#include <initializer_list>
#include <vector>

#include "cuda/launch.cuh"
#include "cuda/lists_kernel.cuh"
#include "cuda/ops.h"

namespace mima::cuda {

std::vector<int> built_archs() {
#ifdef __CUDA_ARCH_LIST__
  return {__CUDA_ARCH_LIST__};
#else
  return {};
#endif
}

void ListsCall::fill(const char* op, DType dtype, const std::vector<int64_t>& sizes,
                     std::initializer_list<const std::vector<void*>*> in,
                     std::initializer_list<const std::vector<void*>*> out) {
  op_ = op;
  dtype_ = dtype;
  num_tensors_ = static_cast<int64_t>(sizes.size());
  std::vector<int64_t> pieces, aligned(sizes.size(), 1);
  int64_t elements = 0;
  for (int64_t p = 0; p < num_tensors_; ++p) {
    elements += sizes[p];
    for (int64_t start = 0; start < sizes[p]; start += kListPiece)
      pieces.insert(pieces.end(), {p, start, std::min<int64_t>(kListPiece, sizes[p] - start)});
  }
  // an empty list is one that is not needed
  const auto addresses = [&](std::initializer_list<const std::vector<void*>*> lists) {
    std::vector<uint64_t> result;
    for (const auto* list : lists) {
      for (size_t i = 0; i < list->size(); ++i) {
        const auto address = reinterpret_cast<uint64_t>((*list)[i]);
        if (address % 16 != 0) aligned[i % sizes.size()] = 0;
        result.push_back(address);
      }
      if (list->empty()) result.insert(result.end(), sizes.size(), 0);
    }
    return result;
  };
  const auto from = addresses(in), to = addresses(out);
  num_pieces_ = static_cast<int64_t>(pieces.size()) / 3;
  pieces_ = table_.add(pieces);
  aligned_ = table_.add(aligned);
  in_ = table_.add(from);
  out_ = table_.add(to);
  shape_ = std::to_string(num_tensors_) + " tensors, " + std::to_string(elements) + " elements";
}

template <class T, int IN, int OUT, class F>
void ListsCall::run(uint64_t table, uint64_t stream, const F& f) const {
  const ListTable arrays{.pieces = at<int64_t>(table, pieces_),
                         .aligned = at<int64_t>(table, aligned_),
                         .in = at<uint64_t>(table, in_),
                         .out = at<uint64_t>(table, out_)};
  mima::cuda::launch(op_, shape_, {dim3(num_pieces_), kListThreads, 0}, stream,
                     &lists_kernel<T, IN, OUT, F>, arrays, num_tensors_, f);
}

CombineCall::CombineCall(const CombineParams& params)
    : num_in_(params.num_in), num_out_(params.num_out) {
  std::copy(std::begin(params.factors), std::end(params.factors), factors_);
  fill("combine", params.dtype, params.sizes, {&params.x}, {&params.out});
}

template <class T, int IN, int OUT>
void CombineCall::run_of(uint64_t table, uint64_t stream) const {
  Combine<Acc<T>, IN, OUT> f;
  for (int i = 0; i < OUT; ++i)
    for (int j = 0; j < IN; ++j) f.factors[i][j] = static_cast<Acc<T>>(factors_[i * IN + j]);
  run<T, IN, OUT>(table, stream, f);
}

void CombineCall::launch(uint64_t table, uint64_t stream) const {
  if (num_pieces_ == 0 || num_out_ == 0) return;
  with_type(dtype_, [&](auto type) {
    using T = decltype(type);
    using Run = void (CombineCall::*)(uint64_t, uint64_t) const;
    constexpr int kMost = CombineParams::kMost;
    const Run runs[kMost][kMost] = {{&CombineCall::run_of<T, 1, 1>, &CombineCall::run_of<T, 1, 2>,
                                     &CombineCall::run_of<T, 1, 3>},
                                    {&CombineCall::run_of<T, 2, 1>, &CombineCall::run_of<T, 2, 2>,
                                     &CombineCall::run_of<T, 2, 3>},
                                    {&CombineCall::run_of<T, 3, 1>, &CombineCall::run_of<T, 3, 2>,
                                     &CombineCall::run_of<T, 3, 3>}};
    (this->*runs[num_in_ - 1][num_out_ - 1])(table, stream);
  });
}

AdamStepCall::AdamStepCall(const AdamStepParams& params)
    : rule_(params.rule), is_backward_(params.z.empty()) {
  if (is_backward_)
    fill("adam_step backward", params.dtype, params.sizes,
         {&params.bar_z, &params.bar_m, &params.bar_v, &params.g, &params.m, &params.v},
         {&params.d_z, &params.d_g, &params.d_m, &params.d_v});
  else
    fill("adam_step forward", params.dtype, params.sizes,
         {&params.z, &params.g, &params.m, &params.v},
         {&params.out_z, &params.out_m, &params.out_v});
}

void AdamStepCall::launch(uint64_t table, uint64_t stream) const {
  if (num_pieces_ == 0) return;
  with_type(dtype_, [&](auto type) {
    using T = decltype(type);
    if (is_backward_)
      run<T, 6, 4>(table, stream, AdamBackward<Acc<T>>(rule_));
    else
      run<T, 4, 3>(table, stream, AdamForward<Acc<T>>(rule_));
  });
}

}  // namespace mima::cuda
