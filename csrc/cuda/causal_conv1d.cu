// Depthwise causal convolution of 2 to 4 taps, forward and backward, in two arrangements:
//   channels: a thread owns kVec neighbouring channels and walks a run of steps, the last three inputs in registers; for tensors whose
//             channels lie next to each other, and with kVec = 1 for any strides;
//   time:     a warp owns a run of one channel, a lane kVec neighbouring steps; the halo comes from the neighbouring lanes. For rows whose
//             steps lie next to each other and fill whole packets.
// No shared memory. Deterministic: the sums for weight and bias are written per run and added in order (ordered_sum).
//
// Inside the kernels time is logical: with `reverse` the launcher hands over the last step's address and negative strides.
#include "causal_conv1d.h"

#include "activation.h"
#include "dispatch.h"
#include "ordered_sum.h"

namespace pixelbytes::cuda {
namespace {

constexpr int kTaps = 4, kHalo = kTaps - 1, kThreads = 128;

template <class T>
struct Rows {  // (batch, dim, time)
  T* data;
  int64_t batch, dim, time;  // strides
  __device__ T* at(int64_t b, int64_t d, int64_t t) const { return data + b * batch + d * dim + t * time; }
};

template <class T>
struct ConvParams {
  Rows<const T> x, dout;
  Rows<T> out, dx;
  const float *weight, *bias;
  const char* seq;
  bool seq_wide;  // 64 bits, or else 32
  int64_t seq_batch, seq_time;
  Rows<const T> initial, dfinal;  // states: (batch, dim, width - 1), or null
  Rows<T> final_states;
  Rows<float> dinitial;
  float* partial;
  int64_t batch, dim, seqlen, steps;
  unsigned runs, lanes;  // lanes: threads side by side in the channels arrangement
  int width;
  bool silu;

  __device__ int64_t sequence(int64_t b, int64_t t) const {
    const int64_t at = b * seq_batch + t * seq_time;
    return seq_wide ? load_value_readonly(reinterpret_cast<const long long*>(seq) + at) : load_value_readonly(reinterpret_cast<const int*>(seq) + at);
  }
  // Bit j: the input j steps before step t counts, for it belongs to the same sequence. States belong to a row's first sequence.
  __device__ unsigned taps(int64_t b, int64_t t) const {
    unsigned alive = (1u << width) - 1;
    if (!seq) return alive;
    const int64_t own = sequence(b, t);
#pragma unroll
    for (int j = 1; j < kTaps; ++j)
      if (j < width && sequence(b, max(t - j, int64_t(0))) != own) alive &= ~(1u << j);
    return alive;
  }
  // The input at step t >= 1 - width of one channel, as fp32. What stands before a row is its state, or zero.
  __device__ float input(int64_t b, int64_t d, int64_t t) const {
    if (t >= 0) return load_readonly(x.at(b, d, t));
    const int64_t k = t + width - 1;
    if (!initial.data || k < 0) return 0.0f;
    return load_readonly(initial.at(b, d, k));
  }
  __device__ float tap(int64_t d, int j) const { return load_readonly(weight + d * width + (width - 1 - j)); }
};

// ---- channels -------------------------------------------------------------------------------------------------------------------------

// What a thread of the channels arrangement owns.
struct Owned {
  int64_t b, d, run, first, last;  // first channel; steps [first, last)
  bool any;
};

template <int kVec, class Params>
__device__ Owned owned(const Params& p) {
  const unsigned i = blockIdx.x * kThreads + threadIdx.x, rest = i / p.lanes;  // launch_many checks that they fit 32 bits
  Owned o;
  o.d = int64_t(i % p.lanes) * kVec;
  o.run = rest % p.runs;
  o.b = rest / p.runs;
  o.any = o.b < p.batch;
  o.first = o.run * p.steps;
  o.last = min(o.first + p.steps, p.seqlen);
  return o;
}

// kVec values as they lie in memory: what is loaded ahead takes no more registers than its bytes.
template <class T, int kVec>
struct Channels {
  using Word = typename Packet<kVec * int(sizeof(T))>::type;
  Word word;

