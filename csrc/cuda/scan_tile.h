// Shared by both passes of the scan: parameters of a kernel, the tile of a block, staging.
//
// A block owns one batch row, or a stretch of its time, and a tile of neighbouring channels. Half of its threads walk time upwards, the other half
// downwards (or there is one half only), a chunk of `steps` at a time. Each channel's states are spread over `lanes` threads of a warp. The two
// halves meet in the middle: whichever comes first to a chunk leaves its share of a result, near the middle in registers, else in global memory; the
// other adds its own.
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

// A tensor of (batch, k, step), k being a channel or a state, of any float dtype.
struct Plane {
  char* data = nullptr;
  DType dtype = DType::none;
  int64_t batch = 0;
  int k = 0, step = 0;  // 32 bits: a 64-bit product costs four instructions. scan_launch.h refuses longer ones
  bool packed = false;  // a packet lies side by side, on an aligned address: see Part
  __host__ __device__ explicit operator bool() const { return data != nullptr; }
};

// B or C. Staged: as it is. Direct: fp32, the states of a step next to each other.
struct Coefficient : Plane {
  int64_t group = 0;
  bool constant = false;  // direct only: `group` counts channels
};

struct Direction {
  int reverse = 0;
  Plane u, delta, du, ddelta;
  Coefficient B, C;
  const float *A = nullptr, *D = nullptr, *delta_bias = nullptr, *initial_state = nullptr, *dlast_state = nullptr;
  float *last_state = nullptr, *states = nullptr;
  float *dA = nullptr, *dB = nullptr, *dC = nullptr, *dD = nullptr, *ddelta_bias = nullptr, *dinitial_state = nullptr;
};

struct ScanParams {
  Direction direction[2];
  Plane z, out, dout, dz;
  Plane partial;  // where the direction that comes first leaves its y
  const int* seq_idx = nullptr;
  int directions = 1, batch = 0, dim = 0, seqlen = 0, dstate = 0;
  int stretch = 0;  // steps that a block walks
  int groups = 1, tiles = 1;  // tiles of a group
  int time_fast = 0;          // neighbouring threads load neighbouring steps, not channels
  float scale = 1.0f;
  int softplus = 0;
  int shares_u = 0, shares_delta = 0;  // both directions read, and have the gradient of, the same tensor
};

// What a kernel may rely on. Any: nothing. Whole: every float tensor is of type T, every chunk and tile is full, every packet one access, and no
// state restarts; a gradient has the steps of its tensor. So a kernel for it has no branches on these.
struct Any {
  static constexpr bool whole = false;
  using word = uint32_t;
};
template <class T>
struct Whole {
  static constexpr bool whole = true;
  using type = T;
  using word = std::conditional_t<std::is_same_v<T, float>, float, uint32_t>;
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
  // Its stretch of time, formed where it is wanted: registers.
  static __device__ int begin(const ScanParams& p) { return int(blockIdx.y) * p.stretch; }
  static __device__ int end(const ScanParams& p) { return min(begin(p) + p.stretch, p.seqlen); }
  // Of (stretch and batch, dim), as sums and carried states have it; row_of_batch: of (batch, dim).
  __device__ int64_t row(const ScanParams& p, int channel) const { return row_of_batch(p, channel) + int64_t(blockIdx.y) * p.batch * p.dim; }
  __device__ int64_t row_of_batch(const ScanParams& p, int channel) const { return int64_t(batch) * p.dim + first + channel; }
};

// A stretch of time: steps first .. first + count.
struct Chunk {
  int first, count;
  bool whole;

