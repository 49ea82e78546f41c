// What g++ needs to compile the .cu files of csrc/cuda for the CPU: CUDA's words, types and intrinsics, for tests only.
//
// Every thread of a block is a fiber; between two barriers the fibers of a warp, and the warps, run in the order that was asked for. The
// tensors of a call are copied between guard pages, every access through csrc/cuda/device.h is checked against the tensor's extent and
// counted, shared memory and the gaps between strided elements start as NaN. There are no atomics: a kernel that uses one does not compile.
// Approximate functions are more accurate here than on a GPU.
#pragma once
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) alignas(n)

struct uint3 { unsigned x, y, z; };
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(8) int2 { int x, y; };
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

namespace emulator {

struct Thread;
extern uint3 thread_index;  // of the fiber that runs
extern uint3 block_index;
extern dim3 block_size, grid_size;

// ---- for device.h and python_tensor.h ----

struct Parameter {
  const void* value;
  size_t bytes;
};
// Runs a kernel on every thread of every block; nullptr, or what went wrong. `kernel`: its address; `parameters`: up to one of no bytes.
const char* run(const char* name, const void* kernel, dim3 grid, dim3 block, size_t shared_bytes, const Parameter* parameters,
                const std::function<void()>& body);
void check_read(const void* p, size_t bytes);
void check_read_only(const void* p, size_t bytes);
void check_write(const void* p, size_t bytes);
void* dynamic_shared();
void* static_shared(const void* site, size_t bytes);
// The copy of a tensor between guard pages that a call works on, and the way back of everything that was changed in such copies.
void* guarded(void* data, int64_t item, int ndim, const int64_t* size, const int64_t* stride);
const char* write_back();  // nullptr, or what was written where no element is

// How threads run from now on, and where tensors lie: their end, or else their start, at a guard page.
enum class Order { forward, reverse, random };
void configure(Order order, uint64_t seed, bool at_end);

// ---- for the intrinsics below ----

void sync_block();
// Gives `word` to the other lanes of `mask`; returns the words of all 32 lanes once every lane of the mask has come here.
const uint64_t* exchange(unsigned mask, uint64_t word);
int lane();
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

template <class T>
T shuffle(unsigned mask, T value, int source) {
  static_assert(sizeof(T) <= 8);
  uint64_t word = 0;
  std::memcpy(&word, &value, sizeof(T));
  const uint64_t* words = exchange(mask, word);
  if (!(mask >> source & 1)) fail("a shuffle reads lane %d, which is not in its mask %#x", source, mask);
  std::memcpy(&value, &words[source], sizeof(T));
  return value;
}

}  // namespace emulator

#define threadIdx (emulator::thread_index)
#define blockIdx (emulator::block_index)
#define blockDim (emulator::block_size)
#define gridDim (emulator::grid_size)
constexpr int warpSize = 32;

// ---- barriers, votes, shuffles ----

inline void __syncthreads() { emulator::sync_block(); }
inline void __syncwarp(unsigned mask = ~0u) { emulator::exchange(mask, 0); }
inline void __threadfence() {}
inline void __threadfence_block() {}

inline unsigned __ballot_sync(unsigned mask, int predicate) {
  const uint64_t* words = emulator::exchange(mask, predicate != 0);
  unsigned votes = 0;
  for (int i = 0; i < 32; ++i)
    if (mask >> i & 1) votes |= unsigned(words[i]) << i;
  return votes;
}
inline unsigned __brev(unsigned v) {
  unsigned reversed = 0;
  for (int i = 0; i < 32; ++i) reversed |= (v >> i & 1u) << (31 - i);
  return reversed;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) == mask; }

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  return emulator::shuffle(mask, value, (emulator::lane() & ~(width - 1)) | (source & (width - 1)));
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const int self = emulator::lane(), source = self - int(delta);
  return emulator::shuffle(mask, value, source < (self & ~(width - 1)) ? self : source);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const int self = emulator::lane(), source = self + int(delta);
  return emulator::shuffle(mask, value, source > (self | (width - 1)) ? self : source);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32) {
  const int self = emulator::lane(), source = self ^ lanes;
  return emulator::shuffle(mask, value, source > (self | (width - 1)) ? self : source);
}

