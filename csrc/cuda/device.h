// Base of every .cu file: CUDA, or its emulator; access to global memory; launching.
//
// The same sources are compiled by nvcc, and by g++ for the CPU (gpu_checks/emulator). What that takes of a kernel:
//   - global memory is read and written through load, load_readonly, load_many, store, ... below: there the emulator checks bounds and
//     alignment and counts bytes;
//   - shared memory is shared_memory<T>() (dynamic) or PIXELBYTES_SHARED(type, name, count);
//   - kernels are started by launch().
#pragma once
#ifdef PIXELBYTES_EMULATE
#include "emulator.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "../tensor.h"
#include "launch.h"

namespace pixelbytes::cuda {

template <class T>
__host__ __device__ constexpr T ceil_div(T a, T b) {
  return (a + b - 1) / b;
}

// ---- values ---------------------------------------------------------------------------------------------------------------------------

__device__ inline float to_float(float v) { return v; }
__device__ inline float to_float(__half v) { return __half2float(v); }
__device__ inline float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }

template <class T>
__device__ inline T from_float(float v);
template <>
__device__ inline float from_float<float>(float v) { return v; }
template <>
__device__ inline __half from_float<__half>(float v) { return __float2half_rn(v); }
template <>
__device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float v) { return __float2bfloat16_rn(v); }

// Whether kernels for T are compiled for this architecture: bfloat16 is refused below compute capability 8.0, so its code would be dead weight.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
template <class T>
constexpr bool kRunsHere = !std::is_same_v<T, __nv_bfloat16>;
#else
template <class T>
constexpr bool kRunsHere = true;
#endif

// ---- global memory --------------------------------------------------------------------------------------------------------------------

// One trivially copyable value, at its natural alignment.
template <class V>
__device__ inline V load_value(const V* p) {
#ifdef PIXELBYTES_EMULATE
  emulator::check_read(p, sizeof(V));
#endif
  return *p;
}

// The same for memory that nothing writes while the kernel runs.
template <class V>
__device__ inline V load_value_readonly(const V* p) {
#ifdef PIXELBYTES_EMULATE
  emulator::check_read_only(p, sizeof(V));
  return *p;
#else
  return __ldg(p);
#endif
}

template <class V>
__device__ inline void store_value(V* p, V v) {
#ifdef PIXELBYTES_EMULATE
  emulator::check_write(p, sizeof(V));
#endif
  *p = v;
}

// One element of a float tensor, as fp32.
template <class T>
__device__ inline float load(const T* p) { return to_float(load_value(p)); }
template <class T>
__device__ inline float load_readonly(const T* p) { return to_float(load_value_readonly(p)); }
template <class T>
__device__ inline void store(T* p, float v) { store_value(p, from_float<T>(v)); }

// `bytes` in one access.
template <int bytes> struct Packet;
template <> struct Packet<16> { using type = uint4; };
template <> struct Packet<8> { using type = uint2; };
template <> struct Packet<4> { using type = uint32_t; };
template <> struct Packet<2> { using type = uint16_t; };

// N neighbouring elements as fp32, in accesses of up to 16 bytes; p must be aligned to min(16, N * sizeof(T)) bytes.
template <int N, bool readonly, class T>
__device__ inline void load_packets(const T* p, float (&v)[N]) {
  constexpr int kBytes = N * int(sizeof(T)) < 16 ? N * int(sizeof(T)) : 16, kEach = kBytes / int(sizeof(T));
  static_assert(N % kEach == 0);
  using Word = typename Packet<kBytes>::type;
#pragma unroll
  for (int i = 0; i < N; i += kEach) {
    const Word* source = reinterpret_cast<const Word*>(p + i);
    union { Word word; T each[kEach]; } packet;
    packet.word = readonly ? load_value_readonly(source) : load_value(source);
#pragma unroll
    for (int k = 0; k < kEach; ++k) v[i + k] = to_float(packet.each[k]);
  }
}
template <int N, class T>
__device__ inline void load_many(const T* p, float (&v)[N]) { load_packets<N, false>(p, v); }
template <int N, class T>
__device__ inline void load_many_readonly(const T* p, float (&v)[N]) { load_packets<N, true>(p, v); }

// `bytes` as words of 4, in one access.
template <bool readonly, int bytes, class W>
__device__ inline void load_words(const char* p, W* words) {
  using Floats = std::conditional_t<bytes == 16, float4, std::conditional_t<bytes == 8, float2, float>>;
  using Access = std::conditional_t<std::is_same_v<W, float>, Floats, typename Packet<bytes>::type>;
  const Access* source = reinterpret_cast<const Access*>(p);
  const Access v = readonly ? load_value_readonly(source) : load_value(source);
  if constexpr (bytes == 16) {
    words[0] = v.x, words[1] = v.y, words[2] = v.z, words[3] = v.w;
  } else if constexpr (bytes == 8) {
    words[0] = v.x, words[1] = v.y;
  } else {
    words[0] = v;
  }
}

