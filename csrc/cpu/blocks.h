// What the operators share: aligned memory, padding, and splitting of rows into blocks and slabs.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>
#include <utility>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/thread_pool.h"

namespace mima {

// Memory that a thread has used and not given back: pages that the system would otherwise hand out,
// zeroed, once more at each call, which for a small layer takes longer than computing it.
class KeptMemory {
 public:
  ~KeptMemory() {
    for (Block& block : blocks_) std::free(block.data);
  }

  // At least `bytes`; `bytes` becomes what there is.
  void* take(size_t& bytes) {
    for (Block& block : blocks_) {
      if (block.bytes < bytes || block.bytes / 2 > bytes) continue;
      bytes = block.bytes;
      return std::exchange(block, Block{}).data;
    }
    return std::aligned_alloc(64, bytes);
  }

  void give(void* data, size_t bytes) {
    if (bytes > kLargest) return std::free(data);
    Block& oldest = blocks_[next_++ % kBlocks];
    std::free(oldest.data);
    oldest = {data, bytes};
  }

 private:
  static constexpr size_t kBlocks = 7;  // the most that one operator holds at a time
  static constexpr size_t kLargest = 16 << 20;
  struct Block {
    void* data = nullptr;
    size_t bytes = 0;
  };
  Block blocks_[kBlocks];
  size_t next_ = 0;
};

inline KeptMemory& kept_memory() {
  static thread_local KeptMemory memory;
  return memory;
}

// Uninitialised memory, aligned to a cache line.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t size) {
    if (size <= 0) return;
    bytes_ = (static_cast<size_t>(size) * sizeof(T) + 63) / 64 * 64;
    data_ = static_cast<T*>(kept_memory().take(bytes_));
    if (data_ == nullptr) throw std::bad_alloc();
  }
  ~Buffer() {
    if (data_ != nullptr) kept_memory().give(data_, bytes_);
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  T* get() const { return data_; }

 private:
  T* data_ = nullptr;
  size_t bytes_ = 0;
};

inline int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// Columns padded to whole vectors.
template <class T>
int64_t padded(const Kernels& kernels, int64_t cols) {
  const int64_t lanes = kernels.vector_bytes / static_cast<int64_t>(sizeof(T));
  return ceil_div(cols, lanes) * lanes;
}

// A leading dimension for packed operands: whole cache lines, and no multiple of 1 KiB, whose rows
// would fall into few sets of the first-level cache and evict each other.
template <class T>
int64_t leading_dimension(int64_t cols) {
  constexpr int64_t line = 64 / static_cast<int64_t>(sizeof(T));
  const int64_t ld = ceil_div(std::max<int64_t>(cols, 1), line) * line;
  return ld * static_cast<int64_t>(sizeof(T)) % 1024 == 0 ? ld + line : ld;
}

// Rows that pass through the kernels together: 16 where a block of them, in the accumulator type,
// takes at most 64 KiB, so that the few blocks in use stay in the second-level cache.
template <class T>
int64_t block_rows(int64_t cols) {
  const int64_t fitting =
      (64 << 10) / (std::max<int64_t>(cols, 1) * static_cast<int64_t>(sizeof(T)));
  return std::clamp<int64_t>(fitting / 4 * 4, 4, 16);
}

// Columns of a panel of b[k, n]: the widest there are, or n in whole vectors where that is less.
template <class T>
int64_t panel_width(const Kernels& kernels, int64_t n) {
  return std::min(block_kernels<T>(kernels).widest_panel, padded<T>(kernels, n));
}

// Elements of b[k, n] in panels.
template <class T>
int64_t panels_size(const Kernels& kernels, int64_t k, int64_t n) {
  return n == 0 ? 0 : ceil_div(n, panel_width<T>(kernels, n)) * panel_width<T>(kernels, n) * k;
}

// Prefix sums: offsets[i] = sizes[0] + ... + sizes[i - 1].
inline std::vector<int64_t> offsets_of(const std::vector<int64_t>& sizes) {
  std::vector<int64_t> offsets(sizes.size() + 1, 0);
  for (size_t i = 0; i < sizes.size(); ++i) offsets[i + 1] = offsets[i] + sizes[i];
  return offsets;
}

// Threads worth waking for this much work, in elementary operations: below some 20 microseconds per
// thread the wake-up costs more than it saves.
inline int useful_threads(int threads, double operations) {
  const double useful = operations / 200e3 + 1;
  return useful < threads ? static_cast<int>(useful) : threads;
}

// Results of at least this many bytes are written past the caches. An ordinary store reads the line
// that it overwrites: for N = 3, a sixth of all traffic. Smaller results are left in the caches for
// whoever reads them next.
constexpr double kStreamBytes = 16 << 20;

