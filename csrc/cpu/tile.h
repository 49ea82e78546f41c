// Tiles: kLanes channels of a strided tensor as rows of vectors, one row a time step, in fp32 or fp64.
//
// This is the only place that knows storage dtypes and layouts; the kernels see tile[t * kLanes + lane]. Three roads in and out:
// channels contiguous (vector rows), time contiguous (transposed blocks), anything else (element by element).
// Lanes beyond the valid channels are zero on load and left alone on store.
#pragma once
#include <cstdlib>

#include "cpu/large.h"
#include "cpu/simd.h"

namespace pixelbytes {
namespace {

inline float half_to_float(uint16_t h) {
#if defined(__F16C__)
  return _cvtsh_ss(h);
#else
  // 2^112 re-biases the exponent. Not of subnormals: as floats they would be denormal, and may count as zero (denormals.h).
  const uint32_t magnitude = uint32_t(h & 0x7fff) << 13;
  float f;
  memcpy(&f, &magnitude, 4);
  f = h & 0x7c00 ? f * 0x1p112f : float(h & 0x3ff) * 0x1p-24f;
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

// One element of any floating dtype: for what is too small or too scattered for tiles.
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

// Storage types: what a kLanes-wide row looks like in memory.
struct Half { uint16_t bits; };
struct Bfloat { uint16_t bits; };

template <class T>
inline T widen(float x) { return T(x); }
template <class T>
inline T widen(double x) { return T(x); }
template <class T>
inline T widen(Half x) { return T(half_to_float(x.bits)); }
template <class T>
inline T widen(Bfloat x) { return T(bfloat_to_float(x.bits)); }
template <class T>
inline void narrow(T x, float* p) { *p = float(x); }
template <class T>
inline void narrow(T x, double* p) { *p = double(x); }
template <class T>
inline void narrow(T x, Half* p) { p->bits = float_to_half(float(x)); }
template <class T>
inline void narrow(T x, Bfloat* p) { p->bits = float_to_bfloat(float(x)); }

template <class T, class S>
inline Vec<T> load_row(const S* p) {
  Vec<T> v;
  for (int i = 0; i < kLanes<T>; ++i) v[i] = widen<T>(p[i]);
  return v;
}
template <class T, class S>
inline void store_row(S* p, Vec<T> v) {
  for (int i = 0; i < kLanes<T>; ++i) narrow<T>(v[i], p + i);
}
template <>
inline vf load_row<float, float>(const float* p) { return load(p); }
template <>
inline vd load_row<double, double>(const double* p) { return load(p); }
template <>
inline void store_row<float, float>(float* p, vf v) { store(p, v); }
template <>
inline void store_row<double, double>(double* p, vd v) { store(p, v); }
#if defined(__AVX512F__)
template <>
inline vf load_row<float, Half>(const Half* p) {
  return (vf)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
template <>
inline void store_row<float, Half>(Half* p, vf v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph((__m512)v, 0));
}
template <>
inline vf load_row<float, Bfloat>(const Bfloat* p) {
  return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16);
}
#elif defined(__AVX2__)
template <>
inline vf load_row<float, Half>(const Half* p) {
  return (vf)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
template <>
inline void store_row<float, Half>(Half* p, vf v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph((__m256)v, 0));
}
template <>
inline vf load_row<float, Bfloat>(const Bfloat* p) {
  return (vf)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), 16);
}
#endif

// The first `count` elements of a row, zeros behind them; and back.
template <class T, class S>
inline Vec<T> load_part(const S* p, int count) {
  if (count == kLanes<T>) return load_row<T>(p);
  S row[kLanes<T>] = {};
  memcpy(row, p, size_t(count) * sizeof(S));
  return load_row<T>(row);
}
template <class T, class S>
inline void store_part(S* p, int count, Vec<T> v) {
  if (count == kLanes<T>) return store_row<T>(p, v);
  S row[kLanes<T>];
  store_row<T>(row, v);
  memcpy(p, row, size_t(count) * sizeof(S));
}