  __device__ void load(const Rows<const T>& rows, int64_t b, int64_t d, int64_t t) {
    word = load_value_readonly(reinterpret_cast<const Word*>(rows.at(b, d, t)));
  }
  __device__ void unpack(float (&v)[kVec]) const {
    union { Word word; T each[kVec]; } packet;
    packet.word = word;
#pragma unroll
    for (int i = 0; i < kVec; ++i) v[i] = to_float(packet.each[i]);
  }
};

template <int kVec, class T>
__device__ void store_channels(const Rows<T>& rows, int64_t b, int64_t d, int64_t t, const float (&v)[kVec]) {
  if constexpr (kVec == 1) {
    store(rows.at(b, d, t), v[0]);
  } else {
    store_many<kVec>(rows.at(b, d, t), v);
  }
}

// The weights of kVec channels by distance in time, and the bias.
template <int kVec, class T>
__device__ void load_weights(const ConvParams<T>& p, int64_t d, float (&w)[kTaps][kVec], float (&bias)[kVec]) {
#pragma unroll
  for (int v = 0; v < kVec; ++v) {
    bias[v] = p.bias ? load_readonly(p.bias + d + v) : 0.0f;
#pragma unroll
    for (int j = 0; j < kTaps; ++j) w[j][v] = j < p.width ? p.tap(d + v, j) : 0.0f;
  }
}

template <class T, int kVec>
__global__ void __launch_bounds__(kThreads) conv_forward_channels(const ConvParams<T> p) {
  if constexpr (!kRunsHere<T>) return;
  const Owned o = owned<kVec>(p);
  if (!o.any) return;
  constexpr int kAhead = 4;  // steps loaded together
  float w[kTaps][kVec], bias[kVec], past[kHalo][kVec];  // past[j]: the input j + 1 steps ago
  load_weights(p, o.d, w, bias);
#pragma unroll
  for (int j = 0; j < kHalo; ++j)
#pragma unroll
    for (int v = 0; v < kVec; ++v) past[j][v] = p.input(o.b, o.d + v, o.first - 1 - j);
  Channels<T, kVec> next[kAhead];
  const auto load_ahead = [&](int64_t t0) {
#pragma unroll
    for (int i = 0; i < kAhead; ++i)
      if (t0 + i < o.last) next[i].load(p.x, o.b, o.d, t0 + i);
  };
  load_ahead(o.first);
  for (int64_t t0 = o.first; t0 < o.last; t0 += kAhead) {
    Channels<T, kVec> now[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) now[i] = next[i];
    load_ahead(t0 + kAhead);
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (t0 + i >= o.last) break;
      float x[kVec], out[kVec];
      now[i].unpack(x);
#pragma unroll
      for (int v = 0; v < kVec; ++v) out[v] = bias[v] + w[0][v] * x[v];
      const unsigned taps = p.taps(o.b, t0 + i);
#pragma unroll
      for (int j = 1; j < kTaps; ++j) {
        if (!(taps >> j & 1)) continue;
#pragma unroll
        for (int v = 0; v < kVec; ++v) out[v] += w[j][v] * past[j - 1][v];
      }
#pragma unroll
      for (int v = 0; v < kVec; ++v) {
        if (p.silu) out[v] = silu(out[v]);
        past[2][v] = past[1][v], past[1][v] = past[0][v], past[0][v] = x[v];
      }
      store_channels<kVec>(p.out, o.b, o.d, t0 + i, out);
    }
  }
  if (!p.final_states.data || o.last != p.seqlen) return;
#pragma unroll
  for (int j = 0; j < kHalo; ++j) {
    if (j >= p.width - 1) continue;
#pragma unroll
    for (int v = 0; v < kVec; ++v)
      store(p.final_states.at(o.b, o.d + v, p.width - 2 - j), past[j][v]);
  }
}

// Gradient of what stands before the SiLU.
__device__ inline float before_silu(float dout, float pre, bool is_silu) { return is_silu ? dout * silu_slope(pre) : dout; }

template <class T, int kVec>
__global__ void __launch_bounds__(kThreads, 4) conv_backward_channels(const ConvParams<T> p) {
  if constexpr (!kRunsHere<T>) return;
  const Owned o = owned<kVec>(p);
  if (!o.any) return;
  float w[kTaps][kVec], bias[kVec], past[kHalo][kVec], dw[kTaps][kVec] = {}, dbias[kVec] = {};
  float dpre[kTaps][kVec] = {};  // dpre[j]: of the step j steps ago
  unsigned taps = 0;             // of the last steps, four bits each
  load_weights(p, o.d, w, bias);
#pragma unroll
  for (int j = 0; j < kHalo; ++j)
#pragma unroll
    for (int v = 0; v < kVec; ++v) past[j][v] = p.input(o.b, o.d + v, o.first - 1 - j);
  // dx of step t needs dpre of t .. t + 3, so it is written three steps later. The next step's inputs are on their way.
  Channels<T, kVec> next_x, next_dout;
  next_x.load(p.x, o.b, o.d, o.first), next_dout.load(p.dout, o.b, o.d, o.first);
  for (int64_t t = o.first; t < o.last + kHalo; ++t) {
    float x[kVec] = {}, dout[kVec] = {}, pre[kVec];
    const bool inside = t < p.seqlen;
    if (inside) next_x.unpack(x), next_dout.unpack(dout);
    if (t + 1 < min(o.last + kHalo, p.seqlen)) next_x.load(p.x, o.b, o.d, t + 1), next_dout.load(p.dout, o.b, o.d, t + 1);
    taps = taps << kTaps | (inside ? p.taps(o.b, t) : 0);
#pragma unroll
    for (int v = 0; v < kVec; ++v) {
      pre[v] = bias[v] + w[0][v] * x[v];
#pragma unroll
      for (int j = kTaps - 1; j > 0; --j) dpre[j][v] = dpre[j - 1][v];
    }
#pragma unroll
    for (int j = 1; j < kTaps; ++j) {
      if (!(taps >> j & 1)) continue;
#pragma unroll
      for (int v = 0; v < kVec; ++v) pre[v] += w[j][v] * past[j - 1][v];
    }
#pragma unroll
    for (int v = 0; v < kVec; ++v) {
      dpre[0][v] = inside ? before_silu(dout[v], pre[v], p.silu) : 0.0f;
      if (t < o.last) dbias[v] += dpre[0][v], dw[0][v] += dpre[0][v] * x[v];
    }
    if (t < o.last) {
#pragma unroll
      for (int j = 1; j < kTaps; ++j) {
        if (!(taps >> j & 1)) continue;
#pragma unroll
        for (int v = 0; v < kVec; ++v) dw[j][v] += dpre[0][v] * past[j - 1][v];
      }
    }
    // The step that is complete now. Before a row's first step it is an initial state.
    const int64_t done = t - kHalo, state = done + p.width - 1;
    const bool is_state = o.first == 0 && done < 0 && state >= 0 && p.dinitial.data;
    if ((done >= o.first && p.dx.data) || is_state) {
      float dx[kVec] = {};
#pragma unroll
      for (int j = 0; j < kTaps; ++j) {
        if (!(taps >> (kTaps * (kHalo - j) + j) & 1)) continue;  // tap j of the step j steps later
#pragma unroll
        for (int v = 0; v < kVec; ++v) dx[v] += w[j][v] * dpre[kHalo - j][v];
      }
      const int64_t kept = state - p.seqlen;  // index among the final states
      if (p.dfinal.data && kept >= 0) {
#pragma unroll
        for (int v = 0; v < kVec; ++v) dx[v] += load_readonly(p.dfinal.at(o.b, o.d + v, kept));
      }
      if (is_state) {
#pragma unroll
        for (int v = 0; v < kVec; ++v) store(p.dinitial.at(o.b, o.d + v, state), dx[v]);
      } else {
        store_channels<kVec>(p.dx, o.b, o.d, done, dx);
      }
    }
#pragma unroll
    for (int v = 0; v < kVec; ++v) past[2][v] = past[1][v], past[1][v] = past[0][v], past[0][v] = x[v];
  }
  if (!p.partial) return;
  float* partial = p.partial + ((o.b * p.runs + o.run) * (p.width + 1)) * p.dim + o.d;
#pragma unroll
  for (int j = 0; j < kTaps; ++j) {
    if (j >= p.width) continue;
#pragma unroll
    for (int v = 0; v < kVec; ++v) store(partial + (p.width - 1 - j) * p.dim + v, dw[j][v]);
  }
#pragma unroll
  for (int v = 0; v < kVec; ++v) store(partial + p.width * p.dim + v, dbias[v]);
}

// ---- time -----------------------------------------------------------------------------------------------------------------------------

// Steps t .. t + kVec - 1 of a channel whose steps lie next to each other, upwards or downwards in memory.
template <int kVec, class T>
__device__ void load_steps(const T* p, int64_t stride, float* v) {
  float packet[kVec];
  load_many_readonly<kVec>(stride > 0 ? p : p - (kVec - 1), packet);
#pragma unroll
  for (int i = 0; i < kVec; ++i) v[i] = stride > 0 ? packet[i] : packet[kVec - 1 - i];
}

template <int kVec, class T>
__device__ void store_steps(T* p, int64_t stride, const float (&v)[kVec]) {
  float packet[kVec];
#pragma unroll
  for (int i = 0; i < kVec; ++i) packet[i] = stride > 0 ? v[i] : v[kVec - 1 - i];
  store_many<kVec>(stride > 0 ? p : p - (kVec - 1), packet);
}

// x of steps t - 3 .. t + kVec - 1 + after into `x`, for the lane's own steps t .. t + kVec - 1. All lanes of the warp must come here.
template <int kVec, int kAfter, class T>
__device__ void load_with_halo(const ConvParams<T>& p, int64_t b, int64_t d, int64_t t, float (&x)[kHalo + kVec + kAfter]) {
  const int lane = threadIdx.x % 32;
  const bool inside = t < p.seqlen;
#pragma unroll
  for (int i = 0; i < kVec; ++i) x[kHalo + i] = 0.0f;
  if (inside) load_steps<kVec>(p.x.at(b, d, t), p.x.time, x + kHalo);
#pragma unroll
  for (int k = 1; k <= kHalo; ++k) {  // before
    float v = __shfl_up_sync(~0u, x[kHalo + kVec - k], 1);
    if (lane == 0) v = inside && k < p.width ? p.input(b, d, t - k) : 0.0f;
    x[kHalo - k] = v;
  }
#pragma unroll
  for (int k = 0; k < kAfter; ++k) {
    float v = __shfl_down_sync(~0u, x[kHalo + k], 1);
    if (lane == 31) v = t + kVec + k < p.seqlen ? load_readonly(p.x.at(b, d, t + kVec + k)) : 0.0f;
    x[kHalo + kVec + k] = v;
  }
}

__device__ inline float convolve(unsigned taps, const float (&w)[kTaps], float bias, const float* x) {
  float out = bias + w[0] * x[0];
#pragma unroll
  for (int j = 1; j < kTaps; ++j)
    if (taps >> j & 1) out += w[j] * x[-j];
  return out;
}

// The row and run of a warp. Rows are counted with the channel running fastest.
struct Row {
  int64_t b, d, run, first, last;
  bool any;
};

template <class Params>
__device__ Row warp_row(const Params& p) {
  const unsigned i = blockIdx.x * (kThreads / 32) + threadIdx.x / 32, rest = i / p.runs, dim = unsigned(p.dim);
  Row r;
  r.run = i % p.runs;
  r.d = rest % dim;
  r.b = rest / dim;
  r.any = r.b < p.batch;
  r.first = r.run * p.steps;
  r.last = min(r.first + p.steps, p.seqlen);
  return r;
}

template <class T, int kVec>
__global__ void __launch_bounds__(kThreads) conv_forward_time(const ConvParams<T> p) {
  if constexpr (!kRunsHere<T>) return;
  const Row r = warp_row(p);
  if (!r.any) return;  // whole warps
  const int lane = threadIdx.x % 32;
  float w[kTaps];
#pragma unroll
  for (int j = 0; j < kTaps; ++j) w[j] = j < p.width ? p.tap(r.d, j) : 0.0f;
  const float bias = p.bias ? load_readonly(p.bias + r.d) : 0.0f;
  for (int64_t t0 = r.first; t0 < r.last; t0 += 32 * kVec) {
    const int64_t t = t0 + lane * kVec;
    float x[kHalo + kVec];
    load_with_halo<kVec, 0>(p, r.b, r.d, t, x);
    if (t >= r.last) continue;
    float out[kVec];
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      out[i] = convolve(p.taps(r.b, t + i), w, bias, x + kHalo + i);
      if (p.silu) out[i] = silu(out[i]);
    }
    store_steps<kVec>(p.out.at(r.b, r.d, t), p.out.time, out);
    if (!p.final_states.data || t + kVec != p.seqlen) continue;
#pragma unroll
    for (int j = 0; j < kHalo; ++j)
      if (j < p.width - 1) store(p.final_states.at(r.b, r.d, p.width - 2 - j), x[kHalo + kVec - 1 - j]);
  }
}

