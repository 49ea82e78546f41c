// The scan's forward.
//
// A block: see scan_tile.h. Shared memory per direction: a plane (step, channel) of the pairs (dt, dt u), where y replaces the second, and the
// staged B and C of the chunk: 16 * 17 * 8 + 16 * 36 * 4 + 144 = 4,624 bytes at dstate 16. Deterministic: fixed order of all sums.
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

// Chunks next to the middle whose y and dt wait in registers for the other direction: with 8 of 16 steps, all of a row of 256. Such a row is
// read once, but for u; a longer one saves at its middle. Conversion of fp16 leaves registers for fewer.
template <class S, class M>
constexpr int kKept = !M::whole || S::elements != 4 ? 0 : std::is_same_v<M, Whole<float>> ? 8 : 8;

// Threads that a multiprocessor is to hold.
template <class S, class M>
constexpr int kResidentForward = kKept<S, M> > 0 ? 384 : S::staged && S::states <= 4 ? 512 : S::staged ? 384 : 256;

// Scans one chunk upwards (by = 1) or downwards (-1); `plane` belongs to the thread's channel, `sums` is where y of step `part` goes.
template <class S, class M, int by>
__device__ inline void scan_chunk(const Coefficients<S>& coefficients, const Chunk& chunk, unsigned resets, int part, float2* plane, float* sums,
                                  const float (&A)[S::states], float (&h)[S::states]) {
  // y of one step, this thread's states only
  const auto step = [&](int k, float2 in) {
    float B[S::states], C[S::states], y = 0.0f;
    coefficients.read_B(chunk, k, B);
    coefficients.read_C(chunk, k, C);
#pragma unroll
    for (int i = 0; i < S::states; ++i) {
      h[i] = fmaf(exp2_fast(in.x * A[i]), h[i], in.y * B[i]);
      y = i ? fmaf(C[i], h[i], y) : C[i] * h[i];
    }
    return y;
  };
  // Four steps share one sum over lanes.
  const auto four_steps = [&](int k) {
    float2 in[4];
    float y[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) in[j] = plane[(k + j * by) * S::pitch];
#pragma unroll
    for (int j = 0; j < 4; ++j) y[j] = step(k + j * by, in[j]);
    const float sum = sum_to_lane<S::lanes>(y, part);
    if (S::lanes == 4 || part < 4) sums[2 * k * S::pitch] = sum;
  };
  constexpr int kFirst = by > 0 ? 0 : S::steps - 1;
  if constexpr (M::whole) {
#pragma unroll
    for (int i = 0; i < S::steps; i += 4) four_steps(kFirst + i * by);
  } else {
    // ... where registers allow; where the state restarts, steps are taken one by one.
    constexpr bool kTogether = S::staged && S::states <= 4;
    const int quick = kTogether && !resets ? chunk.count / 4 * 4 : 0;
    int k = by > 0 ? 0 : chunk.count - 1;
    if constexpr (kTogether) {
#pragma unroll 1
      for (int left = quick; left; k += 4 * by, left -= 4) four_steps(k);
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
}

template <class S, class M>
__global__ void __launch_bounds__(2 * S::threads, kResidentForward<S, M> / (2 * S::threads)) scan_forward(const __grid_constant__ ScanParams p) {
  using Part = Elements<S>;
  const int side = int(threadIdx.x) / S::threads, thread = int(threadIdx.x) % S::threads;
  const int channel = thread / S::lanes, part = thread % S::lanes;
  const Tile tile = Tile::of<S>(p);
  const Direction& d = p.direction[side];
  const bool reverse = d.reverse, two = p.directions == 2;
  SharedForward<S>* const shared = shared_memory<SharedForward<S>>();
  SharedForward<S>& own = shared[side];
  float2* const plane = at_offset<float2>(shared, side * int(sizeof own) + channel * int(sizeof(float2)));
  float* const sums = at_offset<float>(plane, (reverse ? -1 : 1) * part * S::pitch * int(sizeof(float2)) + int(offsetof(float2, y)));
  const Elements<S> elements(thread, p.time_fast);
  float* const rows = at_offset<float>(shared, side * int(sizeof own) + int(offsetof(SharedForward<S>, rows)));
  const CoefficientElements<S> coefficient_elements(thread);
  const Coefficients<S> coefficients(d, tile, channel, part, rows);
  const bool active = M::whole || channel < tile.count;
  float A[S::states], h[S::states];
#pragma unroll
  for (int i = 0; i < S::states; ++i) {
    const int n = part * S::states + i;
    const bool real = M::whole || (active && n < p.dstate);
    A[i] = real ? kLog2e * load_value_readonly(d.A + int64_t(tile.first + channel) * p.dstate + n) : 0.0f;
    h[i] = real && d.initial_state ? load_value_readonly(d.initial_state + tile.row(p, channel) * p.dstate + n) : 0.0f;
  }
  if (!M::whole && thread < S::channels) {
    const bool real = thread < tile.count;
    own.D[thread] = real && d.D ? load_value_readonly(d.D + tile.first + thread) : 0.0f;
    own.delta_bias[thread] = real && d.delta_bias ? load_value_readonly(d.delta_bias + tile.first + thread) : 0.0f;
  }
  if (!M::whole) __syncthreads();
  // Of this thread's elements; in registers where there is no lack of them.
  float held_D[Part::count] = {}, held_bias[Part::count] = {};
  if constexpr (M::whole) {
#pragma unroll
    for (int i = 0; i < Part::count; ++i) {
      const int c = tile.first + elements.k_of(i);
      if (d.D) held_D[i] = load_value_readonly(d.D + c);
      if (d.delta_bias) held_bias[i] = load_value_readonly(d.delta_bias + c);
    }
  }
  const auto D = [&](int i) { return M::whole ? held_D[i] : own.D[elements.k_of(i)]; };
  const auto bias = [&](int i) { return M::whole ? held_bias[i] : own.delta_bias[elements.k_of(i)]; };

  const int chunks = ceil_div(Tile::end(p) - Tile::begin(p), S::steps);
  const auto chunk_at = [&](int visit) { return Chunk::at<S, M>(reverse ? chunks - 1 - visit : visit, p); };
  const Chunk first_chunk = chunk_at(0);
  const Start<S, M> walk{tile, first_chunk, reverse ? -1 : 1};
  auto u = walk.of(d.u, elements), delta = walk.of(d.delta, elements), z = walk.of(p.z, elements), out = walk.of(p.out, elements);
  auto apart = walk.of(p.partial, elements);
  auto& partial = M::whole ? out : apart;  // there they are the same
  auto B = walk.of(d.B, coefficient_elements, p.dstate), C = walk.of(d.C, coefficient_elements, p.dstate);

  // Of two directions, the one that comes first to a chunk, before visit `first_half`, leaves its y, the other adds it, from visit `second_half`
  // on; in the middle of an odd number they meet. Near the middle y waits in registers, and dt with it where it is the same for both;
  // farther away, y in global memory.
  const int first_half = two ? chunks / 2 : 0, second_half = two ? chunks - first_half : chunks;
  const int kept_until = second_half + kKept<S, M>, dt_kept_until = p.shares_delta ? kept_until : 0;
  float kept_y[kKept<S, M> + 1][Part::count], kept_dt[kKept<S, M> + 1][Part::count];
  const auto takes = [&](int visit) { return visit >= second_half && visit < kept_until; };
  const auto takes_dt = [&](int visit) { return visit >= second_half && visit < dt_kept_until; };

  // What a chunk starts with is loaded while the one before it is scanned. Where a thread has many states, B, C and z are not: registers.
  constexpr bool kEarly = S::staged && S::states <= 4;
  Raw<Part, M> raw_u, raw_delta;
  Raw<CoefficientElements<S>, M> raw_B, raw_C;
  const auto load_coefficients = [&](const Chunk& chunk) {
    B.template load<true>(chunk, raw_B);
    C.template load<true>(chunk, raw_C);
    B.advance(), C.advance();
  };
  const auto start = [&](int visit) {
    const Chunk chunk = chunk_at(visit);
    u.load(chunk, raw_u);
    u.advance();
    if (!takes_dt(visit)) delta.load(chunk, raw_delta);
    delta.advance();
    if constexpr (kEarly) load_coefficients(chunk);
  };
  start(0);

  // The state is stored every kChunk steps; a downward walk may begin with fewer.
  constexpr int kVisits = kChunk / S::steps;
  const int odd = reverse ? chunks % kVisits : 0;
  const bool stores = d.states && active;
  float* stored = d.states + (int64_t(first_chunk.first / kChunk) * p.batch * p.dim + tile.row_of_batch(p, channel)) * S::dstate + part * S::states;

#pragma unroll 1
  for (int visit = 0; visit < chunks; ++visit) {
    const Chunk chunk = chunk_at(visit);
    const bool comes_first = visit < first_half, adds = visit >= second_half, meets = two && !comes_first && !adds;
    const bool leaves_kept = visit >= first_half - kKept<S, M>, takes_kept = takes(visit), has_dt = takes_dt(visit);

    float dt[Part::count], y[Part::count], rest[Part::count];  // rest: of y, besides the scan
    if constexpr (kKept<S, M> > 0) {
      if (takes_kept) {
        SharedForward<S>& other = shared[1 - side];
        __syncthreads();
        at_constant<kKept<S, M>>(visit - second_half, [&](auto at) {
#pragma unroll
          for (int i = 0; i < Part::count; ++i) other.steps[elements.slot(i)] = make_float2(kept_dt[at.value][i], kept_y[at.value][i]);
        });
        __syncthreads();
#pragma unroll
        for (int i = 0; i < Part::count; ++i) {
          const float2 left = own.steps[elements.slot(i)];
          dt[i] = left.x, rest[i] = left.y;
        }
      }
    }
    if constexpr (S::staged && !kEarly) load_coefficients(chunk);
    if (!has_dt) {
      delta.open(raw_delta, dt);
#pragma unroll
      for (int i = 0; i < Part::count; ++i) dt[i] += bias(i);
      if (p.softplus) {
#pragma unroll
        for (int i = 0; i < Part::count; ++i) dt[i] = softplus(dt[i]);
      }
    }
    float input[Part::count];
    u.open(raw_u, input);
#pragma unroll
    for (int i = 0; i < Part::count; ++i) own.steps[elements.slot(i)] = make_float2(dt[i], dt[i] * input[i]);
    if (takes_kept) {
#pragma unroll
      for (int i = 0; i < Part::count; ++i) rest[i] = fmaf(D(i), input[i], rest[i]);
    } else {
#pragma unroll
      for (int i = 0; i < Part::count; ++i) rest[i] = D(i) * input[i];
    }
    if constexpr (S::staged) {
      float v[CoefficientElements<S>::count];
      B.open(raw_B, v);
      coefficient_elements.put(rows, v);
      C.open(raw_C, v);
      coefficient_elements.put(rows + S::dstate, v);
    }
    if (!M::whole && thread < 32) {
      const unsigned resets = p.seq_idx ? resets_of(p, tile, chunk, reverse, thread) : 0u;
      if (thread == 0) own.resets = resets;
    }
    __syncthreads();
    Raw<Part, M> raw_z = {};
    if (kEarly && z && !comes_first) z.load(chunk, raw_z);
    if (visit + 1 < chunks) start(visit + 1);
    if (stores && (visit % kVisits == odd || visit == 0)) {
      store_many<S::states>(stored, h);
      stored += (reverse ? -1 : 1) * int64_t(p.batch) * p.dim * S::dstate;
    }

    const unsigned resets = M::whole ? 0u : own.resets;
    if (reverse)
      scan_chunk<S, M, -1>(coefficients, chunk, resets, part, plane, sums, A, h);
    else
      scan_chunk<S, M, 1>(coefficients, chunk, resets, part, plane, sums, A, h);
    if (!kEarly && z && !comes_first) z.load(chunk, raw_z);
    __syncthreads();

    if (adds && !takes_kept) {
      float left[Part::count];
      partial.load(chunk, left);
#pragma unroll
      for (int i = 0; i < Part::count; ++i) rest[i] += left[i];
    }
#pragma unroll
    for (int i = 0; i < Part::count; ++i) {
      const float2 done = own.steps[elements.slot(i)];
      dt[i] = done.x, y[i] = done.y + rest[i];
    }
    if (comes_first) {
      if constexpr (kKept<S, M> > 0) {
        if (leaves_kept)
          at_constant<kKept<S, M>>(first_half - 1 - visit, [&](auto at) {
#pragma unroll
            for (int i = 0; i < Part::count; ++i) kept_dt[at.value][i] = dt[i], kept_y[at.value][i] = y[i];
          });
      }
      if (!leaves_kept) partial.store(chunk, y);
    } else {
      if (meets) {  // the other direction's share is in other threads: put it where both can read it
        if (side == 1) {
#pragma unroll
          for (int i = 0; i < Part::count; ++i) own.steps[elements.slot(i)].y = y[i];
        }
        __syncthreads();
        if (side == 0) {
#pragma unroll
          for (int i = 0; i < Part::count; ++i) y[i] += shared[1].steps[elements.slot(i)].y;
        }
        __syncthreads();
      }
#pragma unroll
      for (int i = 0; i < Part::count; ++i) y[i] *= p.scale;
      if (z) {
        float gate[Part::count];
        z.open(raw_z, gate);
#pragma unroll
        for (int i = 0; i < Part::count; ++i) y[i] = times_silu(y[i], gate[i]);
      }
      if (!meets || side == 0) out.store(chunk, y);
    }
    z.advance(), out.advance(), apart.advance();
  }

  if (d.last_state && active) {
#pragma unroll
    for (int i = 0; i < S::states; ++i) {
      const int n = part * S::states + i;
      if (n < p.dstate) store_value(d.last_state + tile.row(p, channel) * p.dstate + n, h[i]);
    }
  }
}

template <class S, class M>
struct Forward {
  static const char* run(const Launch& at, const ScanParams& p, int blocks) {
    return launch("selective_scan_forward", scan_forward<S, M>, dim3(unsigned(blocks), unsigned(ceil_div(p.seqlen, p.stretch))), dim3(unsigned(p.directions * S::threads)),
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