// Past the caches where the row fills a cache line: one that is not in a cache need not be fetched to be written. Elsewhere a plain store.
template <class T, class S>
inline void stream_row(S* p, Vec<T> v) {
#if defined(__AVX512F__)
  if constexpr (sizeof(S) == sizeof(T)) {
    if (reinterpret_cast<uintptr_t>(p) % 64 == 0) return _mm512_stream_si512(reinterpret_cast<__m512i*>(p), (__m512i)v);
  }
#endif
  store_row<T>(p, v);
}
// Makes streamed rows visible to other threads before whatever is stored later.
inline void end_streams() {
#if defined(__AVX512F__)
  _mm_sfence();
#endif
}

// The same where the dtype is known at run time only.
template <class T>
inline Vec<T> load_run(const char* p, DType dtype, int count) {
  switch (dtype) {
    case DType::f32: return load_part<T>(reinterpret_cast<const float*>(p), count);
    case DType::f64: return load_part<T>(reinterpret_cast<const double*>(p), count);
    case DType::f16: return load_part<T>(reinterpret_cast<const Half*>(p), count);
    default: return load_part<T>(reinterpret_cast<const Bfloat*>(p), count);
  }
}
template <class T>
inline void store_run(char* p, DType dtype, int count, Vec<T> v) {
  switch (dtype) {
    case DType::f32: return store_part<T>(reinterpret_cast<float*>(p), count, v);
    case DType::f64: return store_part<T>(reinterpret_cast<double*>(p), count, v);
    case DType::f16: return store_part<T>(reinterpret_cast<Half*>(p), count, v);
    default: return store_part<T>(reinterpret_cast<Bfloat*>(p), count, v);
  }
}

// A plane of a tensor: element (channel, time) at data + (channel * channel_stride + time * time_stride) items.
struct Plane {
  char* data = nullptr;
  DType dtype = DType::none;
  int64_t channel_stride = 0, time_stride = 0;
  bool streams = false;  // written past the caches, see stream_row

  explicit operator bool() const { return data != nullptr; }
  char* at(int64_t channel, int64_t time) const {
    return data + (channel * channel_stride + time * time_stride) * item_size(dtype);
  }
};
inline Plane plane(const Tensor& t, int64_t batch) {  // (batch, channel, time)
  if (!t) return {};
  return {t.at(batch), t.dtype, t.stride[1], t.stride[2]};
}

// A block: neighbouring tiles over a run of time steps, tile k at data + k * pitch. `channels` counts the valid ones of all tiles.
template <class T>
struct Block {
  T* data;
  int64_t pitch;
  int tiles;
};

// Whether it pays to write a (batch, channel, time) output of T past the caches: it outgrows them, and its rows are whole cache lines.
template <class T>
inline bool should_stream(const Tensor& t) {
  if (kVecBytes < 64 || span_bytes(t) < kStreamFrom || item_size(t.dtype) != int64_t(sizeof(T)) || reinterpret_cast<uintptr_t>(t.data) % 64) return false;
  const int64_t rows = t.stride[1] == 1 ? t.stride[2] : t.stride[1];
  return (t.stride[1] == 1 || t.stride[2] == 1) && rows % kLanes<T> == 0 && t.stride[0] % kLanes<T> == 0;
}

inline int valid_channels(int64_t channels, int64_t tile, int lanes) {
  const int64_t left = channels - tile * lanes;
  return int(left < lanes ? left : lanes);
}

template <class T, class S>
void load_block_as(const Plane& p, int64_t channel, int64_t channels, int64_t time, int64_t steps, const Block<T>& to) {
  constexpr int W = kLanes<T>;
  const int64_t cs = p.channel_stride, ts = p.time_stride;
  const S* from = reinterpret_cast<const S*>(p.data) + channel * cs + time * ts;
  if (cs == 1) {  // time outermost: memory is read in its own order
    for (int64_t t = 0; t < steps; ++t)
      for (int k = 0; k < to.tiles; ++k)
        store(to.data + k * to.pitch + t * W, load_part<T>(from + t * ts + k * W, valid_channels(channels, k, W)));
    return;
  }
  for (int k = 0; k < to.tiles; ++k) {
    const S* row = from + k * W * cs;
    T* tile = to.data + k * to.pitch;
    const int valid = valid_channels(channels, k, W);
    if (ts == 1) {
      for (int64_t t = 0; t < steps; t += W) {
        const int count = int(steps - t < W ? steps - t : W);
        Vec<T> v[W];
        if (valid == W && count == W) {  // a run of loads without a branch between them
#pragma GCC unroll 16
          for (int c = 0; c < W; ++c) v[c] = load_row<T>(row + c * cs + t);
        } else {
          for (int c = 0; c < W; ++c) v[c] = c < valid ? load_part<T>(row + c * cs + t, count) : Vec<T>{};
        }
        transpose<T>(v);
        for (int i = 0; i < count; ++i) store(tile + (t + i) * W, v[i]);
      }
    } else {
      for (int64_t t = 0; t < steps; ++t)
        for (int c = 0; c < W; ++c) tile[t * W + c] = c < valid ? widen<T>(row[c * cs + t * ts]) : T(0);
    }
  }
}