template <class T, int kVec>
__global__ void __launch_bounds__(kThreads) conv_backward_time(const ConvParams<T> p) {
  if constexpr (!kRunsHere<T>) return;
  const Row r = warp_row(p);
  if (!r.any) return;  // whole warps
  const int lane = threadIdx.x % 32;
  float w[kTaps], dw[kTaps] = {}, dbias = 0.0f;
#pragma unroll
  for (int j = 0; j < kTaps; ++j) w[j] = j < p.width ? p.tap(r.d, j) : 0.0f;
  const float bias = p.bias ? load_readonly(p.bias + r.d) : 0.0f;
  for (int64_t t0 = r.first; t0 < r.last; t0 += 32 * kVec) {
    const int64_t t = t0 + lane * kVec;
    float x[kHalo + kVec + kHalo], dpre[kVec + kHalo];
    unsigned taps[kVec + kHalo];
    load_with_halo<kVec, kHalo>(p, r.b, r.d, t, x);
#pragma unroll
    for (int i = 0; i < kVec; ++i) dpre[i] = 0.0f;
    if (t < p.seqlen) load_steps<kVec>(p.dout.at(r.b, r.d, t), p.dout.time, dpre);
#pragma unroll
    for (int k = 0; k < kHalo; ++k) {
      float v = __shfl_down_sync(~0u, dpre[k], 1);
      if (lane == 31) v = t + kVec + k < p.seqlen ? load_readonly(p.dout.at(r.b, r.d, t + kVec + k)) : 0.0f;
      dpre[kVec + k] = v;
    }
    if (t >= r.last) continue;
#pragma unroll
    for (int i = 0; i < kVec + kHalo; ++i) {
      taps[i] = t + i < p.seqlen ? p.taps(r.b, t + i) : 0;
      if (taps[i]) dpre[i] = before_silu(dpre[i], convolve(taps[i], w, bias, x + kHalo + i), p.silu);
    }
    float dx[kVec];
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      dbias += dpre[i];
      dx[i] = 0.0f;
#pragma unroll
      for (int j = 0; j < kTaps; ++j) {
        if (taps[i] >> j & 1) dw[j] += dpre[i] * x[kHalo + i - j];
        if (taps[i + j] >> j & 1) dx[i] += w[j] * dpre[i + j];
      }
      const int64_t kept = t + i + p.width - 1 - p.seqlen;
      if (p.dfinal.data && kept >= 0) dx[i] += load_readonly(p.dfinal.at(r.b, r.d, kept));
    }
    if (p.dx.data) store_steps<kVec>(p.dx.at(r.b, r.d, t), p.dx.time, dx);
    if (p.dinitial.data && t == 0) {
      for (int k = 0; k < p.width - 1; ++k) {  // step k - (width - 1), before the row
        float sum = 0.0f;
#pragma unroll
        for (int i = 0; i < kHalo; ++i) {  // it is a tap of step i
          const int j = i - k + p.width - 1;
          if (taps[i] >> j & 1) sum += p.tap(r.d, j) * dpre[i];
        }
        if (p.dfinal.data && k >= p.seqlen) sum += load_readonly(p.dfinal.at(r.b, r.d, k - p.seqlen));
        store(p.dinitial.at(r.b, r.d, k), sum);
      }
    }
  }
  if (!p.partial) return;
  float* partial = p.partial + ((r.b * p.runs + r.run) * (p.width + 1)) * p.dim + r.d;
