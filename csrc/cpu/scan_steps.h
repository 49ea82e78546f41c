// The inner loops of the selective scan: kStates states of one tile of channels, over a run of time steps.
//
// A "step" pointer walks time upwards (+lanes) or downwards (-lanes): the reverse direction needs no flipped copy. The states stay
// in registers. B and C are scalars a step (broadcast to all channels of the tile) or, where they do not depend on time,
// one vector a state.
#pragma once
#include "cpu/tile.h"

namespace pixelbytes {
namespace {

constexpr int kChunk = 32;  // steps between stored states: what the backward recomputes at once stays in the L1 cache
constexpr int kStates = 4;  // states a pass: 4 of h, 4 of A and the constants of exp2 fit 16 registers, and cover the latency
constexpr int kForwardStates = kVecBytes == 64 ? 8 : kStates;  // with 32 registers; the backward's arrays of a pass would outgrow L1

// B or C at one time step for states n, n + 1, ...; kVaries: `p` is at (time, n) of a (time, dstate) array, else at (n, lane).
template <class T, bool kVaries>
inline Vec<T> coefficient(const T* p, int k) {
  if constexpr (kVaries) return splat(p[k]);
  else return load(p + k * kLanes<T>);
}

// Memory that is needed soon: `count` rows of two cache lines.
struct LineRows {
  const char* row;
  int64_t pitch;
  int count;

  void ask() { prefetch_lines(row), row += pitch, --count; }
  LineRows from(int rows) const { return {row + rows * pitch, pitch, count - rows}; }
};
struct Ahead {  // asked for row by row, one a step or two, so that the recurrence hides the wait
  LineRows now;
  const LineRows* then;  // and `left` more after it
  int left;
  bool two;

  [[gnu::always_inline]] void row() {  // a call in the inner loops otherwise
    if (now.count <= 0) return;
    now.ask();
    turn();
  }
  [[gnu::always_inline]] void turn() {
    if (__builtin_expect(now.count == 0, 0) && left > 0) now = *then++, --left;
  }
  Ahead from(int step) const {
    Ahead later = *this;
    for (int rows = two ? 2 * step : step; rows > 0 && later.now.count > 0;) {
      const int count = later.now.count < rows ? later.now.count : rows;
      later.now = later.now.from(count);
      later.turn();
      rows -= count;
    }
    return later;
  }
};

struct Run {
  int begin, count;  // steps of the chunk before it, and its own
  int offset;        // first step relative to the chunk's lowest time
  bool fresh;        // the sequence index changed: the state starts from zero
};

template <class T>
struct Steps {  // a run of `count` steps; pointers stand at its first one
  int count;
  int64_t direction;                  // +1 or -1
  const T *u, *delta;                 // (time, lane)
  const T *B, *C;                     // see coefficient()
  int64_t pitch_B, pitch_C;           // from one time step to the next, where they vary
  Ahead ahead;

