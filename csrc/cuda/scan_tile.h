// Shared by both passes of the scan: parameters of a kernel, the tile of a block, staging.
//
// A block owns one batch row and a tile of neighbouring channels. Half of its threads walk time upwards, the other half downwards (or there
// is one half only), a chunk of `steps` at a time. Each channel's states are spread over `lanes` threads of a warp. The two halves
// meet in the middle: whichever comes first to a chunk leaves its share of a result in global memory, the other adds its own.
#pragma once
#include "device.h"
#include "selective_scan.h"

namespace pixelbytes::cuda {

// states: held by one thread; lanes: threads of a channel; channels: of a tile; steps: of a chunk; staged: B and C come through shared
// memory.
template <int kStates, int kLanes, int kChannels, int kSteps, bool kStaged>
struct Shape {
  static constexpr int states = kStates, lanes = kLanes, channels = kChannels, steps = kSteps, dstate = kStates * kLanes;
  static constexpr bool staged = kStaged;
  static constexpr int threads = kChannels * kLanes;         // of one direction
  static constexpr int elements = kSteps * kChannels / threads;  // of a chunk of a (batch, dim, seqlen) tensor that a thread loads and stores
  static constexpr int pitch = kChannels + 1;                // of a plane (step, channel): odd, so that neither axis conflicts
  static constexpr int row = 2 * dstate + 4;                 // of a staged step: B, then C; the 4 spread a column over the banks
  static_assert(threads % 32 == 0 && kLanes <= 32 && kSteps % kLanes == 0 && kChunk % kSteps == 0);
};

// A (batch, dim, seqlen) tensor.
struct Rows {
  char* data = nullptr;
  DType dtype = DType::none;
  int64_t batch = 0;
  int dim = 0, step = 0;  // 32 bits: a 64-bit product costs four instructions. scan_launch.h refuses longer ones
  bool packed = false;    // a thread's neighbouring elements lie side by side, on an aligned address: see Elements
  __host__ __device__ explicit operator bool() const { return data != nullptr; }
};

// B or C. Staged: any float dtype, strides of (batch, group, state, step). Direct: fp32, the states of a step next to each other.
struct Coefficient {
  char* data = nullptr;
  DType dtype = DType::none;
  int64_t batch = 0, group = 0;
  int state = 0, step = 0;
  bool packed = false;    // staged only: as Rows::packed
  bool constant = false;  // direct only: `group` counts channels
};

struct Direction {
  int reverse = 0;
  Rows u, delta, du, ddelta;
  Coefficient B, C;
  const float *A = nullptr, *D = nullptr, *delta_bias = nullptr, *initial_state = nullptr, *dlast_state = nullptr;
  float *last_state = nullptr, *states = nullptr;
  float *dA = nullptr, *dB = nullptr, *dC = nullptr, *dD = nullptr, *ddelta_bias = nullptr, *dinitial_state = nullptr;
};

struct ScanParams {
  Direction direction[2];
  Rows z, out, partial, dout, dz;
  const int* seq_idx = nullptr;
  int directions = 1, batch = 0, dim = 0, seqlen = 0, dstate = 0;
  int groups = 1, tiles = 1;  // tiles of a group
  int time_fast = 0;          // neighbouring threads load neighbouring steps, not channels
  int state_fast = 0;         // ... neighbouring states of B and C, not steps
  float scale = 1.0f;
  int softplus = 0;
  int shares_u = 0, shares_delta = 0;  // both directions read, and have the gradient of, the same tensor
};

struct Tile {
  int batch, group, index, first, count;  // channels first .. first + count of `dim`

  template <class S>
  static __device__ Tile of(const ScanParams& p) {
    const int tiles = p.groups * p.tiles, in_group = p.dim / p.groups;
    Tile t;
    t.batch = int(blockIdx.x) / tiles;
    const int k = int(blockIdx.x) % tiles;
    t.group = k / p.tiles, t.index = k % p.tiles;
    t.first = t.group * in_group + t.index * S::channels;
    t.count = min(S::channels, in_group - t.index * S::channels);
    return t;
  }
};

// A stretch of time: steps first .. first + count.
struct Chunk {
  int index, first, count;