#pragma unroll
  for (int j = 0; j <= kTaps; ++j) {
    float sum = j < kTaps ? dw[j < kTaps ? j : 0] : dbias;
#pragma unroll
    for (int k = 16; k > 0; k /= 2) sum += __shfl_xor_sync(~0u, sum, k);
    if (lane == 0 && j < p.width) store(partial + (p.width - 1 - j) * p.dim, sum);
    if (lane == 0 && j == kTaps) store(partial + p.width * p.dim, sum);
  }
}

// ---- launching ------------------------------------------------------------------------------------------------------------------------

template <class T>
Rows<T> rows_of(const Tensor& t, bool reverse) {
  Rows<T> rows{reinterpret_cast<T*>(t.data), t.stride[0], t.stride[1], t.stride[2]};
  if (reverse && t) rows.data += (t.size[2] - 1) * t.stride[2], rows.time = -rows.time;
  return rows;
}

template <class T>
ConvParams<T> params_of(const ConvArgs& a) {
  ConvParams<T> p{};
  p.x = rows_of<const T>(a.x, a.reverse), p.dout = rows_of<const T>(a.dout, a.reverse);
  p.out = rows_of<T>(a.out, a.reverse), p.dx = rows_of<T>(a.dx, a.reverse);
  p.weight = reinterpret_cast<const float*>(a.weight.data), p.bias = reinterpret_cast<const float*>(a.bias.data);
  p.seq = a.seq_idx.data, p.seq_wide = a.seq_idx.dtype == DType::i64, p.seq_batch = a.seq_idx.stride[0], p.seq_time = a.seq_idx.stride[1];
  p.batch = a.x.size[0], p.dim = a.x.size[1], p.seqlen = a.x.size[2], p.width = int(a.weight.size[1]), p.silu = a.silu;
  if (a.reverse && p.seq) p.seq += (p.seqlen - 1) * p.seq_time * item_size(a.seq_idx.dtype), p.seq_time = -p.seq_time;
  p.initial = rows_of<const T>(a.initial_states, false), p.final_states = rows_of<T>(a.final_states, false);
  p.dfinal = rows_of<const T>(a.dfinal_states, false), p.dinitial = rows_of<float>(a.dinitial_states, false);
  p.partial = reinterpret_cast<float*>(a.partial.data);
  p.steps = a.steps, p.runs = unsigned(ceil_div(p.seqlen, p.steps));
  return p;
}

