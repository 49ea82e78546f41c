// Gradients that are summed over tasks: every task writes its own part, each number of it, and the parts are added in order at the end.
#pragma once
#include <cstdlib>
#include <cstring>

#include "cpu/large.h"

namespace pixelbytes {
namespace {

template <class T>
class PartialSum {
 public:
  PartialSum() = default;
  ~PartialSum() {
    if (data_ != out_) free(data_);
  }
  PartialSum(const PartialSum&) = delete;

  // Room for (parts, size) that become the contiguous `out`, which is the only part itself; nothing where `out` is null. False: out of memory.
  bool open(const Tensor& out, int64_t parts, int64_t size) {
    if (!out) return true;
    out_ = reinterpret_cast<T*>(out.data), parts_ = parts, size_ = size;
    if (parts == 1) {
      data_ = out_;
      return true;
    }
    data_ = static_cast<T*>(malloc((size_t(parts * size) + 1) * sizeof(T)));
    ask_for_huge_pages(data_, parts * size * int64_t(sizeof(T)));
    return data_ != nullptr;
  }
  T* data() const { return data_; }
  T* part(int64_t i) const { return data_ ? data_ + i * size_ : nullptr; }
  void close(int threads) const {
    if (data_ == out_) return;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t begin = 0; begin < size_; begin += kPiece) {
      const int64_t count = size_ - begin < kPiece ? size_ - begin : kPiece;
      T* sum = out_ + begin;
      memcpy(sum, data_ + begin, size_t(count) * sizeof(T));
      for (int64_t k = 1; k < parts_; ++k) {
        const T* part = data_ + k * size_ + begin;
        for (int64_t i = 0; i < count; ++i) sum[i] += part[i];
      }
    }
  }

 private:
  static constexpr int64_t kPiece = 1024;  // stays in the L1 cache while the parts are added
  T *data_ = nullptr, *out_ = nullptr;
  int64_t parts_ = 0, size_ = 0;
};

}  // namespace
}  // namespace pixelbytes