  // Number `index` of the block's stretch.
  template <class S, class M>
  static __device__ Chunk at(int index, const ScanParams& p) {
    const int first = Tile::begin(p) + index * S::steps, left = Tile::end(p) - first;
    if (M::whole) return {first, S::steps, true};
    return {first, min(S::steps, left), left >= S::steps};
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

// log(1 + exp(x)) = max(x, 0) + 2 atanh(s), s = e / (2 + e), e = exp(-|x|) <= 1: no cancellation anywhere. 2 atanh(s) / s by a polynomial in s^2,
// whose relative error is below 2e-8. Above 20 it is x in fp32.
__device__ inline float softplus(float x) {
  const float e = exp2_fast(-fabsf(x) * kLog2e), s = __fdividef(e, 2.0f + e), q = s * s;
  float poly = fmaf(0.26851499f, q, 0.28236619f);
  poly = fmaf(poly, q, 0.40007561f), poly = fmaf(poly, q, 0.66666639f), poly = fmaf(poly, q, 2.0f);
  return fmaf(s, poly, fmaxf(x, 0.0f));  // the NaN of x comes through s
}

// The derivative of softplus from its value: 1 - exp(-value), by a series where that cancels.
__device__ inline float softplus_slope(float value) {
  float series = 1.0f / 120;
  series = fmaf(series, -value, 1.0f / 24), series = fmaf(series, -value, 1.0f / 6), series = fmaf(series, -value, 0.5f);
  series = fmaf(series, -value, 1.0f) * value;
  return value < 0.1f ? series : 1.0f - exp2_fast(-value * kLog2e);
}

__device__ inline float sigmoid(float x) { return __fdividef(1.0f, 1.0f + exp2_fast(-x * kLog2e)); }

__device__ inline float times_silu(float y, float z) { return __fdividef(y * z, 1.0f + exp2_fast(-z * kLog2e)); }

// The value of the thread that is `apart` threads away, within a warp. Without a detour over integer registers.
template <int apart>
__device__ inline float exchange(float v) {
#ifdef PIXELBYTES_EMULATE
  return __shfl_xor_sync(0xffffffffu, v, apart);
#else
  float other;
  asm volatile("shfl.sync.bfly.b32 %0, %1, %2, 31, 0xffffffff;" : "=f"(other) : "f"(v), "n"(apart));
  return other;
#endif
}

// The sum over `lanes` neighbouring threads, from `apart` threads apart onwards, in each of them.
template <int lanes, int apart = 1>
__device__ inline float sum_of_lanes(float v) {
  if constexpr (apart < lanes)
    return sum_of_lanes<lanes, 2 * apart>(v + exchange<apart>(v));
  else
    return v;
}

// Sums each of four values over `lanes` threads that are `apart` from each other; of these thread number `part`, below 4, is left with the sum of
// value `part`.
template <int lanes, int apart = 1, int count>
__device__ inline float sum_to_lane(const float (&v)[count], int part) {
  static_assert(lanes >= 4 && count <= 4);
  if constexpr (count == 1) {
    return sum_of_lanes<lanes * apart, 4 * apart>(v[0]);
  } else {
    constexpr int half = count / 2;
    const bool upper = part & half;
    float kept[half];
#pragma unroll
    for (int i = 0; i < half; ++i) kept[i] = (upper ? v[i + half] : v[i]) + exchange<half * apart>(upper ? v[i] : v[i + half]);
    return sum_to_lane<lanes, apart>(kept, part);
  }
}

// f(the value of i, below `end`, as a constant): registers cannot be indexed.
template <int end, int begin = 0, class F>
__device__ inline void at_constant(int i, F&& f) {
  if constexpr (end - begin == 1) {
    f(std::integral_constant<int, begin>());
  } else {
    constexpr int kMiddle = (begin + end) / 2;
    if (i < kMiddle)
      at_constant<kMiddle, begin>(i, f);
    else
      at_constant<end, kMiddle>(i, f);
  }
}

// ---- addresses ------------------------------------------------------------------------------------------------------------------------

// Keep the compiler from forming a number anew wherever it is needed.
__device__ inline int settled(int v) {
#ifndef PIXELBYTES_EMULATE
  asm volatile("" : "+r"(v));
#endif
  return v;
}
__device__ inline int64_t settled(int64_t v) {
#ifndef PIXELBYTES_EMULATE
  asm volatile("" : "+l"(v));
#endif
  return v;
}
template <class T>
__device__ inline T* at_offset(void* base, int bytes) {
  return reinterpret_cast<T*>(static_cast<char*>(base) + settled(bytes));
}

// ---- staging --------------------------------------------------------------------------------------------------------------------------

// f(a value of the dtype's type). What is tested first costs least.
template <class M, class F>
__device__ inline void with_dtype(DType dtype, F&& f) {
  if constexpr (M::whole) {
    f(typename M::type());
  } else {
    if (dtype == DType::f32) return f(float());
    if constexpr (kRunsHere<__nv_bfloat16>) {
      if (dtype == DType::bf16) return f(__nv_bfloat16());
    }
    f(__half());
  }
}

// Which elements (step, k) of a chunk a thread loads and stores, k being a channel or a state: `packets` times `width` neighbours along one
// axis, so that a packet is one access where that axis is contiguous in memory. Element i is number i % width of packet i / width.
template <int kCount>
struct Part {
  static constexpr int count = kCount, width = kCount < 4 ? kCount : 4, packets = kCount / width;
  bool along_steps;
  int step, k;        // of element 0
  int step_by, k_by;  // from packet to packet

  __device__ int step_of(int i) const { return step + i / width * step_by + (along_steps ? i % width : 0); }
  __device__ int k_of(int i) const { return k + i / width * k_by + (along_steps ? 0 : i % width); }
};

// Of (step, channel).
template <class S>
struct Elements : Part<S::elements> {
  using Base = Part<S::elements>;
  using Tensor = Plane;
  static constexpr int steps = S::steps;
  static __device__ int64_t base(const Plane& plane, const Tile& tile) { return tile.batch * plane.batch + int64_t(tile.first) * plane.k; }

  int first_slot, next_slot, by_packet;  // in a plane (place, channel) of S::pitch

  // The place of a step in the plane is the step, or counted from the last one if `mirrored`.
  __device__ Elements(unsigned thread, bool time_fast, bool mirrored = false) {
    constexpr unsigned kAcross = S::channels / Base::width, kAlong = S::steps / Base::width;
    this->along_steps = time_fast;
    this->step = int(time_fast ? thread % kAlong * Base::width : thread / kAcross);
    this->k = int(time_fast ? thread / kAlong : thread % kAcross * Base::width);
    this->step_by = time_fast ? 0 : S::threads / kAcross;
    this->k_by = time_fast ? S::threads / kAlong : 0;
    const int by_step = mirrored ? -S::pitch : S::pitch;
    first_slot = settled((mirrored ? S::steps - 1 - this->step : this->step) * S::pitch + this->k);
    next_slot = settled(time_fast ? by_step : 1);
    by_packet = this->step_by * by_step + this->k_by;
  }
  __device__ int slot(int i) const { return first_slot + i / Base::width * by_packet + i % Base::width * next_slot; }
  // In a plane that is mirrored where this one is not.
  __device__ int other_slot(int i) const { return (S::steps - 1) * S::pitch - slot(i) + 2 * this->k_of(i); }
};

// Of a staged B or C: (step, state). Packets and threads lie along the states, which are next to each other in memory.
template <class S>
struct CoefficientElements : Part<S::staged ? S::steps * S::dstate / S::threads : 1> {
  using Base = Part<S::staged ? S::steps * S::dstate / S::threads : 1>;
  using Tensor = Coefficient;
  static constexpr int steps = S::steps;
  static __device__ int64_t base(const Coefficient& c, const Tile& tile) { return tile.batch * c.batch + tile.group * c.group; }
  static_assert(!S::staged || S::dstate % Base::width == 0);

  bool mirrored;  // see Elements

  __device__ explicit CoefficientElements(unsigned thread, bool mirrored_ = false) : mirrored(mirrored_) {
    constexpr unsigned kAcross = S::dstate / Base::width;
    static_assert(!S::staged || S::threads >= kAcross);
    this->along_steps = false;
    this->step = int(thread / kAcross), this->k = int(thread % kAcross * Base::width);
    this->step_by = S::threads / kAcross, this->k_by = 0;
  }
  // Into rows of S::row floats.
  __device__ void put(float* rows, const float (&v)[Base::count]) const {
    float* to = rows + (mirrored ? S::steps - 1 - this->step : this->step) * S::row + this->k;
    const int by = (mirrored ? -this->step_by : this->step_by) * S::row;
#pragma unroll
    for (int i = 0; i < Base::packets; ++i, to += by) {
      if constexpr (Base::width == 4)
        *reinterpret_cast<float4*>(to) = make_float4(v[4 * i], v[4 * i + 1], v[4 * i + 2], v[4 * i + 3]);
      else
#pragma unroll
        for (int k = 0; k < Base::width; ++k) to[k] = v[i * Base::width + k];
    }
  }
};

// Elements as they lie in memory, packed from the low end of each packet's words: a load in flight waits for no conversion.
template <class P, class M>
struct Raw {
  typename M::word word[P::count];
};

// A thread's part of a tensor, chunk after chunk in the order of its direction's visits. Whole: a pointer walks along. Any: the address is formed at
// every access, from the kernel's parameters, since registers are short.
template <class P, class M>
struct Stream {
  const typename P::Tensor& plane;
  const P& part;
  const Tile& tile;
  const int k_count, k_whole;  // elements exist for k below k_count; with k_whole of them the tile is full
  char* here = nullptr;        // the thread's first element of the present chunk
  int onward = 0;              // bytes to the next

  // `chunk`: the one visited first; `by`: +1 or -1.
  __device__ Stream(const typename P::Tensor& plane_, const P& part_, const Tile& tile_, int k_count_, int k_whole_, const Chunk& chunk, int by)
      : plane(plane_), part(part_), tile(tile_), k_count(k_count_), k_whole(k_whole_) {
    if constexpr (M::whole) {
      here = at(chunk.first);
      onward = settled(by * P::steps * item_bytes() * plane.step);
    }
  }
  __device__ explicit operator bool() const { return plane.data != nullptr; }
  __device__ void advance() {
    if (M::whole) here += onward;
  }

  // Zeros where there is no such element.
  template <bool readonly = false>
  __device__ void load(const Chunk& chunk, Raw<P, M>& raw) const {
    with_dtype<M>(plane.dtype, [&](auto example) {
      using T = decltype(example);
      constexpr int kWords = ceil_div(P::width * int(sizeof(T)), 4);
      const char* p = M::whole ? here : at(chunk.first);
      if (M::whole || (plane.packed && k_count == k_whole && chunk.whole)) {
#pragma unroll
        for (int i = 0; i < P::packets; ++i) load_words<readonly, P::width * int(sizeof(T))>(p + i * by_packet<T>(), raw.word + i * P::width);
      } else {
#pragma unroll
        for (int i = 0; i < P::packets; ++i) {
          union { uint32_t word[kWords]; T each[4 * kWords / sizeof(T)]; } packet = {};
#pragma unroll
          for (int k = 0; k < P::width; ++k) {
            if (!exists(chunk, i * P::width + k)) continue;
            const T* from = reinterpret_cast<const T*>(p + i * by_packet<T>()) + k * next();
            packet.each[k] = readonly ? load_value_readonly(from) : load_value(from);
          }
#pragma unroll
          for (int w = 0; w < kWords; ++w) raw.word[i * P::width + w] = packet.word[w];
        }
      }
    });
  }

  // What load brought, as fp32.
  __device__ void open(const Raw<P, M>& raw, float (&v)[P::count]) const {
    with_dtype<M>(plane.dtype, [&](auto example) {
      using T = decltype(example);
      constexpr int kWords = ceil_div(P::width * int(sizeof(T)), 4);
      if constexpr (std::is_same_v<T, typename M::word>) {
#pragma unroll
        for (int i = 0; i < P::count; ++i) v[i] = raw.word[i];
      } else {
#pragma unroll
        for (int i = 0; i < P::packets; ++i) {
          union { uint32_t word[kWords]; T each[4 * kWords / sizeof(T)]; } packet;
#pragma unroll
          for (int w = 0; w < kWords; ++w) packet.word[w] = raw.word[i * P::width + w];
#pragma unroll
          for (int k = 0; k < P::width; ++k) v[i * P::width + k] = to_float(packet.each[k]);
        }
      }
    });
  }
  __device__ void load(const Chunk& chunk, float (&v)[P::count]) const {
    Raw<P, M> raw;
    load(chunk, raw);
    open(raw, v);
  }

  __device__ void store(const Chunk& chunk, const float (&v)[P::count]) const {
    with_dtype<M>(plane.dtype, [&](auto example) {
      using T = decltype(example);
      char* p = M::whole ? here : at(chunk.first);
#pragma unroll
      for (int i = 0; i < P::packets; ++i) {
        T* to = reinterpret_cast<T*>(p + i * by_packet<T>());
        if (M::whole || (plane.packed && k_count == k_whole && chunk.whole)) {
          float packet[P::width];
#pragma unroll
          for (int k = 0; k < P::width; ++k) packet[k] = v[i * P::width + k];
          store_many<P::width>(to, packet);
        } else {
#pragma unroll
          for (int k = 0; k < P::width; ++k)
            if (exists(chunk, i * P::width + k)) cuda::store(to + k * next(), v[i * P::width + k]);
        }
      }
    });
  }

 private:
  __device__ char* at(int step) const {
    return plane.data + (P::base(plane, tile) + (int64_t(step) + part.step) * plane.step + int64_t(part.k) * plane.k) * item_bytes();
  }
  __device__ int item_bytes() const {
    if constexpr (M::whole) return int(sizeof(typename M::type));
    return plane.dtype == DType::f32 ? 4 : 2;
  }
  __device__ int64_t next() const { return part.along_steps ? plane.step : plane.k; }  // from neighbour to neighbour, in elements
  template <class T>
  __device__ int64_t by_packet() const { return (int64_t(part.step_by) * plane.step + int64_t(part.k_by) * plane.k) * int64_t(sizeof(T)); }
  __device__ bool exists(const Chunk& chunk, int i) const { return part.step_of(i) < chunk.count && part.k_of(i) < k_count; }
};

// Where a thread's walk begins.
template <class S, class M>
struct Start {
  const Tile& tile;
  const Chunk& chunk;
  int by;

  __device__ Stream<Elements<S>, M> of(const Plane& plane, const Elements<S>& elements) const {
    return {plane, elements, tile, tile.count, S::channels, chunk, by};
  }
  __device__ Stream<CoefficientElements<S>, M> of(const Coefficient& c, const CoefficientElements<S>& elements, int dstate) const {
    return {c, elements, tile, dstate, S::dstate, chunk, by};
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
  bool mirrored;  // see Elements

  // `rows`: where the staged rows of this direction are.
  __device__ Coefficients(const Direction& d, const Tile& tile, int channel, int part, const float* rows, bool mirrored_ = false) : mirrored(mirrored_) {
    if constexpr (S::staged) {
      B = rows + part * S::states, C = B + S::dstate, B_step = C_step = S::row;
    } else {
      B = base(d.B, tile, channel) + part * S::states, B_step = d.B.step;
      C = base(d.C, tile, channel) + part * S::states, C_step = d.C.step;
    }
  }
  __device__ void read_B(const Chunk& chunk, int place, float (&v)[S::states]) const { read(B, B_step, chunk, place, v); }
  __device__ void read_C(const Chunk& chunk, int place, float (&v)[S::states]) const { read(C, C_step, chunk, place, v); }

 private:
  static __device__ const float* base(const Coefficient& c, const Tile& tile, int channel) {
    const int of = c.constant ? tile.first + min(channel, tile.count - 1) : tile.group;
    return reinterpret_cast<const float*>(c.data) + tile.batch * c.batch + of * c.group;
  }
  __device__ void read(const float* p, int by, const Chunk& chunk, int place, float (&v)[S::states]) const {
    if constexpr (S::staged)
      read_states(p + place * S::row, v);
    else
      load_many_readonly(p + int64_t(chunk.first + (mirrored ? S::steps - 1 - place : place)) * by, v);
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
