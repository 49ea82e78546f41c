// The scan's backward.
//
// A block: see scan_tile.h; a direction visits its chunks from its last to its first. From the state stored at a chunk's entry it computes
// the chunk's states once, keeping one in kGroup (in local memory, which stays in L1), and then, group by group from the last, once more with every state kept,
// before the adjoint g_t = C_t dy_t + a_{t+1} g_{t+1} walks back. dB_t = sum of dt u g and dC_t = sum of dy h run over the channels of the
// tile, through shared memory: one addend a tile, no atomics. Shared memory per direction: planes (step, channel) of step size, u and dy,
// which the results ddelta, du and y replace; the staged B and C; the states of a group: 6,528 + 4,608 + 4,096 bytes at dstate 16.
// Deterministic: fixed order of all sums.
#pragma once
#include "scan_launch.h"
#include "scan_tile.h"

namespace pixelbytes::cuda {
namespace {

constexpr int kGroup = 4;  // steps whose states are kept at once
constexpr int kGroups = kChunk / kGroup;

// Threads that a multiprocessor is to hold at dstate 16. On sm_75 shared memory ends at 256; elsewhere a few more are worth a few bytes of
// spilled registers.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
constexpr int kResidentThreads = 384;
#else
constexpr int kResidentThreads = 256;
#endif

template <class S>
struct alignas(16) SharedBackward {
  float delta[kChunk * S::pitch], u[kChunk * S::pitch], dy[kChunk * S::pitch];
  alignas(16) float rows[S::staged ? kChunk * S::row : 4];
  float delta_bias[S::channels];
  alignas(16) float states[kGroup * S::channels * S::dstate];  // (step of the group, channel, state)
  unsigned resets;
  int careful;  // the chunk is cut short, or a state restarts in it
};

template <int count>
__device__ inline void write_states(float* p, const float (&v)[count]) {
  if constexpr (count % 4 == 0) {
#pragma unroll
    for (int i = 0; i < count; i += 4) *reinterpret_cast<float4*>(p + i) = make_float4(v[i], v[i + 1], v[i + 2], v[i + 3]);
  } else {
    *reinterpret_cast<float2*>(p) = make_float2(v[0], v[1]);
  }
}

// Sums of factor * state over the channels of the tile, for the steps of a group, into an addend of dB or dC. `factor(step, channel)`.
template <class S, class Factor>
__device__ inline void sum_over_channels(const ScanParams& p, const Tile& tile, const Chunk& chunk, int start, int by, int count, int thread,
                                         const float* states, float* gradient, Factor factor) {
  constexpr int kFours = S::dstate / 4, kTasks = kGroup * kFours;
  constexpr int kRounds = kTasks > S::threads ? kTasks / S::threads : 1, kSplit = kTasks > S::threads ? 1 : S::threads / kTasks;
  static_assert(kSplit * kFours <= 32 || kSplit == 1);
#pragma unroll
  for (int round = 0; round < kRounds; ++round) {
    const int task = round * S::threads + thread;
    const int four = task % kFours, share = task / kFours % kSplit, j = task / (kFours * kSplit);
    float sum[4] = {};
    if (j < count) {
#pragma unroll
      for (int i = 0; i < S::channels / kSplit; ++i) {
        const int channel = share + i * kSplit;
        if (channel >= tile.count) break;
        float v[4];
        read_states(states + (j * S::channels + channel) * S::dstate + 4 * four, v);
        const float f = factor(start + j * by, channel);
#pragma unroll
        for (int n = 0; n < 4; ++n) sum[n] = fmaf(f, v[n], sum[n]);
      }
    }
    if constexpr (kSplit > 1) {
#pragma unroll
      for (int n = 0; n < 4; ++n) sum[n] = sum_of_lanes<kSplit * kFours, kFours>(sum[n]);
    }
    if (j < count && share == 0) {
      const int64_t at = ((int64_t(tile.index) * p.batch + tile.batch) * p.groups + tile.group) * p.seqlen + chunk.first + start + j * by;
      store_many<4>(gradient + at * S::dstate + 4 * four, sum);
    }
  }
}

// The same for a coefficient that is constant in time: sums over the steps of a group, added to what earlier groups left.
template <class S, class Factor>
__device__ inline void sum_over_steps(const ScanParams& p, const Tile& tile, int start, int by, int count, int thread, const float* states,
                                      float* gradient, Factor factor) {
  constexpr int kFours = S::dstate / 4, kTasks = S::channels * kFours;
  for (int task = thread; task < kTasks; task += S::threads) {
    const int four = task % kFours, channel = task / kFours;
    if (channel >= tile.count) break;
    float* const place = gradient + (int64_t(tile.batch) * p.dim + tile.first + channel) * S::dstate + 4 * four;
    float sum[4];
    load_many<4>(place, sum);
    for (int j = 0; j < count; ++j) {
      float v[4];
      read_states(states + (j * S::channels + channel) * S::dstate + 4 * four, v);
      const float f = factor(start + j * by, channel);
#pragma unroll
      for (int n = 0; n < 4; ++n) sum[n] = fmaf(f, v[n], sum[n]);
    }
    store_many<4>(place, sum);
  }
}

// One chunk: forwards for the states, then back.
template <class S>
struct Walk {
  const ScanParams& p;
  const Direction& d;
  const Tile& tile;
  const Chunk& chunk;
  const Coefficients<S>& coefficients;
  SharedBackward<S>& own;
  float* own_states;  // of this thread, at step 0 of a group
  const unsigned resets;
  const int thread, channel, part;
  const bool wants_y;
  const float D;

