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

// B or C at one time step for states n, n + 1, ...; kVaries: `p` is at (time, n) of a (time, dstate) array, else at (n, lane).
template <class T, bool kVaries>
inline Vec<T> coefficient(const T* p, int k) {
  if constexpr (kVaries) return splat(p[k]);
  else return load(p + k * kLanes<T>);
}

template <class T>
struct Steps {  // a run of `count` steps; pointers stand at its first one
  int count;
  int64_t direction;                  // +1 or -1
  const T *u, *delta;                 // (time, lane)
  const T *B, *C;                     // see coefficient()
  int64_t pitch_B, pitch_C;           // from one time step to the next, where they vary
  const char* const* ahead;           // a cache line a step that will be needed soon: the recurrence leaves the memory alone
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
  for (int i = 0; i < s.count; ++i) {
    prefetch_line(s.ahead[i]);
    const Vec<T> d = load(delta), x = d * load(u);
    Vec<T> sum = load(y);
#pragma GCC unroll 4
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

// The same recurrence, keeping what its gradient needs: decay exp(delta A) of each step, and the state before each step (and after
// the last). y is accumulated only where the gradient of z wants it.
template <class T, int kCount, bool kVariesB, bool kVariesC, bool kSafe, bool kNeedY>
inline void recompute_steps(const Steps<T>& s, const T* A, const T* A2, T* h_io, T* y, T* decays, T* states) {
  constexpr int W = kLanes<T>;
  const int64_t step = s.direction * W, step_B = kVariesB ? s.direction * s.pitch_B : 0, step_C = kVariesC ? s.direction * s.pitch_C : 0;
  Vec<T> a[kCount], low[kCount], h[kCount];
  for (int k = 0; k < kCount; ++k) {
    a[k] = load(A2 + k * W), h[k] = load(h_io + k * W);
    if constexpr (!kSafe) low[k] = log2e_remainder<T>(load(A + k * W), a[k]);
    store(states + k * W, h[k]);
  }
  const T *u = s.u, *delta = s.delta, *B = s.B, *C = s.C;
  for (int i = 0; i < s.count; ++i) {
    states += kCount * W;
    prefetch_line(s.ahead[i]);
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
  for (int k = 0; k < kCount; ++k) store(h_io + k * W, h[k]);
}

template <class T>
struct Sweep {  // gradients of one run, walked from its last step to its first
  const T* dy;                       // (time, lane)
  T *dx, *ddelta;                    // (time, lane): of delta * u, and of delta through the decay; added to, or set in the `first` pass
  const T *decays, *states;          // of recompute_steps, at the run's first step
  T *dB, *dC;                        // varying: (step, state, lane) at the run's first step; constant: (state, lane); added to
  T *dh, *dA;                        // (state, lane): carried gradient of the state, gradient of A; in and out
  bool first;
};

template <class T, int kCount, bool kVariesB, bool kVariesC>
inline void sweep_steps(const Steps<T>& s, const Sweep<T>& g, const T* A) {
  constexpr int W = kLanes<T>;
  const int last = s.count - 1;
  const bool first = g.first;
  const int64_t step = s.direction * W, step_B = kVariesB ? s.direction * s.pitch_B : 0, step_C = kVariesC ? s.direction * s.pitch_C : 0;
  const T *u = s.u + last * step, *delta = s.delta + last * step, *dy = g.dy + last * step;
  T *dx = g.dx + last * step, *ddelta = g.ddelta + last * step;
  const T *B = s.B + last * step_B, *C = s.C + last * step_C;
  const T *decays = g.decays + last * kCount * W, *states = g.states + last * kCount * W;
  T *dB = g.dB + (kVariesB ? last * kCount * W : 0), *dC = g.dC + (kVariesC ? last * kCount * W : 0);
  Vec<T> dh[kCount], dA[kCount], h[kCount];  // h: the state after the present step
  for (int k = 0; k < kCount; ++k) {
    dh[k] = load(g.dh + k * W), dA[k] = load(g.dA + k * W), h[k] = load(states + (kCount + k) * W);
  }
  for (int i = last; i >= 0; --i) {
    prefetch_line(s.ahead[i]);
    const Vec<T> d = load(delta), x = d * load(u), gy = load(dy);
    Vec<T> sum_x = first ? Vec<T>{} : load(dx), sum_delta = first ? Vec<T>{} : load(ddelta);
#pragma GCC unroll 4
    for (int k = 0; k < kCount; ++k) {
      dh[k] += coefficient<T, kVariesC>(C, k) * gy;
      store(dC + k * W, load(dC + k * W) + gy * h[k]);
      store(dB + k * W, load(dB + k * W) + x * dh[k]);
      sum_x += coefficient<T, kVariesB>(B, k) * dh[k];
      dh[k] *= load(decays + k * W);
      h[k] = load(states + k * W);
      const Vec<T> through_decay = dh[k] * h[k];
      sum_delta += load(A + k * W) * through_decay;
      dA[k] += d * through_decay;
    }
    store(dx, sum_x), store(ddelta, sum_delta);
    u -= step, delta -= step, dy -= step, dx -= step, ddelta -= step, B -= step_B, C -= step_C;
    decays -= kCount * W, states -= kCount * W;
    if constexpr (kVariesB) dB -= kCount * W;
    if constexpr (kVariesC) dC -= kCount * W;
  }
  for (int k = 0; k < kCount; ++k) store(g.dh + k * W, dh[k]), store(g.dA + k * W, dA[k]);
}

}  // namespace
}  // namespace pixelbytes
