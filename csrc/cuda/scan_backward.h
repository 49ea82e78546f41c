// The scan's backward.
//
// A block: see scan_tile.h; a direction visits its chunks from its last to its first. From the state stored at a chunk's entry it computes
// the chunk's states once, keeping one in kGroup (in local memory, which stays in L1), and then, group by group from the last, once more with every state kept,
// before the adjoint g_t = C_t dy_t + a_{t+1} g_{t+1} walks back. dB_t = sum of dt u g and dC_t = sum of dy h run over the channels of the
// tile, through shared memory: one addend a tile, no atomics. Shared memory per direction: planes of step size, u and dy, which the results
// ddelta, du and y replace; the staged B and C; the states of a group: 6,528 + 4,608 + 4,096 bytes at dstate 16.
// Deterministic: fixed order of all sums.
#pragma once
#include "scan_launch.h"
#include "scan_tile.h"

namespace pixelbytes::cuda {
namespace {

constexpr int kGroup = 4;  // steps whose states are kept at once
constexpr int kGroups = kChunk / kGroup;

// Chunks next to the middle whose du, ddelta and y wait in registers for the other direction: all of a row of 256.
template <class S, class M>
constexpr int kKept = M::whole && S::elements == 8 ? 4 : 0;

// Threads that a multiprocessor is to hold. On sm_75 shared memory ends at 256; elsewhere a few more are worth a few bytes of spilled registers.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
template <class S, class M>
constexpr int kResidentThreads = S::dstate <= 16 && kKept<S, M> == 0 ? 384 : 256;
#else
template <class S, class M>
constexpr int kResidentThreads = 256;
#endif

// Planes (place, channel): a step's place is where the direction's own time has it, so that both directions walk upwards.
template <class S>
struct alignas(16) SharedBackward {
  float2 inputs[kChunk * S::pitch];  // dt and u, which ddelta and du replace
  float dy[kChunk * S::pitch];       // which y replaces
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

// A thread's share of the sums over channels: of step j of a group the states 4 four .. 4 four + 3, over the channels share + i kSplit. With more
// tasks than threads it has one in every `rounds`.
template <class S>
struct SumTask {
  static constexpr int kFours = S::dstate / 4, kTasks = kGroup * kFours;
  static constexpr int rounds = kTasks > S::threads ? kTasks / S::threads : 1, kSplit = kTasks > S::threads ? 1 : S::threads / kTasks;
  static constexpr int j_by = S::threads / kFours;  // from round to round
  static constexpr bool scatters = kSplit >= 4;     // each of four threads is left with one sum
  static_assert(kSplit * kFours <= 32 || kSplit == 1);
  int four, share, j;
  const float* states;   // of step j and channel `share`
  const float2* inputs;  // of step j, if the group were at place 0, and channel `share`
  const float* dy;

  __device__ SumTask(int thread, SharedBackward<S>* shared, int base)
      : four(thread % kFours), share(thread / kFours % kSplit), j(thread / (kFours * kSplit)),
        states(at_offset<float>(shared, base + int(offsetof(SharedBackward<S>, states)) + ((j * S::channels + share) * S::dstate + 4 * four) * 4)),
        inputs(at_offset<float2>(shared, base + (j * S::pitch + share) * 8)),
        dy(at_offset<float>(shared, base + int(offsetof(SharedBackward<S>, dy)) + (j * S::pitch + share) * 4)) {}

  // Where its sums of a step go.
  __device__ float* sums_at(const ScanParams& p, const Tile& tile, float* gradient, int time) const {
    const int64_t row = ((int64_t(tile.index) * p.batch + tile.batch) * p.groups + tile.group) * p.seqlen + time;
    return gradient + row * S::dstate + 4 * four + (scatters ? share : 0);
  }
};

// One chunk: forwards for the states, then back.
template <class S, class M>
struct Walk {
  const ScanParams& p;
  const Direction& d;
  const Tile& tile;
  const Chunk& chunk;
  const Coefficients<S>& coefficients;
  SharedBackward<S>& own;
  float* own_states;   // of this thread, at step 0 of a group
  float2* own_inputs;  // of this thread's channel, at place 0
  float* own_dy;
  const unsigned resets;  // by place
  const SumTask<S>& task;
  float *&dB_here, *&dC_here;  // Whole: where this thread's sums of the present group go
  const int by_group;          // from group to group
  const int thread, channel, part;
  const bool wants_y;
  const float D;