// Neighbours along `axis` lie next to each other and can be moved in packets of kVec.
template <class T, int kVec>
bool packets_along(int axis, std::initializer_list<const Tensor*> tensors) {
  for (const Tensor* t : tensors) {
    if (!*t) continue;
    constexpr int64_t kBytes = kVec * int64_t(sizeof(T));
    const int other = 3 - axis;
    if (t->stride[axis] != 1 || t->size[axis] % kVec || reinterpret_cast<uintptr_t>(t->data) % kBytes || t->stride[0] * int64_t(sizeof(T)) % kBytes ||
        t->stride[other] * int64_t(sizeof(T)) % kBytes)
      return false;
  }
  return true;
}

// `count` threads or warps, `each` to a block.
template <class T>
const char* launch_many(const char* name, void (*kernel)(ConvParams<T>), int64_t count, int each, const ConvParams<T>& p, const Launch& at) {
  if (count > 0xffffffff) return "causal_conv1d: more than 2^32 threads; split the batch";
  return launch(name, kernel, dim3(unsigned(ceil_div<int64_t>(count, each))), dim3(kThreads), 0, at, p);
}

template <class T, int kVec>
const char* launch_channels(const char* name, void (*kernel)(ConvParams<T>), ConvParams<T> p, const Launch& at) {
  p.lanes = unsigned(p.dim / kVec);
  return launch_many(name, kernel, p.batch * p.runs * p.lanes, kThreads, p, at);
}