  // Of the steps of a chunk, which stand at its lowest time: those of one run, for states n, n + 1, ...
  template <bool kVariesB, bool kVariesC>
  [[gnu::always_inline]] Steps of(const Run& run, int64_t n, const Ahead& lines) const {
    constexpr int W = kLanes<T>;
    const int64_t at = run.offset;
    const T *at_B = B + (kVariesB ? at * pitch_B + n : n * W), *at_C = C + (kVariesC ? at * pitch_C + n : n * W);
    return {run.count, direction, u + at * W, delta + at * W, at_B, at_C, pitch_B, pitch_C, run.begin ? lines.from(run.begin) : lines};
  }
};

// y += C h along the run; h is updated. A2 = A log2(e). kSafe: see exp2_product.
template <class T, int kCount, bool kVariesB, bool kVariesC, bool kSafe>
inline void scan_steps(const Steps<T>& s, const T* A, const T* A2, T* h_io, T* y) {
  constexpr int W = kLanes<T>;
  const int64_t step = s.direction * W, step_B = kVariesB ? s.direction * s.pitch_B : 0, step_C = kVariesC ? s.direction * s.pitch_C : 0;
  Vec<T> a[kCount], low[kCount], h[kCount];
  for (int k = 0; k < kCount; ++k) {
    a[k] = load(A2 + k * W), h[k] = load(h_io + k * W);
    if constexpr (!kSafe) low[k] = log2e_remainder<T>(load(A + k * W), a[k]);
  }
  const T *u = s.u, *delta = s.delta, *B = s.B, *C = s.C;
  Ahead ahead = s.ahead;
  for (int i = 0; i < s.count; ++i) {
    ahead.row();
    if (ahead.two) ahead.row();
    const Vec<T> d = load(delta), x = d * load(u);
    Vec<T> sum = load(y);
#pragma GCC unroll 8
    for (int k = 0; k < kCount; ++k) {
      const Vec<T> decay = kSafe ? exp2_product<true>(d, a[k]) : exp2_product<false>(d, a[k], low[k]);
      h[k] = decay * h[k] + coefficient<T, kVariesB>(B, k) * x;
      sum += coefficient<T, kVariesC>(C, k) * h[k];
    }
    store(y, sum);
    u += step, delta += step, y += step, B += step_B, C += step_C;
  }
  for (int k = 0; k < kCount; ++k) store(h_io + k * W, h[k]);
}

// The same recurrence from state `h_in` (null: zeros), keeping what its gradient needs: decay exp(delta A) of each step, and the state
// before each step (and after the last). y is accumulated only where the gradient of z wants it.
template <class T, int kCount, bool kVariesB, bool kVariesC, bool kSafe, bool kNeedY>
inline void recompute_steps(const Steps<T>& s, const T* A, const T* A2, const T* h_in, T* y, T* decays, T* states) {
  constexpr int W = kLanes<T>;
  const int64_t step = s.direction * W, step_B = kVariesB ? s.direction * s.pitch_B : 0, step_C = kVariesC ? s.direction * s.pitch_C : 0;
  Vec<T> a[kCount], low[kCount], h[kCount];
  for (int k = 0; k < kCount; ++k) {
    a[k] = load(A2 + k * W), h[k] = h_in ? load(h_in + k * W) : Vec<T>{};
    if constexpr (!kSafe) low[k] = log2e_remainder<T>(load(A + k * W), a[k]);
    store(states + k * W, h[k]);
  }
  const T *u = s.u, *delta = s.delta, *B = s.B, *C = s.C;
  Ahead ahead = s.ahead;
  for (int i = 0; i < s.count; ++i) {
    states += kCount * W;
    ahead.row();
    const Vec<T> d = load(delta), x = d * load(u);
    Vec<T> sum = kNeedY ? load(y) : Vec<T>{};
#pragma GCC unroll 4
    for (int k = 0; k < kCount; ++k) {
      const Vec<T> decay = kSafe ? exp2_product<true>(d, a[k]) : exp2_product<false>(d, a[k], low[k]);
      h[k] = decay * h[k] + coefficient<T, kVariesB>(B, k) * x;
      store(decays + k * W, decay);
      store(states + k * W, h[k]);
      if constexpr (kNeedY) sum += coefficient<T, kVariesC>(C, k) * h[k];
    }
    if constexpr (kNeedY) store(y, sum), y += step;
    decays += kCount * W;
    u += step, delta += step, B += step_B, C += step_C;
  }
}

template <class T>
struct Sweep {  // gradients of one run, walked from its last step to its first
  const T* dy;                       // (time, lane)
  T *dx, *ddelta;                    // (time, lane): of delta * u, and of delta through the decay; added to, or set in the `first` pass
  const T *decays, *states;          // of recompute_steps, at the run's first step
  T* sums;                           // (step, kSums * lane) at the run's first step: dC and dB where they vary, see fold_lanes; added to
  T *dB, *dC;                        // (state, lane) where they are constant; added to
  T *dh, *dA;                        // (state, lane): carried gradient of the state, gradient of A; in and out
  int valid;                         // lanes that are channels: in the others a NaN or infinity of B or C may have met a zero
  bool first;
};

// Of a pass over kCount states: how many gradients of coefficients a step has, and the vectors that hold them.
template <class T, int kCount, bool kVariesB, bool kVariesC>
struct StepSums {
  static constexpr int kValues = kCount * (int(kVariesB) + int(kVariesC)), kVectors = kValues > kLanes<T> ? kValues / kLanes<T> : 1;
};

template <class T, int kCount, bool kVariesB, bool kVariesC, bool kWhole>
inline void sweep_steps(const Steps<T>& s, const Sweep<T>& g, const T* A) {
  constexpr int W = kLanes<T>;
  using Sums = StepSums<T, kCount, kVariesB, kVariesC>;
  const int last = s.count - 1;
  const bool first = g.first;
  const int64_t step = s.direction * W, step_B = kVariesB ? s.direction * s.pitch_B : 0, step_C = kVariesC ? s.direction * s.pitch_C : 0;
  const T *u = s.u + last * step, *delta = s.delta + last * step, *dy = g.dy + last * step;
  T *dx = g.dx + last * step, *ddelta = g.ddelta + last * step;
  const T *B = s.B + last * step_B, *C = s.C + last * step_C;
  const T *decays = g.decays + last * kCount * W, *states = g.states + last * kCount * W;
  T* sums = g.sums + last * Sums::kVectors * W;
  Ahead ahead = s.ahead;
  const Mask<T> valid = lane_index<T>() < splat(T(g.valid));
  Vec<T> a[kCount], dh[kCount], dA[kCount], h[kCount];  // h: the state after the present step
  for (int k = 0; k < kCount; ++k) {
    a[k] = load(A + k * W), dh[k] = load(g.dh + k * W), dA[k] = load(g.dA + k * W), h[k] = load(states + (kCount + k) * W);
  }
  for (int i = last; i >= 0; --i) {
    ahead.row();
    const Vec<T> d = load(delta), x = d * load(u), gy = load(dy);
    Vec<T> sum_x = first ? Vec<T>{} : load(dx), sum_delta = first ? Vec<T>{} : load(ddelta);
    Vec<T> parts[Sums::kValues + 1];
#pragma GCC unroll 4
    for (int k = 0; k < kCount; ++k) {
      dh[k] += coefficient<T, kVariesC>(C, k) * gy;
      if constexpr (kVariesC) parts[k] = gy * h[k];
      else store(g.dC + k * W, load(g.dC + k * W) + gy * h[k]);
      if constexpr (kVariesB) parts[kVariesC * kCount + k] = x * dh[k];
      else store(g.dB + k * W, load(g.dB + k * W) + x * dh[k]);
      sum_x += coefficient<T, kVariesB>(B, k) * dh[k];
      dh[k] *= load(decays + k * W);
      h[k] = load(states + k * W);
      const Vec<T> through_decay = dh[k] * h[k];
      sum_delta += a[k] * through_decay;
      dA[k] += d * through_decay;
    }
    store(dx, sum_x), store(ddelta, sum_delta);
    if constexpr (Sums::kValues > 0) {
      if constexpr (!kWhole)
        for (int k = 0; k < Sums::kValues; ++k) parts[k] = select(valid, parts[k], Vec<T>{});
      fold_lanes<T, Sums::kValues>(parts);
#pragma GCC unroll 4
      for (int k = 0; k < Sums::kVectors; ++k) store(sums + k * W, load(sums + k * W) + parts[k]);
    }
    u -= step, delta -= step, dy -= step, dx -= step, ddelta -= step, B -= step_B, C -= step_C;
    decays -= kCount * W, states -= kCount * W, sums -= Sums::kVectors * W;
  }
  for (int k = 0; k < kCount; ++k) store(g.dh + k * W, dh[k]), store(g.dA + k * W, dA[k]);
}

}  // namespace
}  // namespace pixelbytes