  __device__ int time_of(int place) const { return chunk.first + (d.reverse ? kChunk - 1 - place : place); }

  // Sums of factor * state over the channels of the tile, for the steps of a group, into an addend of dB or dC.
  // factor(element): of the task's step and channel, `element` elements of a plane onwards.
  template <class Factor>
  __device__ void sum_over_channels(int first, int count, float* gradient, float*& here, Factor factor) const {
    using Task = SumTask<S>;
#pragma unroll
    for (int round = 0; round < Task::rounds; ++round) {
      const int j = task.j + round * Task::j_by;
      float sum[4] = {};
      if (M::whole || j < count) {
#pragma unroll
        for (int i = 0; i < S::channels / Task::kSplit; ++i) {
          if (!M::whole && task.share + i * Task::kSplit >= tile.count) break;
          float v[4];
          read_states(task.states + (round * Task::j_by * S::channels + i * Task::kSplit) * S::dstate, v);
          const float f = factor((first + round * Task::j_by) * S::pitch + i * Task::kSplit);
#pragma unroll
          for (int n = 0; n < 4; ++n) sum[n] = i ? fmaf(f, v[n], sum[n]) : f * v[n];
        }
      }
      float* const to = M::whole ? here + round * Task::j_by * S::dstate * (d.reverse ? -1 : 1) : task.sums_at(p, tile, gradient, time_of(first + j));
      if constexpr (Task::scatters) {
        const float total = sum_to_lane<Task::kSplit, Task::kFours>(sum, task.share);
        if ((Task::kSplit == 4 || task.share < 4) && (M::whole || j < count)) store_value(to, total);
      } else {
#pragma unroll
        for (int n = 0; n < 4; ++n) sum[n] = sum_of_lanes<Task::kSplit * Task::kFours, Task::kFours>(sum[n]);
        if (task.share == 0 && (M::whole || j < count)) store_many<4>(to, sum);
      }
    }
    if (M::whole) here -= by_group;
  }

  // The same for a coefficient that is constant in time: sums over the steps of a group, added to what earlier groups left.
  template <class Factor>
  __device__ void sum_over_steps(int first, int count, float* gradient, Factor factor) const {
    constexpr int kFours = S::dstate / 4, kTasks = S::channels * kFours;
    for (int k = thread; k < kTasks; k += S::threads) {
      const int four = k % kFours, c = k / kFours;
      if (c >= tile.count) break;
      float* const place = gradient + tile.row(p, c) * S::dstate + 4 * four;
      float sum[4];
      load_many<4>(place, sum);
      for (int j = 0; j < count; ++j) {
        float v[4];
        read_states(own.states + (j * S::channels + c) * S::dstate + 4 * four, v);
        const float f = factor((first + j) * S::pitch + c);
#pragma unroll
        for (int n = 0; n < 4; ++n) sum[n] = fmaf(f, v[n], sum[n]);
      }
      store_many<4>(place, sum);
    }
  }