template <class T>
const char* launch_time(const char* name, void (*kernel)(ConvParams<T>), const ConvParams<T>& p, const Launch& at) {
  return launch_many(name, kernel, p.batch * p.runs * p.dim, kThreads / 32, p, at);
}

const char* sizes_behind(const char* error, const ConvArgs& a) {
  return with_sizes(error, "batch=%lld, dim=%lld, seqlen=%lld, width=%lld", (long long)a.x.size[0], (long long)a.x.size[1], (long long)a.x.size[2],
                    (long long)a.weight.size[1]);
}

}  // namespace

const char* conv_forward(const Launch& at, const ConvArgs& a) {
  const char* error = nullptr;
  PIXELBYTES_DISPATCH_FLOAT(a.x.dtype, T, {
    constexpr int kVec = 16 / sizeof(T);
    const ConvParams<T> p = params_of<T>(a);
    if (packets_along<T, kVec>(1, {&a.x, &a.out}))
      error = launch_channels<T, kVec>("conv_forward_channels", conv_forward_channels<T, kVec>, p, at);
    else if (packets_along<T, kVec>(2, {&a.x, &a.out}))
      error = launch_time<T>("conv_forward_time", conv_forward_time<T, kVec>, p, at);
    else
      error = launch_channels<T, 1>("conv_forward_strided", conv_forward_channels<T, 1>, p, at);
  })
  return sizes_behind(error, a);
}

const char* conv_backward(const Launch& at, const ConvArgs& a) {
  const char* error = nullptr;
  PIXELBYTES_DISPATCH_FLOAT(a.x.dtype, T, {
    constexpr int kVec = 4;
    const ConvParams<T> p = params_of<T>(a);
    if (packets_along<T, kVec>(1, {&a.x, &a.dout, &a.dx}))
      error = launch_channels<T, kVec>("conv_backward_channels", conv_backward_channels<T, kVec>, p, at);
    else if (packets_along<T, kVec>(2, {&a.x, &a.dout, &a.dx}))
      error = launch_time<T>("conv_backward_time", conv_backward_time<T, kVec>, p, at);
    else
      error = launch_channels<T, 1>("conv_backward_strided", conv_backward_channels<T, 1>, p, at);
  })
  if (!error && a.partial)
    error = ordered_sum(at, reinterpret_cast<const float*>(a.partial.data), a.partial.size[0], a.partial.size[1] * a.partial.size[2],
                        reinterpret_cast<float*>(a.sums.data));
  return sizes_behind(error, a);
}

}  // namespace pixelbytes::cuda