template <int N, class T>
__device__ inline void store_many(T* p, const float (&v)[N]) {
  constexpr int kBytes = N * int(sizeof(T)) < 16 ? N * int(sizeof(T)) : 16, kEach = kBytes / int(sizeof(T));
  static_assert(N % kEach == 0);
  using Word = typename Packet<kBytes>::type;
#pragma unroll
  for (int i = 0; i < N; i += kEach) {
    union { Word word; T each[kEach]; } packet;
#pragma unroll
    for (int k = 0; k < kEach; ++k) packet.each[k] = from_float<T>(v[i + k]);
    store_value(reinterpret_cast<Word*>(p + i), packet.word);
  }
}

// One element whose dtype is known only at run time, for small operands: a branch that every thread takes alike.
__device__ inline float load_any(const char* data, DType dtype, int64_t index) {
  if (dtype == DType::f16) return load(reinterpret_cast<const __half*>(data) + index);
  if (dtype == DType::bf16) return load(reinterpret_cast<const __nv_bfloat16*>(data) + index);
  return load(reinterpret_cast<const float*>(data) + index);
}
__device__ inline void store_any(char* data, DType dtype, int64_t index, float v) {
  if (dtype == DType::f16) return store(reinterpret_cast<__half*>(data) + index, v);
  if (dtype == DType::bf16) return store(reinterpret_cast<__nv_bfloat16*>(data) + index, v);
  store(reinterpret_cast<float*>(data) + index, v);
}
__device__ inline int64_t load_int(const char* data, DType dtype, int64_t index) {
  switch (dtype) {
    case DType::u8: return load_value_readonly(reinterpret_cast<const uint8_t*>(data) + index);
    case DType::i8: return load_value_readonly(reinterpret_cast<const signed char*>(data) + index);
    case DType::i16: return load_value_readonly(reinterpret_cast<const int16_t*>(data) + index);
    case DType::i32: return load_value_readonly(reinterpret_cast<const int32_t*>(data) + index);
    default: return load_value_readonly(reinterpret_cast<const long long*>(data) + index);
  }
}

// Whether rows of T may be read in packets of 16 bytes: the base and every stride but the innermost (which is 1) are multiples of 16.
template <class T>
inline bool packets_fit(const void* base, int64_t stride0, int64_t stride1 = 0) {
  return reinterpret_cast<uintptr_t>(base) % 16 == 0 && stride0 * int64_t(sizeof(T)) % 16 == 0 && stride1 * int64_t(sizeof(T)) % 16 == 0;
}

// ---- shared memory --------------------------------------------------------------------------------------------------------------------

#ifdef PIXELBYTES_EMULATE
template <class T>
inline T* shared_memory() { return static_cast<T*>(emulator::dynamic_shared()); }
#define PIXELBYTES_SHARED(type, name, count)  \
  static char name##_site;                    \
  type* const name = static_cast<type*>(emulator::static_shared(&name##_site, sizeof(type) * (count)))
#else
// The block's dynamic shared memory, aligned to 16 bytes.
template <class T>
__device__ inline T* shared_memory() {
  extern __shared__ uint4 pixelbytes_dynamic_shared[];
  return reinterpret_cast<T*>(pixelbytes_dynamic_shared);
}
// `type name[count]` in shared memory, aligned to 16 bytes. For two dimensions let `type` name a row.
#define PIXELBYTES_SHARED(type, name, count) __shared__ __align__(16) type name[count]
#endif

// ---- launching ------------------------------------------------------------------------------------------------------------------------

// nullptr, or a sentence that names the kernel, its grid and block, and what CUDA says.
const char* launch_error(const char* kernel, dim3 grid, dim3 block, size_t shared_bytes, const char* reason);

#ifdef PIXELBYTES_EMULATE
template <class... Params, class... Args>
const char* launch(const char* name, void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes, const Launch&, Args... args) {
  const auto start = [&](Params... values) {
    const emulator::Parameter parameters[] = {{&values, sizeof values}..., {nullptr, 0}};
    return emulator::run(name, reinterpret_cast<const void*>(kernel), grid, block, shared_bytes, parameters, [&] { kernel(values...); });
  };
  return launch_error(name, grid, block, shared_bytes, start(args...));
}
#else
// Makes `device` current, and what was current again.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    status_ = cudaGetDevice(&before_);
    if (status_ == cudaSuccess && before_ != device) {
      status_ = cudaSetDevice(device);
      changed_ = status_ == cudaSuccess;
    }
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  cudaError_t status() const { return status_; }

 private:
  cudaError_t status_;
  int before_ = 0;
  bool changed_ = false;
};

// Starts kernel(args...) on `at`. Neither allocates nor waits, so that it can be captured into a CUDA graph.
template <class... Params, class... Args>
const char* launch(const char* name, void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes, const Launch& at, Args... args) {
  const DeviceGuard guard(at.device);
  cudaError_t status = guard.status();
  if (status == cudaSuccess && shared_bytes > 48 * 1024)
    status = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes));
  if (status == cudaSuccess) {
    kernel<<<grid, block, shared_bytes, reinterpret_cast<cudaStream_t>(at.stream)>>>(args...);
    status = cudaGetLastError();
  }
  return launch_error(name, grid, block, shared_bytes, status == cudaSuccess ? nullptr : cudaGetErrorString(status));
}
#endif

}  // namespace pixelbytes::cuda
