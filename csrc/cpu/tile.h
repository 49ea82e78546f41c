// Tiles: kLanes channels of a strided tensor as rows of vectors, one row a time step, in fp32 or fp64.
//
// This is the only place that knows storage dtypes and layouts; the kernels see tile[t * kLanes + lane]. Three roads in and out:
// channels contiguous (vector rows), time contiguous (transposed blocks), anything else (element by element).
// Lanes beyond the valid channels are zero on load and left alone on store.
#pragma once
#include <cstdlib>

#include "cpu/simd.h"

namespace pixelbytes {
namespace {

inline float half_to_float(uint16_t h) {
#if defined(__F16C__)
  return _cvtsh_ss(h);
#else
  // 2^112 re-biases the exponent; subnormals come out right because the product is exact.
  uint32_t magnitude = uint32_t(h & 0x7fff) << 13;
  float f;
  memcpy(&f, &magnitude, 4);
  f *= 0x1p112f;
  uint32_t bits;
  memcpy(&bits, &f, 4);
  if ((h & 0x7c00) == 0x7c00) bits = 0x7f800000u | (uint32_t(h & 0x3ff) << 13);
  bits |= uint32_t(h & 0x8000) << 16;
  memcpy(&f, &bits, 4);
  return f;
#endif
}
inline uint16_t float_to_half(float f) {
#if defined(__F16C__)
  return _cvtss_sh(f, 0);
#else
  uint32_t bits;
  memcpy(&bits, &f, 4);
  const uint16_t sign = uint16_t((bits >> 16) & 0x8000);
  bits &= 0x7fffffff;
  if (bits > 0x7f800000) return sign | 0x7e00;
  if (bits >= 0x477ff000) return sign | 0x7c00;  // rounds to 65536 or more
  if (bits < 0x38800000) {                       // subnormal half: let the float adder round at 2^-24
    float magnitude;
    memcpy(&magnitude, &bits, 4);
    magnitude += 0.5f;
    memcpy(&bits, &magnitude, 4);
    return uint16_t(sign | (bits - 0x3f000000));
  }
  bits += 0xfff + ((bits >> 13) & 1);
  return uint16_t(sign | ((bits - 0x38000000) >> 13));
#endif
}
inline float bfloat_to_float(uint16_t b) {
  const uint32_t bits = uint32_t(b) << 16;
  float f;
  memcpy(&f, &bits, 4);
  return f;
}
inline uint16_t float_to_bfloat(float f) {
  uint32_t bits;
  memcpy(&bits, &f, 4);
  if ((bits & 0x7fffffff) > 0x7f800000) return uint16_t((bits >> 16) | 0x40);
  return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

template <class T>
inline T load_element(const char* p, DType dtype) {
  switch (dtype) {
    case DType::f32: { float v; memcpy(&v, p, 4); return T(v); }
    case DType::f64: { double v; memcpy(&v, p, 8); return T(v); }
    case DType::f16: { uint16_t v; memcpy(&v, p, 2); return T(half_to_float(v)); }
    default: { uint16_t v; memcpy(&v, p, 2); return T(bfloat_to_float(v)); }
  }
}
template <class T>
inline void store_element(char* p, DType dtype, T x) {
  switch (dtype) {
    case DType::f32: { const float v = float(x); memcpy(p, &v, 4); break; }
    case DType::f64: { const double v = double(x); memcpy(p, &v, 8); break; }
    case DType::f16: { const uint16_t v = float_to_half(float(x)); memcpy(p, &v, 2); break; }
    default: { const uint16_t v = float_to_bfloat(float(x)); memcpy(p, &v, 2); break; }
  }
}
inline int64_t load_index(const char* p, DType dtype) {
  switch (dtype) {
    case DType::u8: return *reinterpret_cast<const uint8_t*>(p);
    case DType::i8: return *reinterpret_cast<const int8_t*>(p);
    case DType::i16: { int16_t v; memcpy(&v, p, 2); return v; }
    case DType::i32: { int32_t v; memcpy(&v, p, 4); return v; }
    default: { int64_t v; memcpy(&v, p, 8); return v; }
  }
}

// `count` <= kLanes contiguous elements.
template <class T>
inline Vec<T> load_run(const char* p, DType dtype, int count) {
  constexpr int W = kLanes<T>;
  if (sizeof(T) == 4 && count == W) {
    if (dtype == DType::f32) return load(reinterpret_cast<const T*>(p));
#if defined(__AVX512F__)
    if (dtype == DType::f16) return (Vec<T>)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    if (dtype == DType::bf16)
      return (Vec<T>)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16);
#endif
  }
  if (sizeof(T) == 8 && count == W && dtype == DType::f64) return load(reinterpret_cast<const T*>(p));
  Vec<T> v = {};
  for (int i = 0; i < count; ++i) v[i] = load_element<T>(p + i * item_size(dtype), dtype);
  return v;
}
template <class T>
inline void store_run(char* p, DType dtype, int count, Vec<T> v) {
  constexpr int W = kLanes<T>;
  if (sizeof(T) == 4 && count == W) {
    if (dtype == DType::f32) return store(reinterpret_cast<T*>(p), v);
#if defined(__AVX512F__)
    if (dtype == DType::f16) return _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph((__m512)v, 0));
#endif
  }
  if (sizeof(T) == 8 && count == W && dtype == DType::f64) return store(reinterpret_cast<T*>(p), v);
  for (int i = 0; i < count; ++i) store_element<T>(p + i * item_size(dtype), dtype, v[i]);
}

// A plane of a tensor: element (channel, time) at data + (channel * channel_stride + time * time_stride) items.
struct Plane {
  char* data = nullptr;
  DType dtype = DType::none;
  int64_t channel_stride = 0, time_stride = 0;