  // careful: steps may be missing at the end of the chunk's walk, and states may restart.
  template <bool careful>
  __device__ void run(const float (&A)[S::states], float (&h)[S::states], float (&g)[S::states], float (&dA)[S::states], float& dD,
                      float& dbias) const {
    // Step k of the chunk in the direction's own time has the slot start + k * by.
    const int start = d.reverse ? chunk.count - 1 : 0, by = d.reverse ? -1 : 1;
    float entry[kGroups][S::states];  // state at the entry of each group
#pragma unroll 1
    for (int group = 0; group < kGroups; ++group) {
#pragma unroll
      for (int i = 0; i < S::states; ++i) entry[group][i] = h[i];
      if (group == kGroups - 1) break;
#pragma unroll
      for (int j = 0; j < kGroup; ++j) {
        const int k = group * kGroup + j, step = start + k * by;
        if (careful && k >= chunk.count) break;
        const int slot = step * S::pitch + channel;
        const float dt = own.delta[slot], v = dt * own.u[slot];
        float B[S::states];
        coefficients.read_B(chunk, step, B);
        const bool reset = careful && resets >> step & 1;
#pragma unroll
        for (int i = 0; i < S::states; ++i) h[i] = fmaf(exp2_fast(dt * A[i]), reset ? 0.0f : h[i], v * B[i]);
      }
    }

#pragma unroll 1
    for (int group = kGroups - 1; group >= 0; --group) {
      const int first = start + group * kGroup * by;
      const int count = careful ? min(kGroup, chunk.count - group * kGroup) : kGroup;  // not positive where the chunk has ended
      float a[kGroup][S::states], y[kGroup] = {};
#pragma unroll
      for (int i = 0; i < S::states; ++i) h[i] = entry[group][i];
#pragma unroll
      for (int j = 0; j < kGroup; ++j) {
        if (j >= count) break;
        const int step = first + j * by, slot = step * S::pitch + channel;
        const float dt = own.delta[slot], v = dt * own.u[slot];
        float B[S::states];
        coefficients.read_B(chunk, step, B);
        const bool reset = careful && resets >> step & 1;
#pragma unroll
        for (int i = 0; i < S::states; ++i) {
          a[j][i] = exp2_fast(dt * A[i]);
          h[i] = fmaf(a[j][i], reset ? 0.0f : h[i], v * B[i]);
        }
        write_states(own_states + j * S::channels * S::dstate, h);
        if (wants_y) {
          float C[S::states];
          coefficients.read_C(chunk, step, C);
#pragma unroll
          for (int i = 0; i < S::states; ++i) y[j] = fmaf(C[i], h[i], y[j]);
        }
      }
      __syncthreads();
      if (d.dC) {
        const auto factor = [&](int step, int c) { return own.dy[step * S::pitch + c]; };
        if (!S::staged && d.C.constant)
          sum_over_steps<S>(p, tile, first, by, count, thread, own.states, d.dC, factor);
        else
          sum_over_channels<S>(p, tile, chunk, first, by, count, thread, own.states, d.dC, factor);
      }
      __syncthreads();
      float du[kGroup] = {}, ddelta[kGroup] = {};  // shares of this thread's states: g B, and a g h A
#pragma unroll
      for (int j = kGroup - 1; j >= 0; --j) {
        if (j >= count) continue;
        const int step = first + j * by, slot = step * S::pitch + channel;
        const float dt = own.delta[slot], dy = own.dy[slot];
        const bool reset = careful && resets >> step & 1;
        float B[S::states], C[S::states], before[S::states];
        coefficients.read_B(chunk, step, B);
        coefficients.read_C(chunk, step, C);
        if (j > 0) {
          read_states(own_states + (j - 1) * S::channels * S::dstate, before);
        } else {
#pragma unroll
          for (int i = 0; i < S::states; ++i) before[i] = entry[group][i];
        }
#pragma unroll
        for (int i = 0; i < S::states; ++i) g[i] = fmaf(C[i], dy, g[i]);
        write_states(own_states + j * S::channels * S::dstate, g);
#pragma unroll
        for (int i = 0; i < S::states; ++i) {
          du[j] = fmaf(g[i], B[i], du[j]);
          g[i] = reset ? 0.0f : g[i] * a[j][i];
          const float slope = reset ? 0.0f : g[i] * before[i];
          ddelta[j] = fmaf(slope, A[i], ddelta[j]);
          dA[i] = fmaf(slope, dt, dA[i]);
        }
      }
      // Thread j of a channel finishes step j.
      const float sum_du = sum_to_lane<S::lanes>(du, part), sum_ddelta = sum_to_lane<S::lanes>(ddelta, part);
      const float sum_y = wants_y ? sum_to_lane<S::lanes>(y, part) : 0.0f;
      const bool finishes = part < count && part < kGroup;
      const int slot = (first + part * by) * S::pitch + channel;
      float result_du = 0.0f, result_ddelta = 0.0f, result_y = 0.0f;
      if (finishes) {
        const float dt = own.delta[slot], u = own.u[slot], dy = own.dy[slot];
        result_du = fmaf(dt, sum_du, D * dy);
        result_ddelta = fmaf(u, sum_du, kLn2 * sum_ddelta);
        if (p.softplus) result_ddelta *= softplus_slope(dt);
        result_y = fmaf(D, u, sum_y);
        dD = fmaf(dy, u, dD);
        dbias += result_ddelta;
      }
      __syncthreads();
      if (d.dB) {
        const auto factor = [&](int step, int c) { return own.delta[step * S::pitch + c] * own.u[step * S::pitch + c]; };
        if (!S::staged && d.B.constant)
          sum_over_steps<S>(p, tile, first, by, count, thread, own.states, d.dB, factor);
        else
          sum_over_channels<S>(p, tile, chunk, first, by, count, thread, own.states, d.dB, factor);
      }
      __syncthreads();
      if (finishes) own.delta[slot] = result_ddelta, own.u[slot] = result_du, own.dy[slot] = result_y;
    }
  }
};

template <class S, class M>
__global__ void __launch_bounds__(2 * S::threads, (S::dstate <= 16 ? kResidentThreads : 256) / (2 * S::threads)) scan_backward(const __grid_constant__ ScanParams p) {
    const int side = int(threadIdx.x) / S::threads, thread = int(threadIdx.x) % S::threads;
  const int channel = thread / S::lanes, part = thread % S::lanes;
  const Tile tile = Tile::of<S>(p);
  const Direction& d = p.direction[side];
  const bool reverse = d.reverse, two = p.directions == 2;
  SharedBackward<S>* const shared = shared_memory<SharedBackward<S>>();
  SharedBackward<S>& own = shared[side];
  const Elements<S> elements(thread, p.time_fast);
  const CoefficientElements<S> coefficient_elements(thread, p.state_fast);
  const Coefficients<S> coefficients(d, tile, channel, part, own.rows);
  float* const own_states = own.states + channel * S::dstate + part * S::states;

  const bool active = channel < tile.count;
  const int64_t row = int64_t(tile.batch) * p.dim + tile.first + channel;  // of (batch, dim)
  float A[S::states], g[S::states], dA[S::states];  // g: a_{t+1} g_{t+1}
#pragma unroll
  for (int i = 0; i < S::states; ++i) {
    const int n = part * S::states + i;
    const bool real = active && n < p.dstate;
    A[i] = real ? kLog2e * load_value_readonly(d.A + int64_t(tile.first + channel) * p.dstate + n) : 0.0f;
    g[i] = real && d.dlast_state ? load_value_readonly(d.dlast_state + row * p.dstate + n) : 0.0f;
    dA[i] = 0.0f;
  }
  if (thread < S::channels)
    own.delta_bias[thread] = d.delta_bias && thread < tile.count ? load_value_readonly(d.delta_bias + tile.first + thread) : 0.0f;
  __syncthreads();
  const float D = active && d.D ? load_value_readonly(d.D + tile.first + channel) : 0.0f;
  float dD = 0.0f, dbias = 0.0f;

  const bool wants_y = p.dz || p.out;
  const int chunks = ceil_div(p.seqlen, kChunk);
  const auto chunk_at = [&](int visit) { return Chunk::at<S, M>(reverse ? visit : chunks - 1 - visit, p.seqlen); };
  const Chunk first_chunk = chunk_at(0);
  const Start<S, M> start{tile, first_chunk, reverse ? 1 : -1};
  auto u_rows = start.of(d.u, elements), delta_rows = start.of(d.delta, elements), dout_rows = start.of(p.dout, elements);
  auto z_rows = start.of(p.z, elements), du_rows = start.of(d.du, elements), ddelta_rows = start.of(d.ddelta, elements);
  auto dz_rows = start.of(p.dz, elements), out_rows = start.of(p.out, elements), y_rows = start.of(p.partial, elements);
  auto B_rows = start.of(d.B, coefficient_elements, p.dstate), C_rows = start.of(d.C, coefficient_elements, p.dstate);

  for (int visit = 0; visit < chunks; ++visit) {
    const Chunk chunk = chunk_at(visit);
    const bool comes_first = two && 2 * visit < chunks - 1, meets = two && 2 * visit == chunks - 1, adds = two && 2 * visit > chunks - 1;

    float slope[S::elements];  // of out in y, over z: dz = slope y
    {
      float u[S::elements], delta[S::elements], dout[S::elements], z[S::elements];
      u_rows.load(chunk, u);
      delta_rows.load(chunk, delta);
      dout_rows.load(chunk, dout);
      if (p.z) z_rows.load(chunk, z);
#pragma unroll
      for (int i = 0; i < S::elements; ++i) delta[i] += own.delta_bias[elements.k_of(i)];
      if (p.softplus) {
#pragma unroll
        for (int i = 0; i < S::elements; ++i) delta[i] = softplus(delta[i]);
      }
#pragma unroll
      for (int i = 0; i < S::elements; ++i) {
        const int slot = elements.slot(i);
        own.delta[slot] = delta[i], own.u[slot] = u[i];
        dout[i] *= p.scale;
        if (p.z) {
          const float s = sigmoid(z[i]);
          slope[i] = dout[i] * (s * fmaf(z[i], 1.0f - s, 1.0f));
          dout[i] *= z[i] * s;
        }
        own.dy[slot] = dout[i];
      }
    }
    if constexpr (S::staged) {
      float B[CoefficientElements<S>::count], C[CoefficientElements<S>::count];
      B_rows.load(chunk, B);
      C_rows.load(chunk, C);
      coefficient_elements.put(own.rows, B);
      coefficient_elements.put(own.rows + S::dstate, C);
    }
    if (thread < 32) {
      const unsigned resets = p.seq_idx ? resets_of(p, tile, chunk, reverse, thread) : 0u;
      if (thread == 0) own.resets = resets, own.careful = resets || chunk.count < S::steps;
    }
    float h[S::states];
    if (active) {
      const float* stored = d.states + (int64_t(chunk.index) * p.batch * p.dim + row) * S::dstate + part * S::states;
      load_many<S::states>(stored, h);
    } else {
#pragma unroll
      for (int i = 0; i < S::states; ++i) h[i] = 0.0f;
    }
    __syncthreads();

    // Both directions take the same way, since they meet at barriers.
    const Walk<S> walk{p, d, tile, chunk, coefficients, own, own_states, own.resets, thread, channel, part, wants_y, D};
    if (own.careful | shared[two ? 1 - side : 0].careful)
      walk.template run<true>(A, h, g, dA, dD, dbias);
    else
      walk.template run<false>(A, h, g, dA, dD, dbias);
    __syncthreads();

    // A shared u or delta has one gradient: whoever comes first leaves its share there, the other adds.
    const auto put = [&](const Stream<Elements<S>, M>& target, bool shares, const float* mine, const float* others) {
      if (!target || (shares && meets && side == 1)) return;
      float v[S::elements], left[S::elements];
      if (shares && adds) target.load(chunk, left);
#pragma unroll
      for (int i = 0; i < S::elements; ++i) {
        const int slot = elements.slot(i);
        v[i] = mine[slot];
        if (shares && meets) v[i] += others[slot];
        if (shares && adds) v[i] += left[i];
      }
      target.store(chunk, v);
    };
    const SharedBackward<S>& other = shared[two ? 1 - side : 0];
    put(du_rows, p.shares_u, own.u, other.u);
    put(ddelta_rows, p.shares_delta, own.delta, other.delta);
    if (wants_y && !(meets && side == 1)) {
      float y[S::elements], left[S::elements];
      if (adds) y_rows.load(chunk, left);
#pragma unroll
      for (int i = 0; i < S::elements; ++i) {
        const int slot = elements.slot(i);
        y[i] = own.dy[slot];
        if (meets) y[i] += other.dy[slot];
        if (adds) y[i] += left[i];
      }
      if (comes_first) {
        y_rows.store(chunk, y);
      } else {
        if (p.dz) {
#pragma unroll
          for (int i = 0; i < S::elements; ++i) slope[i] *= y[i];
          dz_rows.store(chunk, slope);
        }
        if (p.out) {  // z once more: registers
          float z[S::elements];
          if (p.z) z_rows.load(chunk, z);
#pragma unroll
          for (int i = 0; i < S::elements; ++i) y[i] *= p.z ? p.scale * (z[i] * sigmoid(z[i])) : p.scale;
          out_rows.store(chunk, y);
        }
      }
    }
    u_rows.advance(), delta_rows.advance(), dout_rows.advance(), z_rows.advance(), du_rows.advance(), ddelta_rows.advance();
    dz_rows.advance(), out_rows.advance(), y_rows.advance(), B_rows.advance(), C_rows.advance();
    __syncthreads();
  }

#pragma unroll
  for (int i = 0; i < S::states; ++i) {
    const int n = part * S::states + i;
    if (!active || n >= p.dstate) continue;
    if (d.dA) store_value(d.dA + row * p.dstate + n, dA[i]);
    if (d.dinitial_state) store_value(d.dinitial_state + row * p.dstate + n, g[i]);
  }
  dD = sum_of_lanes<S::lanes>(dD), dbias = sum_of_lanes<S::lanes>(dbias);
  if (active && part == 0) {
    if (d.dD) store_value(d.dD + row, dD);
    if (d.ddelta_bias) store_value(d.ddelta_bias + row, dbias);
  }
}

template <class S, class M>
struct Backward {
  static const char* run(const Launch& at, const ScanParams& p, int blocks) {
    return launch("selective_scan_backward", scan_backward<S, M>, dim3(unsigned(blocks)), dim3(unsigned(p.directions * S::threads)),
                  sizeof(SharedBackward<S>) * size_t(p.directions), at, p);
  }
};

}  // namespace
}  // namespace pixelbytes::cuda