// Lists of tensors as one stream, split into pieces of about kPieceElements: each a run of one
// tensor, or several small tensors together.
constexpr int64_t kPieceElements = 64 << 10;

struct Run {
  int64_t tensor, start, size;
};

struct Pieces {
  std::vector<Run> runs;
  std::vector<int64_t> first_run;  // [pieces + 1]
  int64_t elements = 0;

  explicit Pieces(const std::vector<int64_t>& sizes) {
    int64_t room = 0;
    for (size_t p = 0; p < sizes.size(); ++p) {
      elements += sizes[p];
      for (int64_t start = 0; start < sizes[p];) {
        if (room == 0) {
          first_run.push_back(static_cast<int64_t>(runs.size()));
          room = kPieceElements;
        }
        const int64_t size = std::min(room, sizes[p] - start);
        runs.push_back({static_cast<int64_t>(p), start, size});
        start += size;
        room -= size;
      }
    }
    first_run.push_back(static_cast<int64_t>(runs.size()));
  }
  int64_t count() const { return static_cast<int64_t>(first_run.size()) - 1; }
};

inline void* at(void* base, int64_t element, DType dtype) {
  return static_cast<char*>(base) + element * static_cast<int64_t>(item_size(dtype));
}

// Sums over rows are split into at most this many slabs, whatever the number of threads, and the
// slabs are added in order: the result does not depend on how many threads there are.
constexpr int64_t kMaxSlabs = 32;

// Sets a matrix to zero.
inline void store_zeros(DType dtype, int64_t rows, int64_t cols, const Matrix& out) {
  for (int64_t i = 0; i < rows; ++i)
    std::memset(out.row(i, dtype), 0, static_cast<size_t>(cols) * item_size(dtype));
}

// A sum over slabs, stored as it is or transposed.
template <class T>
struct SlabSum {
  T* slabs;  // the first of `count`, which is overwritten, at `offset`; the next are `stride` apart
  int64_t offset, count, stride, ld;
  int64_t rows, cols;
  T factor;
  bool transposed;
  Matrix out;  // [rows, cols] or its transpose; zeros where there are no slabs
};

// Computes the sums, vectors' lanes of rows at a time.
template <class T>
void store_slab_sums(const Kernels& kernels, DType dtype, const std::vector<SlabSum<T>>& sums,
                     int threads) {
  const BlockKernels<T>& block = block_kernels<T>(kernels);
  const StorageKernels& storage = kernels.storage[static_cast<int>(dtype)];
  const int64_t lanes = kernels.vector_bytes / static_cast<int64_t>(sizeof(T));
  std::vector<int64_t> groups;
  int64_t longest = 0;
  double additions = 0;
  for (const SlabSum<T>& sum : sums) {
    groups.push_back(sum.count == 0 ? 0 : ceil_div(sum.rows, lanes));
    if (sum.transposed) longest = std::max(longest, sum.cols);
    additions += double(sum.count) * sum.rows * sum.cols;
    if (sum.count == 0)
      store_zeros(dtype, sum.transposed ? sum.cols : sum.rows, sum.transposed ? sum.rows : sum.cols,
                  sum.out);
  }
  const std::vector<int64_t> first = offsets_of(groups);
  threads = useful_threads(threads, additions / 4);
  const Buffer<T> scratch(threads * longest * lanes);
  parallel_for(first.back(), threads, [&](int64_t item, int thread) {
    const int64_t index = std::upper_bound(first.begin(), first.end(), item) - first.begin() - 1;
    const SlabSum<T>& sum = sums[index];
    const int64_t start = (item - first[index]) * lanes;
    const int64_t rows = std::min(lanes, sum.rows - start);
    T* total = sum.slabs + sum.offset + start * sum.ld;
    for (int64_t i = 0; i < rows && (sum.count > 1 || sum.factor != T(1)); ++i)
      block.sum(total + i * sum.ld, sum.count, sum.stride, padded<T>(kernels, sum.cols), sum.factor,
                total + i * sum.ld);
    if (!sum.transposed)
      return storage.store(total, sum.ld, rows, sum.cols, sum.out.row(start, dtype), sum.out.ld);
    T* columns = scratch.get() + thread * longest * lanes;
    block.pack_panel(total, 1, sum.ld, sum.cols, rows, T(1), lanes, 0, columns);
    storage.store(columns, lanes, sum.cols, rows,
                  static_cast<char*>(sum.out.data) + start * item_size(dtype), sum.out.ld);
  });
}

}  // namespace mima