  template <class S>
  static __device__ Chunk at(int index, int seqlen) {
    return {index, index * S::steps, min(S::steps, seqlen - index * S::steps)};
  }
};

// ---- arithmetic -----------------------------------------------------------------------------------------------------------------------

constexpr float kLog2e = 1.44269504088896341f, kLn2 = 0.693147180559945309f;

__device__ inline float exp2_fast(float x) {  // NaN stays NaN
#ifdef PIXELBYTES_EMULATE
  return exp2f(x);
#else
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

// log(1 + exp(x)) = max(x, 0) + 2 atanh(e / (2 + e)) with e = exp(-|x|) <= 1: no cancellation anywhere. Above 20 it is x in fp32.
__device__ inline float softplus(float x) {
  const float e = exp2_fast(-fabsf(x) * kLog2e), s = __fdividef(e, 2.0f + e), q = s * s;
  float poly = 2.0f / 13;
  poly = fmaf(poly, q, 2.0f / 11), poly = fmaf(poly, q, 2.0f / 9), poly = fmaf(poly, q, 2.0f / 7);
  poly = fmaf(poly, q, 2.0f / 5), poly = fmaf(poly, q, 2.0f / 3), poly = fmaf(poly, q, 2.0f);
  return (x > 0 ? x : 0.0f) + s * poly;  // the NaN of x comes through s
}

// The derivative of softplus from its value: 1 - exp(-value), by a series where that cancels.
__device__ inline float softplus_slope(float value) {
  float series = 1.0f / 120;
  series = fmaf(series, -value, 1.0f / 24), series = fmaf(series, -value, 1.0f / 6), series = fmaf(series, -value, 0.5f);
  series = fmaf(series, -value, 1.0f) * value;
  return value < 0.1f ? series : 1.0f - exp2_fast(-value * kLog2e);
}

__device__ inline float sigmoid(float x) { return __fdividef(1.0f, 1.0f + exp2_fast(-x * kLog2e)); }

// The sum over `lanes` neighbouring threads, from `apart` threads apart onwards, in each of them.
template <int lanes, int apart = 1>
__device__ inline float sum_of_lanes(float v) {
#pragma unroll
  for (int lane = apart; lane < lanes; lane *= 2) v += __shfl_xor_sync(0xffffffffu, v, lane);
  return v;
}

// Sums each of the values over `lanes` neighbouring threads; thread `part` (of those below `count`) is left with the sum of value `part`.
template <int lanes, int count>
__device__ inline float sum_to_lane(float (&v)[count], int part) {
  static_assert(count == 4 && lanes >= 4);
#pragma unroll
  for (int half = count / 2; half >= 1; half /= 2) {
    const bool upper = part & half;
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const float send = upper ? v[i] : v[i + half], keep = upper ? v[i + half] : v[i];
      v[i] = keep + __shfl_xor_sync(0xffffffffu, send, half);
    }
  }
  return sum_of_lanes<lanes, count>(v[0]);
}

// ---- staging --------------------------------------------------------------------------------------------------------------------------

// Which elements (step, channel) of a chunk a thread loads and stores: `packets` times `width` neighbours along the axis that is contiguous in
// memory, so that a packet is one access. Element i is number i % width of packet i / width.
template <class S>
struct Elements {
  static constexpr int width = S::elements < 4 ? S::elements : 4, packets = S::elements / width;
  bool time_fast;
  int step, channel;        // of element 0
  int step_by, channel_by;  // from packet to packet

  __device__ Elements(int thread, bool time_fast_) : time_fast(time_fast_) {
    constexpr int kAcross = S::channels / width, kAlong = S::steps / width;
    step = time_fast ? thread % kAlong * width : thread / kAcross;
    channel = time_fast ? thread / kAlong : thread % kAcross * width;
    step_by = time_fast ? 0 : S::threads / kAcross;
    channel_by = time_fast ? S::threads / kAlong : 0;
  }
  __device__ int step_of(int i) const { return step + i / width * step_by + (time_fast ? i % width : 0); }
  __device__ int channel_of(int i) const { return channel + i / width * channel_by + (time_fast ? 0 : i % width); }
  __device__ int slot(int i) const { return step_of(i) * S::pitch + channel_of(i); }

  // Zeros where the tile or the chunk has no such element.
  __device__ void load(const Rows& rows, const Tile& tile, const Chunk& chunk, float (&v)[S::elements]) const {
    if (rows.dtype == DType::f16) return load_as<__half>(rows, tile, chunk, v);
    if (rows.dtype == DType::bf16) return load_as<__nv_bfloat16>(rows, tile, chunk, v);
    load_as<float>(rows, tile, chunk, v);
  }
  __device__ void store(const Rows& rows, const Tile& tile, const Chunk& chunk, const float (&v)[S::elements]) const {
    if (rows.dtype == DType::f16) return store_as<__half>(rows, tile, chunk, v);
    if (rows.dtype == DType::bf16) return store_as<__nv_bfloat16>(rows, tile, chunk, v);
    store_as<float>(rows, tile, chunk, v);
  }