  explicit operator bool() const { return data != nullptr; }
  char* at(int64_t channel, int64_t time) const {
    return data + (channel * channel_stride + time * time_stride) * item_size(dtype);
  }
};
inline Plane plane(const Tensor& t, int64_t batch) {  // (batch, channel, time)
  if (!t) return {};
  return {t.at(batch), t.dtype, t.stride[1], t.stride[2]};
}

template <class T>
inline void load_tile(const Plane& p, int64_t channel, int channels, int64_t time, int64_t steps, T* tile) {
  constexpr int W = kLanes<T>;
  if (p.channel_stride == 1) {
    for (int64_t t = 0; t < steps; ++t) store(tile + t * W, load_run<T>(p.at(channel, time + t), p.dtype, channels));
    return;
  }
  int64_t t = 0;
  if (p.time_stride == 1) {
    for (; t + W <= steps; t += W) {
      Vec<T> block[W];
      for (int c = 0; c < W; ++c) block[c] = c < channels ? load_run<T>(p.at(channel + c, time + t), p.dtype, W) : Vec<T>{};
      transpose<T>(block);
      for (int i = 0; i < W; ++i) store(tile + (t + i) * W, block[i]);
    }
  }
  for (; t < steps; ++t)
    for (int c = 0; c < W; ++c) tile[t * W + c] = c < channels ? load_element<T>(p.at(channel + c, time + t), p.dtype) : T(0);
}

template <class T>
inline void store_tile(const Plane& p, int64_t channel, int channels, int64_t time, int64_t steps, const T* tile) {
  constexpr int W = kLanes<T>;
  if (p.channel_stride == 1) {
    for (int64_t t = 0; t < steps; ++t) store_run<T>(p.at(channel, time + t), p.dtype, channels, load(tile + t * W));
    return;
  }
  int64_t t = 0;
  if (p.time_stride == 1) {
    for (; t + W <= steps; t += W) {
      Vec<T> block[W];
      for (int i = 0; i < W; ++i) block[i] = load(tile + (t + i) * W);
      transpose<T>(block);
      for (int c = 0; c < channels; ++c) store_run<T>(p.at(channel + c, time + t), p.dtype, W, block[c]);
    }
  }
  for (; t < steps; ++t)
    for (int c = 0; c < channels; ++c) store_element<T>(p.at(channel + c, time + t), p.dtype, tile[t * W + c]);
}

// One value per channel, from a (dim) tensor.
template <class T>
inline Vec<T> load_channels(const Tensor& t, int64_t channel, int channels) {
  Vec<T> v = {};
  for (int c = 0; c < channels; ++c) v[c] = load_element<T>(t.at(channel + c), t.dtype);
  return v;
}

// Scratch memory of one task, 64-byte aligned, handed out in pieces.
class Scratch {
 public:
  explicit Scratch(int64_t bytes) : base_(static_cast<char*>(aligned_alloc(64, round(bytes)))), next_(base_) {}
  ~Scratch() { free(base_); }
  Scratch(const Scratch&) = delete;
  explicit operator bool() const { return base_ != nullptr; }

  template <class T>
  T* take(int64_t count) {
    T* p = reinterpret_cast<T*>(next_);
    next_ += round(count * int64_t(sizeof(T)));
    return p;
  }
  static constexpr int64_t round(int64_t bytes) { return (bytes + 63) / 64 * 64 + 64; }

 private:
  char *base_, *next_;
};

}  // namespace
}  // namespace pixelbytes
