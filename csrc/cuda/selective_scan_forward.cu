// The scan's forward.
//
// A block: see scan_tile.h. Shared memory per direction: a plane (step, channel) of the pairs (dt, dt u), where y replaces the second, and the
// staged B and C of the chunk: 16 * 17 * 8 + 16 * 36 * 4 + 128 = 4,608 bytes at dstate 16. Deterministic: fixed order of all sums.
#include "scan_launch.h"
#include "scan_tile.h"

namespace pixelbytes::cuda {
namespace {

template <class S>
struct alignas(16) SharedForward {
  float2 steps[S::steps * S::pitch];
  alignas(16) float rows[S::staged ? S::steps * S::row : 4];
  float D[S::channels], delta_bias[S::channels];
  unsigned resets;
};

// Scans one chunk upwards (by = 1) or downwards (-1); `plane` belongs to the thread's channel.
template <class S, int by>
__device__ inline void scan_chunk(const Coefficients<S>& coefficients, const Chunk& chunk, unsigned resets, int part, float2* plane,
                                  const float (&A)[S::states], float (&h)[S::states]) {
  // y of one step, this thread's states only
  const auto step = [&](int k, float2 in) {
    float B[S::states], C[S::states], y = 0.0f;
    coefficients.read_B(chunk, k, B);
    coefficients.read_C(chunk, k, C);
#pragma unroll
    for (int i = 0; i < S::states; ++i) {
      h[i] = fmaf(exp2_fast(in.x * A[i]), h[i], in.y * B[i]);
      y = fmaf(C[i], h[i], y);
    }
    return y;
  };
  // Four steps share one sum over lanes, where registers allow; where the state restarts, steps are taken one by one.
  constexpr bool kTogether = S::staged && S::states <= 4;
  const int quick = kTogether && !resets ? chunk.count / 4 * 4 : 0;
  int k = by > 0 ? 0 : chunk.count - 1;
  if constexpr (kTogether) {
#pragma unroll 1
    for (int left = quick; left; k += 4 * by, left -= 4) {
      float2 in[4];
      float y[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) in[j] = plane[(k + j * by) * S::pitch];
#pragma unroll
      for (int j = 0; j < 4; ++j) y[j] = step(k + j * by, in[j]);
      const float sum = sum_to_lane<S::lanes>(y, part);
      if (part < 4) plane[(k + part * by) * S::pitch].y = sum;
    }
  }
#pragma unroll 1
  for (int done = quick; done < chunk.count; ++done, k += by) {
    if (resets >> k & 1) {
#pragma unroll
      for (int i = 0; i < S::states; ++i) h[i] = 0.0f;
    }
    const float sum = sum_of_lanes<S::lanes>(step(k, plane[k * S::pitch]));
    if (part == 0) plane[k * S::pitch].y = sum;
  }
}

template <class S>
__global__ void __launch_bounds__(2 * S::threads, (S::staged && S::states <= 4 ? 512 : S::staged ? 384 : 256) / (2 * S::threads)) scan_forward(const __grid_constant__ ScanParams p) {
  const int side = int(threadIdx.x) / S::threads, thread = int(threadIdx.x) % S::threads;
  const int channel = thread / S::lanes, part = thread % S::lanes;
  const Tile tile = Tile::of<S>(p);
  const Direction& d = p.direction[side];
  const bool reverse = d.reverse;
  SharedForward<S>* const shared = shared_memory<SharedForward<S>>();
  SharedForward<S>& own = shared[side];
  const Elements<S> elements(thread, p.time_fast);
  const CoefficientElements<S> coefficient_elements(thread, p.state_fast);
  const Coefficients<S> coefficients(d, tile, channel, part, own.rows);

  const bool active = channel < tile.count;
  const int64_t row = int64_t(tile.batch) * p.dim + tile.first + channel;  // of (batch, dim)
  float A[S::states], h[S::states];
#pragma unroll
  for (int i = 0; i < S::states; ++i) {
    const int n = part * S::states + i;
    const bool real = active && n < p.dstate;
    A[i] = real ? kLog2e * load_value_readonly(d.A + int64_t(tile.first + channel) * p.dstate + n) : 0.0f;
    h[i] = real && d.initial_state ? load_value_readonly(d.initial_state + row * p.dstate + n) : 0.0f;
  }
  if (thread < S::channels) {
    const bool real = thread < tile.count;
    own.D[thread] = real && d.D ? load_value_readonly(d.D + tile.first + thread) : 0.0f;
    own.delta_bias[thread] = real && d.delta_bias ? load_value_readonly(d.delta_bias + tile.first + thread) : 0.0f;
  }
  __syncthreads();

  const int chunks = ceil_div(p.seqlen, S::steps);
  const auto chunk_at = [&](int visit) { return Chunk::at<S>(reverse ? chunks - 1 - visit : visit, p.seqlen); };
  // What a chunk starts with is loaded while the one before it is scanned. Where a thread has many states, B and C are not: registers.
  constexpr bool kEarly = S::staged && S::states <= 4;
  float u[S::elements], delta[S::elements], B[CoefficientElements<S>::count], C[CoefficientElements<S>::count];
  const auto load_coefficients = [&](const Chunk& chunk) {
    coefficient_elements.load(d.B, tile, chunk, p.dstate, B);
    coefficient_elements.load(d.C, tile, chunk, p.dstate, C);
  };
  elements.load(d.u, tile, chunk_at(0), u);
  elements.load(d.delta, tile, chunk_at(0), delta);
  if constexpr (kEarly) load_coefficients(chunk_at(0));

  for (int visit = 0; visit < chunks; ++visit) {
    const Chunk chunk = chunk_at(visit);
    // Of two directions, the one that comes first leaves its y, the other adds it; in the middle of an odd number they meet.
    const bool two = p.directions == 2, comes_first = two && 2 * visit < chunks - 1, meets = two && 2 * visit == chunks - 1;
    const bool adds = two && 2 * visit > chunks - 1;

    float skip[S::elements], z[S::elements], partial[S::elements];
    if constexpr (S::staged && !kEarly) load_coefficients(chunk);
#pragma unroll
    for (int i = 0; i < S::elements; ++i) {
      skip[i] = own.D[elements.channel_of(i)] * u[i];
      delta[i] += own.delta_bias[elements.channel_of(i)];
    }
    if (p.softplus) {
#pragma unroll
      for (int i = 0; i < S::elements; ++i) delta[i] = softplus(delta[i]);
    }
#pragma unroll
    for (int i = 0; i < S::elements; ++i) own.steps[elements.slot(i)] = make_float2(delta[i], delta[i] * u[i]);
    if constexpr (S::staged) {
      coefficient_elements.put(own.rows, B);
      coefficient_elements.put(own.rows + S::dstate, C);
    }
    if (thread < 32) {
      const unsigned resets = p.seq_idx ? resets_of(p, tile, chunk, reverse, thread) : 0u;
      if (thread == 0) own.resets = resets;
    }
    __syncthreads();
    // What the end of this chunk and the start of the next need is on its way while the chunk is scanned.
    if (p.z && !comes_first) elements.load(p.z, tile, chunk, z);
    if (adds) elements.load(p.partial, tile, chunk, partial);
    if (visit + 1 < chunks) {
      elements.load(d.u, tile, chunk_at(visit + 1), u);
      elements.load(d.delta, tile, chunk_at(visit + 1), delta);
      if constexpr (kEarly) load_coefficients(chunk_at(visit + 1));
    }
    const bool enters = reverse ? (chunk.first + chunk.count) % kChunk == 0 || visit == 0 : chunk.first % kChunk == 0;
    if (d.states && active && enters) {
      float* stored = d.states + (int64_t(chunk.first / kChunk) * p.batch * p.dim + row) * S::dstate + part * S::states;
      if constexpr (S::states == 2)
        store_many<2>(stored, h);
      else
        store_many<S::states>(stored, h);
    }

    const unsigned resets = own.resets;
    if (reverse)
      scan_chunk<S, -1>(coefficients, chunk, resets, part, own.steps + channel, A, h);
    else
      scan_chunk<S, 1>(coefficients, chunk, resets, part, own.steps + channel, A, h);
    __syncthreads();

    if (meets) {  // the other direction's skip is in other threads: put it where both can read it
#pragma unroll
      for (int i = 0; i < S::elements; ++i) own.steps[elements.slot(i)].y += skip[i];
      __syncthreads();
    }
    if (!meets || side == 0) {
      float y[S::elements];
#pragma unroll
      for (int i = 0; i < S::elements; ++i) {
        const int slot = elements.slot(i);
        y[i] = own.steps[slot].y + (meets ? shared[1].steps[slot].y : skip[i]);
        if (adds) y[i] += partial[i];
        if (comes_first) continue;
        y[i] *= p.scale;
        if (p.z) y[i] *= z[i] * sigmoid(z[i]);
      }
      elements.store(comes_first ? p.partial : p.out, tile, chunk, y);
    }
    __syncthreads();
  }

  if (d.last_state && active) {
#pragma unroll
    for (int i = 0; i < S::states; ++i) {
      const int n = part * S::states + i;
      if (n < p.dstate) store_value(d.last_state + row * p.dstate + n, h[i]);
    }
  }
}

template <class S>
struct Forward {
  static const char* run(const Launch& at, const ScanParams& p, int blocks) {
    return launch("selective_scan_forward", scan_forward<S>, dim3(unsigned(blocks)), dim3(unsigned(p.directions * S::threads)),
                  sizeof(SharedForward<S>) * size_t(p.directions), at, p);
  }
};

}  // namespace

ScanShape scan_shape(int dstate, bool direct) {
  const auto shape = [](auto c) { return ScanShape{c.dstate, ForwardShape<decltype(c)>::channels, BackwardShape<decltype(c)>::channels}; };
  return direct || dstate > kDirectDstate ? DirectCases::pick(dstate, shape) : StagedCases::pick(dstate, shape);
}

const char* selective_scan_forward(const Launch& at, const ScanArgs& args) {
  return is_direct(args) ? launch_scan<Forward, ForwardShape, DirectCases>(at, args) : launch_scan<Forward, ForwardShape, StagedCases>(at, args);
}

}  // namespace pixelbytes::cuda
