// One call of an operator on CUDA: a table for the device, built on the host from params.h, and the
// launches that read it. The Python side copies the table to the device, owns every allocation, and
// has made the device current.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <string>
#include <vector>

#include "params.h"

namespace mima::cuda {

// Compute capabilities that nvcc compiled for, as 800 for sm_80, in ascending order; empty where
// another compiler did.
std::vector<int> built_archs();

// Arrays one after the other, each at a multiple of 16 bytes, known by their offsets.
class Table {
 public:
  static constexpr int64_t kAbsent = -1;

  template <class T>
  int64_t add(const std::vector<T>& values) {
    const size_t offset = (bytes_.size() + 15) / 16 * 16;
    bytes_.resize(offset + values.size() * sizeof(T));
    const char* from = reinterpret_cast<const char*>(values.data());
    std::copy(from, from + values.size() * sizeof(T), bytes_.begin() + offset);
    return static_cast<int64_t>(offset);
  }
  // Absent arrays are null on the device.
  template <class T>
  int64_t add_optional(const std::vector<T>& values) {
    return values.empty() ? kAbsent : add(values);
  }
  std::vector<char>& bytes() { return bytes_; }

 private:
  std::vector<char> bytes_;
};

class WeightedMergeCall {
 public:
  explicit WeightedMergeCall(const WeightedMergeParams& params);
  Table& table() { return table_; }
  int64_t num_pieces() const { return num_pieces_; }
  void forward(uint64_t table, uint64_t stream) const;
  // partial: [num_pieces, N] float64 on the device, or 0 where d_weights is not needed.
  void backward(uint64_t table, uint64_t partial, uint64_t stream) const;

 private:
  DType dtype_;
  Table table_;
  int64_t num_tensors_, num_pieces_;
  int num_concepts_;
  double base_weight_ = 1;
  int64_t pieces_, aligned_, base_, thetas_, weights_, out_, d_out_, d_base_, d_thetas_;
  std::string shape_;
};

// An elementwise function of lists of tensors.
class ListsCall {
 public:
  Table& table() { return table_; }

 protected:
  // An empty list of outputs is one that is not needed; `in` and `out` may be lists joined.
  void fill(const char* op, DType dtype, const std::vector<int64_t>& sizes,
            std::initializer_list<const std::vector<void*>*> in,
            std::initializer_list<const std::vector<void*>*> out);
  template <class T, int IN, int OUT, class F>
  void run(uint64_t table, uint64_t stream, const F& f) const;

  DType dtype_;
  Table table_;
  int64_t num_tensors_, num_pieces_;

 private:
  const char* op_;
  int64_t pieces_, aligned_, in_, out_;
  std::string shape_;
};

class CombineCall : public ListsCall {
 public:
  explicit CombineCall(const CombineParams& params);
  void launch(uint64_t table, uint64_t stream) const;

 private:
  template <class T, int IN, int OUT>
  void run_of(uint64_t table, uint64_t stream) const;

  int num_in_, num_out_;
  double factors_[CombineParams::kMost * CombineParams::kMost];
};

// A step or, where its parameters have no z, the pullback of one.
class AdamStepCall : public ListsCall {
 public:
  explicit AdamStepCall(const AdamStepParams& params);
  void launch(uint64_t table, uint64_t stream) const;

 private:
  AdamRule rule_;
  bool is_backward_;
};

class ProjectedMergeCall {
 public:
  explicit ProjectedMergeCall(const ProjectedMergeParams& params);
  Table& table() { return table_; }
  int64_t all_rows() const { return all_rows_; }
  int64_t num_tokens() const { return num_tokens_; }
  int64_t num_chunks() const { return num_chunks_; }
  // coefficients: [all_rows, num_tokens] accumulators to be written, or 0.
  void forward(uint64_t table, uint64_t coefficients, uint64_t stream) const;
  void backward(uint64_t table, uint64_t coefficients, uint64_t stream) const;
  // partial [num_chunks, num_tokens, d] from coefficients; differences: of W - W0, else of d_out.
  void sums(uint64_t table, uint64_t coefficients, bool differences, uint64_t partial,
            uint64_t stream) const;

 private:
  friend struct ProjectLaunch;
  DType dtype_;
  Table table_;
  int64_t num_layers_, d_, all_rows_, num_tokens_, num_blocks_, num_chunks_, num_tiles_;
  int num_concepts_, warps_;
  int64_t blocks_, rows_, first_token_, W0_, W_, C_, M_, out_, d_out_, d_W0_, d_W_, first_row_;
  int64_t chunks_, tiles_;
  std::string shape_;
};

}  // namespace mima::cuda