 private:
  static __device__ bool is_whole(const Tile& tile, const Chunk& chunk) { return tile.count == S::channels && chunk.count == S::steps; }

  template <class T>
  __device__ T* place(const Rows& rows, const Tile& tile, const Chunk& chunk) const {
    return reinterpret_cast<T*>(rows.data) + tile.batch * rows.batch + int64_t(tile.first + channel) * rows.dim +
           int64_t(chunk.first + step) * rows.step;
  }
  __device__ int64_t from_packet_to_packet(const Rows& rows) const { return time_fast ? int64_t(channel_by) * rows.dim : int64_t(step_by) * rows.step; }

  template <class T>
  __device__ void load_as(const Rows& rows, const Tile& tile, const Chunk& chunk, float (&v)[S::elements]) const {
    const T* p = place<T>(rows, tile, chunk);
    const int64_t by = from_packet_to_packet(rows);
    if (rows.packed && is_whole(tile, chunk)) {
#pragma unroll
      for (int i = 0; i < packets; ++i, p += by) {
        float packet[width];
        load_many<width>(p, packet);
#pragma unroll
        for (int k = 0; k < width; ++k) v[i * width + k] = packet[k];
      }
      return;
    }
    const int64_t next = time_fast ? rows.step : rows.dim;
#pragma unroll
    for (int i = 0; i < packets; ++i, p += by) {
#pragma unroll
      for (int k = 0; k < width; ++k) {
        const int n = i * width + k;
        v[n] = step_of(n) < chunk.count && channel_of(n) < tile.count ? cuda::load(p + k * next) : 0.0f;
      }
    }
  }

  template <class T>
  __device__ void store_as(const Rows& rows, const Tile& tile, const Chunk& chunk, const float (&v)[S::elements]) const {
    T* p = place<T>(rows, tile, chunk);
    const int64_t by = from_packet_to_packet(rows);
    if (rows.packed && is_whole(tile, chunk)) {
#pragma unroll
      for (int i = 0; i < packets; ++i, p += by) {
        float packet[width];
#pragma unroll
        for (int k = 0; k < width; ++k) packet[k] = v[i * width + k];
        store_many<width>(p, packet);
      }
      return;
    }
    const int64_t next = time_fast ? rows.step : rows.dim;
#pragma unroll
    for (int i = 0; i < packets; ++i, p += by) {
#pragma unroll
      for (int k = 0; k < width; ++k) {
        const int n = i * width + k;
        if (step_of(n) < chunk.count && channel_of(n) < tile.count) cuda::store(p + k * next, v[n]);
      }
    }
  }
};

// The same for a staged chunk of B or C: elements (step, state). A packet lies along the states, whichever axis the threads follow.
template <class S>
struct CoefficientElements {
  static constexpr int count = S::staged ? S::steps * S::dstate / S::threads : 1, width = count < 4 ? count : 4, packets = count / width;
  static_assert(!S::staged || S::dstate % width == 0);
  int step, state, step_by, state_by;

  __device__ CoefficientElements(int thread, bool state_fast) {
    constexpr int kAcross = S::dstate / width;
    step = state_fast ? thread / kAcross : thread % S::steps;
    state = state_fast ? thread % kAcross * width : thread / S::steps * width;
    step_by = state_fast ? S::threads / kAcross : 0;
    state_by = state_fast ? 0 : S::threads / S::steps * width;
    if (state_fast && S::threads < kAcross) step_by = 0, state_by = S::threads * width;
  }

  // Zeros beyond the chunk and beyond dstate.
  __device__ void load(const Coefficient& from, const Tile& tile, const Chunk& chunk, int dstate, float (&v)[count]) const {
    if (from.dtype == DType::f16) return load_as<__half>(from, tile, chunk, dstate, v);
    if (from.dtype == DType::bf16) return load_as<__nv_bfloat16>(from, tile, chunk, dstate, v);
    load_as<float>(from, tile, chunk, dstate, v);
  }