// ---- arithmetic ----

template <class A, class B>
constexpr auto min(A a, B b) { return b < a ? b : a; }
template <class A, class B>
constexpr auto max(A a, B b) { return a < b ? b : a; }
inline float __expf(float x) { return std::exp(x); }
inline float __exp2f(float x) { return std::exp2(x); }
inline float __logf(float x) { return std::log(x); }
inline float __log2f(float x) { return std::log2(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float x) { return 1 / x; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __saturatef(float x) { return x > 0 ? (x < 1 ? x : 1) : 0; }
inline float rsqrtf(float x) { return 1 / std::sqrt(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __mul24(int a, int b) { return a * b; }
inline float __int_as_float(int x) { float y; std::memcpy(&y, &x, 4); return y; }
inline int __float_as_int(float x) { int y; std::memcpy(&y, &x, 4); return y; }
inline float __uint_as_float(unsigned x) { float y; std::memcpy(&y, &x, 4); return y; }
inline unsigned __float_as_uint(float x) { unsigned y; std::memcpy(&y, &x, 4); return y; }

// ---- 16-bit floats ----

struct __half { uint16_t bits; };
struct __nv_bfloat16 { uint16_t bits; };
struct alignas(4) __half2 { __half x, y; };
struct alignas(4) __nv_bfloat162 { __nv_bfloat16 x, y; };
using half = __half;
using half2 = __half2;

inline float __half2float(__half h) {
  const unsigned sign = unsigned(h.bits & 0x8000) << 16, exponent = h.bits >> 10 & 31, fraction = h.bits & 1023;
  if (exponent == 0) {  // zero or subnormal: fraction * 2^-24
    const float magnitude = float(fraction) * 0x1p-24f;
    return sign ? -magnitude : magnitude;
  }
  return __uint_as_float(sign | (exponent == 31 ? 0x7f800000 | fraction << 13 : (exponent + 112) << 23 | fraction << 13));
}
inline __half __float2half_rn(float x) {
  const unsigned word = __float_as_uint(x), sign = word >> 16 & 0x8000, magnitude = word & 0x7fffffff;
  if (magnitude > 0x7f800000) return {uint16_t(sign | 0x7e00)};  // NaN
  if (magnitude >= 0x477ff000) return {uint16_t(sign | 0x7c00)}; // 65520 and more round to infinity
  if (magnitude < 0x38800000)  // below 2^-14: subnormal, rounded to even by the addition
    return {uint16_t(sign | (__float_as_uint(__uint_as_float(magnitude) + 0.5f) - 0x3f000000))};
  return {uint16_t(sign | ((magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13))};
}
inline __half __float2half(float x) { return __float2half_rn(x); }
inline float __bfloat162float(__nv_bfloat16 h) { return __uint_as_float(unsigned(h.bits) << 16); }
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  const unsigned word = __float_as_uint(x);
  if ((word & 0x7fffffff) > 0x7f800000) return {uint16_t(word >> 16 | 0x40)};
  return {uint16_t((word + 0x7fff + (word >> 16 & 1)) >> 16)};
}
inline __nv_bfloat16 __float2bfloat16(float x) { return __float2bfloat16_rn(x); }
inline float2 __half22float2(__half2 h) { return {__half2float(h.x), __half2float(h.y)}; }
inline __half2 __floats2half2_rn(float x, float y) { return {__float2half_rn(x), __float2half_rn(y)}; }
inline float2 __bfloat1622float2(__nv_bfloat162 h) { return {__bfloat162float(h.x), __bfloat162float(h.y)}; }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {__float2bfloat16_rn(x), __float2bfloat16_rn(y)}; }
