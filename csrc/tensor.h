// A tensor as the kernels see it: pointer, dtype, sizes, strides. No torch headers anywhere under csrc/.
#pragma once
#include <cstdint>

namespace pixelbytes {

enum class DType : int { f32, f64, f16, bf16, u8, i8, i16, i32, i64, none };

constexpr int64_t item_size(DType t) {
  switch (t) {
    case DType::f64:
    case DType::i64: return 8;
    case DType::f32:
    case DType::i32: return 4;
    case DType::f16:
    case DType::bf16:
    case DType::i16: return 2;
    default: return 1;
  }
}

constexpr int kMaxDims = 5;

// `data == nullptr` stands for Python's None. Strides count elements and may be zero or negative.
struct Tensor {
  char* data = nullptr;
  DType dtype = DType::none;
  int ndim = 0;
  int64_t size[kMaxDims] = {};
  int64_t stride[kMaxDims] = {};

  explicit operator bool() const { return data != nullptr; }
  char* at(int64_t i) const { return data + i * stride[0] * item_size(dtype); }
  char* at(int64_t i, int64_t j) const { return data + (i * stride[0] + j * stride[1]) * item_size(dtype); }
  char* at(int64_t i, int64_t j, int64_t k) const {
    return data + (i * stride[0] + j * stride[1] + k * stride[2]) * item_size(dtype);
  }
};

}  // namespace pixelbytes