  // Into rows of S::row floats.
  __device__ void put(float* rows, const float (&v)[count]) const {
    float* to = rows + step * S::row + state;
    const int by = step_by * S::row + state_by;
#pragma unroll
    for (int i = 0; i < packets; ++i, to += by) {
      if constexpr (width == 4)
        *reinterpret_cast<float4*>(to) = make_float4(v[4 * i], v[4 * i + 1], v[4 * i + 2], v[4 * i + 3]);
      else
#pragma unroll
        for (int k = 0; k < width; ++k) to[k] = v[i * width + k];
    }
  }

 private:
  template <class T>
  __device__ void load_as(const Coefficient& from, const Tile& tile, const Chunk& chunk, int dstate, float (&v)[count]) const {
    const T* p = reinterpret_cast<const T*>(from.data) + tile.batch * from.batch + tile.group * from.group +
                 int64_t(chunk.first + step) * from.step + int64_t(state) * from.state;
    const int64_t by = int64_t(step_by) * from.step + int64_t(state_by) * from.state;
    if (from.packed && chunk.count == S::steps && dstate == S::dstate) {
#pragma unroll
      for (int i = 0; i < packets; ++i, p += by) {
        float packet[width];
        load_many_readonly<width>(p, packet);
#pragma unroll
        for (int k = 0; k < width; ++k) v[i * width + k] = packet[k];
      }
      return;
    }
#pragma unroll
    for (int i = 0; i < packets; ++i, p += by) {
#pragma unroll
      for (int k = 0; k < width; ++k) {
        const bool real = step + i * step_by < chunk.count && state + i * state_by + k < dstate;
        v[i * width + k] = real ? cuda::load_readonly(p + int64_t(k) * from.state) : 0.0f;
      }
    }
  }
};

// The states of a thread at one step of B or C.
template <int count>
__device__ inline void read_states(const float* p, float (&v)[count]) {
  if constexpr (count % 4 == 0) {
#pragma unroll
    for (int i = 0; i < count; i += 4) {
      const float4 four = *reinterpret_cast<const float4*>(p + i);
      v[i] = four.x, v[i + 1] = four.y, v[i + 2] = four.z, v[i + 3] = four.w;
    }
  } else {
    static_assert(count == 2);
    const float2 two = *reinterpret_cast<const float2*>(p);
    v[0] = two.x, v[1] = two.y;
  }
}

// Where a thread finds its states of B and C: in the staged rows of the chunk, or in global memory.
template <class S>
struct Coefficients {
  const float *B, *C;
  int B_step, C_step;

  __device__ Coefficients(const Direction& d, const Tile& tile, int channel, int part, const float* rows) {
    if constexpr (S::staged) {
      B = rows + part * S::states, C = B + S::dstate, B_step = C_step = S::row;
    } else {
      B = base(d.B, tile, channel) + part * S::states, B_step = d.B.step;
      C = base(d.C, tile, channel) + part * S::states, C_step = d.C.step;
    }
  }
  // `step` counts from the first step of `chunk`.
  __device__ void read_B(const Chunk& chunk, int step, float (&v)[S::states]) const { read(B, B_step, chunk, step, v); }
  __device__ void read_C(const Chunk& chunk, int step, float (&v)[S::states]) const { read(C, C_step, chunk, step, v); }

 private:
  static __device__ const float* base(const Coefficient& c, const Tile& tile, int channel) {
    const int of = c.constant ? tile.first + min(channel, tile.count - 1) : tile.group;
    return reinterpret_cast<const float*>(c.data) + tile.batch * c.batch + of * c.group;
  }
  static __device__ void read(const float* p, int by, const Chunk& chunk, int step, float (&v)[S::states]) {
    if constexpr (S::staged)
      read_states(p + step * S::row, v);
    else
      load_many_readonly(p + int64_t(chunk.first + step) * by, v);
  }
};

// Bit i of the result, in every thread of the first warp of a direction: at step i of the chunk the state restarts from zero.
__device__ inline unsigned resets_of(const ScanParams& p, const Tile& tile, const Chunk& chunk, bool reverse, int thread) {
  const int step = chunk.first + thread, before = reverse ? step + 1 : step - 1;
  bool reset = false;
  if (thread < chunk.count && before >= 0 && before < p.seqlen) {
    const int* row = p.seq_idx + int64_t(tile.batch) * p.seqlen;
    reset = load_value_readonly(row + step) != load_value_readonly(row + before);
  }
  return __ballot_sync(0xffffffffu, reset);
}

}  // namespace pixelbytes::cuda