template <class T, class S>
void store_block_as(const Plane& p, int64_t channel, int64_t channels, int64_t time, int64_t steps, const Block<T>& from) {
  constexpr int W = kLanes<T>;
  const int64_t cs = p.channel_stride, ts = p.time_stride;
  S* to = reinterpret_cast<S*>(p.data) + channel * cs + time * ts;
  if (cs == 1) {
    for (int64_t t = 0; t < steps; ++t)
      for (int k = 0; k < from.tiles; ++k) {
        const int valid = valid_channels(channels, k, W);
        const Vec<T> v = load(from.data + k * from.pitch + t * W);
        if (p.streams && valid == W) stream_row<T>(to + t * ts + k * W, v);
        else store_part<T>(to + t * ts + k * W, valid, v);
      }
    return;
  }
  for (int k = 0; k < from.tiles; ++k) {
    S* row = to + k * W * cs;
    const T* tile = from.data + k * from.pitch;
    const int valid = valid_channels(channels, k, W);
    if (ts == 1) {
      for (int64_t t = 0; t < steps; t += W) {
        const int count = int(steps - t < W ? steps - t : W);
        Vec<T> v[W];
        for (int i = 0; i < W; ++i) v[i] = i < count ? load(tile + (t + i) * W) : Vec<T>{};
        transpose<T>(v);
        if (p.streams && count == W)
          for (int c = 0; c < valid; ++c) stream_row<T>(row + c * cs + t, v[c]);
        else
          for (int c = 0; c < valid; ++c) store_part<T>(row + c * cs + t, count, v[c]);
      }
    } else {
      for (int64_t t = 0; t < steps; ++t)
        for (int c = 0; c < valid; ++c) narrow<T>(tile[t * W + c], row + c * cs + t * ts);
    }
  }
}

template <class T>
inline void load_block(const Plane& p, int64_t channel, int64_t channels, int64_t time, int64_t steps, const Block<T>& to) {
  switch (p.dtype) {
    case DType::f32: return load_block_as<T, float>(p, channel, channels, time, steps, to);
    case DType::f64: return load_block_as<T, double>(p, channel, channels, time, steps, to);
    case DType::f16: return load_block_as<T, Half>(p, channel, channels, time, steps, to);
    default: return load_block_as<T, Bfloat>(p, channel, channels, time, steps, to);
  }
}
template <class T>
inline void store_block(const Plane& p, int64_t channel, int64_t channels, int64_t time, int64_t steps, const Block<T>& from) {
  switch (p.dtype) {
    case DType::f32: return store_block_as<T, float>(p, channel, channels, time, steps, from);
    case DType::f64: return store_block_as<T, double>(p, channel, channels, time, steps, from);
    case DType::f16: return store_block_as<T, Half>(p, channel, channels, time, steps, from);
    default: return store_block_as<T, Bfloat>(p, channel, channels, time, steps, from);
  }
}

// Asks for two neighbouring cache lines ahead of their use. (GCC takes a function of nothing but __builtin_prefetch for one without
// effect, and drops its calls.)
inline void prefetch_lines(const char* p) {
#if defined(__x86_64__)
  asm volatile("prefetcht1 %0\n\tprefetcht1 %1" ::"m"(p[0]), "m"(p[64]));
#else
  __builtin_prefetch(p, 0, 2), __builtin_prefetch(p + 64, 0, 2);
#endif
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