  // careful: steps may be missing at the end of the chunk's walk, and states may restart.
  template <bool careful>
  __device__ void run(const float (&A)[S::states], float (&h)[S::states], float (&g)[S::states], float (&dA)[S::states], float& dD,
                      float& dbias) const {
    const int start = careful && d.reverse ? kChunk - chunk.count : 0;  // place of the walk's first step
    float entry[kGroups][S::states];  // state at the entry of each group
#pragma unroll 1
    for (int group = 0; group < kGroups; ++group) {
#pragma unroll
      for (int i = 0; i < S::states; ++i) entry[group][i] = h[i];
      if (group == kGroups - 1) break;
      const int first = start + group * kGroup;
#pragma unroll
      for (int j = 0; j < kGroup; ++j) {
        if (careful && group * kGroup + j >= chunk.count) break;
        const float2 in = own_inputs[(first + j) * S::pitch];
        const float v = in.x * in.y;
        float B[S::states];
        coefficients.read_B(chunk, first + j, B);
        const bool reset = careful && resets >> (first + j) & 1;
#pragma unroll
        for (int i = 0; i < S::states; ++i) h[i] = fmaf(exp2_fast(in.x * A[i]), reset ? 0.0f : h[i], v * B[i]);
      }
    }

#pragma unroll 1
    for (int group = kGroups - 1; group >= 0; --group) {
      const int first = start + group * kGroup;
      const int count = careful ? min(kGroup, chunk.count - group * kGroup) : kGroup;  // not positive where the chunk has ended
      float a[kGroup][S::states], y[kGroup] = {};
#pragma unroll
      for (int i = 0; i < S::states; ++i) h[i] = entry[group][i];
#pragma unroll
      for (int j = 0; j < kGroup; ++j) {
        if (careful && j >= count) break;
        const float2 in = own_inputs[(first + j) * S::pitch];
        const float v = in.x * in.y;
        float B[S::states];
        coefficients.read_B(chunk, first + j, B);
        const bool reset = careful && resets >> (first + j) & 1;
#pragma unroll
        for (int i = 0; i < S::states; ++i) {
          a[j][i] = exp2_fast(in.x * A[i]);
          h[i] = fmaf(a[j][i], reset ? 0.0f : h[i], v * B[i]);
        }
        write_states(own_states + j * S::channels * S::dstate, h);
        if (wants_y) {
          float C[S::states];
          coefficients.read_C(chunk, first + j, C);
#pragma unroll
          for (int i = 0; i < S::states; ++i) y[j] = i ? fmaf(C[i], h[i], y[j]) : C[i] * h[i];
        }
      }
      __syncthreads();
      if (d.dC && !S::staged && d.C.constant)
        sum_over_steps(first, count, d.dC, [&](int i) { return own.dy[i]; });
      else if (d.dC)
        sum_over_channels(first, count, d.dC, dC_here, [&](int i) { return task.dy[i]; });
      __syncthreads();
      float du[kGroup] = {}, ddelta[kGroup] = {};  // shares of this thread's states: g B, and a g h A
#pragma unroll
      for (int j = kGroup - 1; j >= 0; --j) {
        if (careful && j >= count) continue;
        const float dt = own_inputs[(first + j) * S::pitch].x, dy = own_dy[(first + j) * S::pitch];
        const bool reset = careful && resets >> (first + j) & 1;
        float B[S::states], C[S::states], before[S::states];
        coefficients.read_B(chunk, first + j, B);
        coefficients.read_C(chunk, first + j, C);
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
          du[j] = i ? fmaf(g[i], B[i], du[j]) : g[i] * B[i];
          g[i] = reset ? 0.0f : g[i] * a[j][i];
          const float slope = reset ? 0.0f : g[i] * before[i];
          ddelta[j] = i ? fmaf(slope, A[i], ddelta[j]) : slope * A[i];
          dA[i] = fmaf(slope, dt, dA[i]);
        }
      }
      // Thread j of a channel finishes step j.
      const float sum_du = sum_to_lane<S::lanes>(du, part), sum_ddelta = sum_to_lane<S::lanes>(ddelta, part);
      const float sum_y = wants_y ? sum_to_lane<S::lanes>(y, part) : 0.0f;
      const bool finishes = (S::lanes == kGroup || part < kGroup) && (!careful || part < count);
      const int slot = (first + part) * S::pitch;
      float result_du = 0.0f, result_ddelta = 0.0f, result_y = 0.0f;
      if (finishes) {
        const float2 in = own_inputs[slot];
        const float dy = own_dy[slot];
        result_du = fmaf(in.x, sum_du, D * dy);
        result_ddelta = fmaf(in.y, sum_du, kLn2 * sum_ddelta);
        if (p.softplus) result_ddelta *= softplus_slope(in.x);
        result_y = fmaf(D, in.y, sum_y);
        dD = fmaf(dy, in.y, dD);
        dbias += result_ddelta;
      }
      __syncthreads();
      const auto product = [](float2 in) { return in.x * in.y; };
      if (d.dB && !S::staged && d.B.constant)
        sum_over_steps(first, count, d.dB, [&](int i) { return product(own.inputs[i]); });
      else if (d.dB)
        sum_over_channels(first, count, d.dB, dB_here, [&](int i) { return product(task.inputs[i]); });
      __syncthreads();
      if (finishes) own_inputs[slot] = make_float2(result_ddelta, result_du), own_dy[slot] = result_y;
    }
  }
};

template <class S, class M>
__global__ void __launch_bounds__(2 * S::threads, kResidentThreads<S, M> / (2 * S::threads)) scan_backward(const __grid_constant__ ScanParams p) {
  constexpr int kElements = S::elements;
  const int side = int(threadIdx.x) / S::threads, thread = int(threadIdx.x) % S::threads;
  const int channel = thread / S::lanes, part = thread % S::lanes;
  const Tile tile = Tile::of<S>(p);
  const Direction& d = p.direction[side];
  const bool reverse = d.reverse, two = p.directions == 2;
  SharedBackward<S>* const shared = shared_memory<SharedBackward<S>>();
  SharedBackward<S>&own = shared[side], &other = shared[two ? 1 - side : 0];
  const int base = side * int(sizeof own);
  const Elements<S> elements(thread, p.time_fast, reverse);
  const CoefficientElements<S> coefficient_elements(thread, reverse);
  const Coefficients<S> coefficients(d, tile, channel, part, at_offset<float>(shared, base + int(offsetof(SharedBackward<S>, rows))), reverse);
  float* const own_states = at_offset<float>(shared, base + int(offsetof(SharedBackward<S>, states)) + (channel * S::dstate + part * S::states) * 4);
  float2* const own_inputs = at_offset<float2>(shared, base + channel * int(sizeof(float2)));
  float* const own_dy = at_offset<float>(shared, base + int(offsetof(SharedBackward<S>, dy)) + channel * 4);

  const bool active = M::whole || channel < tile.count;
  float A[S::states], g[S::states], dA[S::states];  // g: a_{t+1} g_{t+1}
#pragma unroll
  for (int i = 0; i < S::states; ++i) {
    const int n = part * S::states + i;
    const bool real = M::whole || (active && n < p.dstate);
    A[i] = real ? kLog2e * load_value_readonly(d.A + int64_t(tile.first + channel) * p.dstate + n) : 0.0f;
    g[i] = real && d.dlast_state ? load_value_readonly(d.dlast_state + tile.row(p, channel) * p.dstate + n) : 0.0f;
    dA[i] = 0.0f;
  }
  if (thread < S::channels)
    own.delta_bias[thread] = d.delta_bias && thread < tile.count ? load_value_readonly(d.delta_bias + tile.first + thread) : 0.0f;
  __syncthreads();
  const float D = active && d.D ? load_value_readonly(d.D + tile.first + channel) : 0.0f;
  float dD = 0.0f, dbias = 0.0f;

  const bool wants_y = p.dz || p.out;
  const int chunks = ceil_div(Tile::end(p) - Tile::begin(p), kChunk);
  const auto chunk_at = [&](int visit) { return Chunk::at<S, M>(reverse ? visit : chunks - 1 - visit, p); };
  const Chunk first_chunk = chunk_at(0);
  const Start<S, M> start{tile, first_chunk, reverse ? 1 : -1};
  auto u = start.of(d.u, elements), delta = start.of(d.delta, elements), dout = start.of(p.dout, elements), z = start.of(p.z, elements);
  auto du = start.of(d.du, elements), ddelta = start.of(d.ddelta, elements), dz = start.of(p.dz, elements);
  auto y_share = start.of(p.partial, elements), apart = start.of(p.out, elements);
  auto& out = M::whole ? y_share : apart;  // there they are the same, if there is an `out`
  auto B = start.of(d.B, coefficient_elements, p.dstate), C = start.of(d.C, coefficient_elements, p.dstate);

  if (M::whole) du.onward = u.onward, ddelta.onward = delta.onward, dz.onward = z.onward;  // saves registers
  const SumTask<S> sum_task(thread, shared, base);
  const int by_group = (reverse ? -1 : 1) * kGroup * S::dstate;
  const auto last_sums = [&](float* gradient) {  // Whole: this thread's of the last group of the chunk that is visited first
    const int place = kChunk - kGroup + sum_task.j, time = first_chunk.first + (reverse ? kChunk - 1 - place : place);
    return sum_task.sums_at(p, tile, gradient, time);
  };
  float *dB_here = M::whole ? last_sums(d.dB) : nullptr, *dC_here = M::whole ? last_sums(d.dC) : nullptr;

  // What the two directions share, a gradient of u or delta, and y: the one that comes first to a chunk leaves its part, near the middle in
  // registers, else in global memory, and the other adds it; in the middle of an odd number they meet. As in the forward.
  const int first_half = two ? chunks / 2 : 0, second_half = two ? chunks - first_half : chunks, kept_until = second_half + kKept<S, M>;
  float kept_du[kKept<S, M> + 1][kElements], kept_ddelta[kKept<S, M> + 1][kElements], kept_y[kKept<S, M> + 1][kElements];

#pragma unroll 1
  for (int visit = 0; visit < chunks; ++visit) {
    const Chunk chunk = chunk_at(visit);
    float slope[kElements];  // of out in y, over z: dz = slope y
    {
      float in[kElements], dt[kElements];
      u.load(chunk, in);
      delta.load(chunk, dt);
#pragma unroll
      for (int i = 0; i < kElements; ++i) dt[i] += own.delta_bias[elements.k_of(i)];
      if (p.softplus) {
#pragma unroll
        for (int i = 0; i < kElements; ++i) dt[i] = softplus(dt[i]);
      }
#pragma unroll
      for (int i = 0; i < kElements; ++i) own.inputs[elements.slot(i)] = make_float2(dt[i], in[i]);
      float dy[kElements];
      dout.load(chunk, dy);
#pragma unroll
      for (int i = 0; i < kElements; ++i) dy[i] *= p.scale;
      if (z) {
        float gate[kElements];
        z.load(chunk, gate);
#pragma unroll
        for (int i = 0; i < kElements; ++i) {
          const float s = sigmoid(gate[i]);
          slope[i] = dy[i] * (s * fmaf(gate[i], 1.0f - s, 1.0f));
          dy[i] *= gate[i] * s;
        }
      }
#pragma unroll
      for (int i = 0; i < kElements; ++i) own.dy[elements.slot(i)] = dy[i];
    }
    if constexpr (S::staged) {
      float v[CoefficientElements<S>::count];
      B.load(chunk, v);
      coefficient_elements.put(own.rows, v);
      C.load(chunk, v);
      coefficient_elements.put(own.rows + S::dstate, v);
    }
    if (!M::whole && thread < 32) {
      const unsigned resets = p.seq_idx ? resets_of(p, tile, chunk, reverse, thread) : 0u;
      if (thread == 0) own.resets = reverse ? __brev(resets) : resets, own.careful = resets || chunk.count < S::steps;
    }
    float h[S::states];
    if (active) {
      const float* stored = d.states + (int64_t(chunk.first / kChunk) * p.batch * p.dim + tile.row_of_batch(p, channel)) * S::dstate + part * S::states;
      load_many<S::states>(stored, h);
    } else {
#pragma unroll
      for (int i = 0; i < S::states; ++i) h[i] = 0.0f;
    }
    __syncthreads();

    // Both directions take the same way, since they meet at barriers.
    const unsigned resets = M::whole ? 0u : own.resets;
    const Walk<S, M> walk{p,       d,      tile,    chunk,    coefficients, own,     own_states, own_inputs, own_dy, resets,
                          sum_task, dB_here, dC_here, by_group, thread,       channel, part,       wants_y,    D};
    if (!M::whole && (own.careful | other.careful))
      walk.template run<true>(A, h, g, dA, dD, dbias);
    else
      walk.template run<false>(A, h, g, dA, dD, dbias);
    __syncthreads();

    const bool comes_first = visit < first_half, adds = visit >= second_half, meets = two && !comes_first && !adds;
    const bool leaves_kept = comes_first && visit >= first_half - kKept<S, M>, takes_kept = adds && visit < kept_until;
    if constexpr (kKept<S, M> > 0) {
      if (takes_kept) {
        at_constant<kKept<S, M>>(visit - second_half, [&](auto at) {
#pragma unroll
          for (int i = 0; i < kElements; ++i) {
            const int slot = elements.other_slot(i);
            float2 sum = other.inputs[slot];
            if (p.shares_delta) sum.x += kept_ddelta[at.value][i];
            if (p.shares_u) sum.y += kept_du[at.value][i];
            other.inputs[slot] = sum;
            if (wants_y) other.dy[slot] += kept_y[at.value][i];
          }
        });
        __syncthreads();
      }
    }
    float total_du[kElements], total_ddelta[kElements], y[kElements];
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
      const float2 sums = own.inputs[elements.slot(i)];
      total_ddelta[i] = sums.x, total_du[i] = sums.y, y[i] = own.dy[elements.slot(i)];
    }
    if (meets) {
#pragma unroll
      for (int i = 0; i < kElements; ++i) {
        const int slot = elements.other_slot(i);
        if (p.shares_delta) total_ddelta[i] += other.inputs[slot].x;
        if (p.shares_u) total_du[i] += other.inputs[slot].y;
        y[i] += other.dy[slot];
      }
    }
    const bool lends = leaves_kept || (meets && side == 1), gathers = adds && !takes_kept;
    const auto put = [&](const Stream<Elements<S>, M>& target, bool shares, float (&v)[kElements]) {
      if (!target || (shares && lends)) return;
      if (shares && gathers) {
        float left[kElements];
        target.load(chunk, left);
#pragma unroll
        for (int i = 0; i < kElements; ++i) v[i] += left[i];
      }
      target.store(chunk, v);
    };
    put(du, p.shares_u, total_du);
    put(ddelta, p.shares_delta, total_ddelta);
    if constexpr (kKept<S, M> > 0) {
      if (leaves_kept)
        at_constant<kKept<S, M>>(first_half - 1 - visit, [&](auto at) {
#pragma unroll
          for (int i = 0; i < kElements; ++i)
            kept_du[at.value][i] = total_du[i], kept_ddelta[at.value][i] = total_ddelta[i], kept_y[at.value][i] = y[i];
        });
    }
    if (wants_y && !lends) {
      if (gathers) {
        float left[kElements];
        y_share.load(chunk, left);
#pragma unroll
        for (int i = 0; i < kElements; ++i) y[i] += left[i];
      }
      if (comes_first) {
        y_share.store(chunk, y);
      } else {
        if (dz) {
#pragma unroll
          for (int i = 0; i < kElements; ++i) slope[i] *= y[i];
          dz.store(chunk, slope);
        }
        if (p.out) {  // z once more: registers
          float gate[kElements];
          if (z) z.load(chunk, gate);
#pragma unroll
          for (int i = 0; i < kElements; ++i) y[i] *= z ? p.scale * (gate[i] * sigmoid(gate[i])) : p.scale;
          out.store(chunk, y);
        }
      }
    }
    __syncthreads();
    u.advance(), delta.advance(), dout.advance(), z.advance(), du.advance(), ddelta.advance(), dz.advance(), y_share.advance(), apart.advance();
    B.advance(), C.advance();
  }

  const int64_t row = tile.row(p, channel);
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
    return launch("selective_scan_backward", scan_backward<S, M>, dim3(unsigned(blocks), unsigned(ceil_div(p.seqlen, p.stretch))), dim3(unsigned(p.directions * S::threads)),
                  sizeof(SharedBackward<S>) * size_t(p.directions), at, p);
  }
};

}  // namespace
}  // namespace pixelbytes::cuda
