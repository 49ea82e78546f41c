// selective_scan and bidirectional_selective_scan, forward and backward.
//
// A task owns one batch row and a block of channel tiles: it brings u, delta (after bias and softplus) of the whole row into
// (tile, time, lane) scratch, runs each direction over it chunk by chunk, and writes the gated sum. Tasks depend on sizes alone and
// partial sums are added in task order, so results are bitwise equal for any number of threads. No atomics.
#include "cpu/kernels.h"
#include "cpu/scan_steps.h"

namespace pixelbytes {
namespace PIXELBYTES_ISA {
namespace {

constexpr int64_t kMaxBlockTiles = 8;       // sharing B, C and the lane sums of dB, dC: more gains little
constexpr int64_t kWantedTasks = 8;         // so that a batch of one keeps several threads busy
constexpr int64_t kRowScratch = 32 << 20;   // bytes of row scratch a task may take before its block is made narrower

struct Plan {
  int64_t batch, dim, seqlen, dstate, groups;
  int64_t group_dim, group_tiles, block_tiles, group_blocks, chunks;
  int64_t tasks() const { return batch * groups * group_blocks; }
};

template <class T>
Plan make_plan(const ScanArgs& a) {
  constexpr int64_t lanes = kLanes<T>;
  const ScanDirection& first = a.direction[0];
  const int64_t batch = first.u.size[0], dim = first.u.size[1], seqlen = first.u.size[2], dstate = first.A.size[1];
  int64_t groups = 1;
  for (int d = 0; d < a.directions; ++d) {
    if (a.direction[d].B.ndim == 4) groups = a.direction[d].B.size[1];
    if (a.direction[d].C.ndim == 4) groups = a.direction[d].C.size[1];
  }
  Plan p{batch, dim, seqlen, dstate, groups, dim / groups, 0, 0, 0, (seqlen + kChunk - 1) / kChunk};
  p.group_tiles = (p.group_dim + lanes - 1) / lanes;
  const int64_t row_bytes = seqlen * kVecBytes * 6;
  int64_t tiles = batch * groups * p.group_tiles / kWantedTasks;
  if (tiles > kMaxBlockTiles) tiles = kMaxBlockTiles;
  if (tiles > p.group_tiles) tiles = p.group_tiles;
  if (tiles > kRowScratch / row_bytes) tiles = kRowScratch / row_bytes;
  if (tiles < 1) tiles = 1;
  p.group_blocks = (p.group_tiles + tiles - 1) / tiles;
  p.block_tiles = (p.group_tiles + p.group_blocks - 1) / p.group_blocks;
  return p;
}

struct Run {
  int offset, count;  // first step relative to the chunk's lowest time
  bool fresh;         // the sequence index changed: the state starts from zero
};

// The runs of equal sequence index within [t0, t1), in scan order.
int find_runs(const Tensor& seq_idx, int64_t batch, int64_t t0, int64_t t1, int64_t seqlen, bool reverse, Run* runs) {
  const int steps = int(t1 - t0), first = reverse ? steps - 1 : 0, sign = reverse ? -1 : 1;
  if (!seq_idx) {
    runs[0] = {first, steps, false};
    return 1;
  }
  int n = 0;
  for (int i = 0; i < steps; ++i) {
    const int64_t t = t0 + first + sign * i, before = t - sign;
    const bool fresh = before >= 0 && before < seqlen &&
                       load_index(seq_idx.at(batch, t), seq_idx.dtype) != load_index(seq_idx.at(batch, before), seq_idx.dtype);
    if (i == 0 || fresh) runs[n++] = {first + sign * i, 0, fresh};
    ++runs[n - 1].count;
  }
  return n;
}

// What one task works on, and the scratch that forward and backward share.
template <class T>
struct Block {
  static constexpr int W = kLanes<T>;
  const ScanArgs& a;
  const Plan& p;
  int64_t batch, group, block, tile0, tiles;
  bool separate_u, separate_delta;  // the second direction has its own
  T *u[2], *delta[2], *y;           // (tile, time, lane)
  T *A[2], *A2[2], *D[2], *h;       // (tile, state, lane); D (tile, lane); A2 = A log2(e)
  T *B, *C;                         // (time in chunk, state), or constant (tile, state, lane)

  static int64_t bytes(const ScanArgs& a, const Plan& p) {
    const int64_t row = p.block_tiles * p.seqlen * W, states = p.block_tiles * p.dstate * W;
    const int64_t coefficients = kChunk * p.dstate + states;
    return (row * (3 + 2 * (a.directions - 1)) + states * 5 + p.block_tiles * W * 2 + coefficients * 2) * int64_t(sizeof(T)) + 16 * 128;
  }

  Block(const ScanArgs& args, const Plan& plan, int64_t task, Scratch& scratch) : a(args), p(plan) {
    block = task % p.group_blocks;
    group = task / p.group_blocks % p.groups;
    batch = task / p.group_blocks / p.groups;
    tile0 = block * p.block_tiles;
    tiles = p.group_tiles - tile0 < p.block_tiles ? p.group_tiles - tile0 : p.block_tiles;
    separate_u = a.directions == 2 && a.direction[1].u;
    separate_delta = a.directions == 2 && (a.direction[1].delta || a.direction[1].delta_bias);
    const int64_t row = tiles * p.seqlen * W, states = tiles * p.dstate * W;
    for (int d = 0; d < a.directions; ++d) {
      u[d] = d && !separate_u ? u[0] : scratch.take<T>(row);
      delta[d] = d && !separate_delta ? delta[0] : scratch.take<T>(row);
      const bool shared = d && !a.direction[d].A;
      A[d] = shared ? A[0] : scratch.take<T>(states);
      A2[d] = shared ? A2[0] : scratch.take<T>(states);
      D[d] = d && !a.direction[d].D ? D[0] : scratch.take<T>(tiles * W);
    }
    y = scratch.take<T>(row);
    h = scratch.take<T>(states);
    B = scratch.take<T>(kChunk * p.dstate + states);
    C = scratch.take<T>(kChunk * p.dstate + states);
  }

  int64_t channel(int64_t tile) const { return group * p.group_dim + (tile0 + tile) * W; }
  int channels(int64_t tile) const {
    const int64_t left = p.group_dim - (tile0 + tile) * W;
    return int(left < W ? left : W);
  }
  const Tensor& source(Tensor ScanDirection::*member, int d) const {
    return a.direction[d].*member ? a.direction[d].*member : a.direction[0].*member;
  }
  T* row(T* base, int64_t tile, int64_t time) const { return base + (tile * p.seqlen + time) * W; }
  T* state(T* base, int64_t tile, int64_t n) const { return base + (tile * p.dstate + n) * W; }
  // Where a direction's entry state of a chunk is kept between forward and backward.
  T* kept(const Tensor& states, int64_t chunk, int64_t tile) const {
    const int64_t tile_index = (batch * p.groups + group) * p.group_tiles + tile0 + tile;
    return reinterpret_cast<T*>(states.data) + (chunk * p.batch * p.groups * p.group_tiles + tile_index) * p.dstate * W;
  }

  void load_rows() {
    for (int d = 0; d < a.directions; ++d) {
      for (int64_t tile = 0; tile < tiles; ++tile) {
        const int64_t ch = channel(tile);
        const int n = channels(tile);
        if (d == 0 || separate_u) load_tile<T>(plane(source(&ScanDirection::u, d), batch), ch, n, 0, p.seqlen, row(u[d], tile, 0));
        if (d == 0 || separate_delta) load_delta(d, tile);
        if (d == 0 || a.direction[d].D) {
          const Tensor& skip = a.direction[d].D;
          store(D[d] + tile * W, skip ? load_channels<T>(skip, ch, n) : Vec<T>{});
        }
        if (d == 0 || a.direction[d].A) load_A(d, tile);
      }
    }
  }

  void load_delta(int d, int64_t tile) {
    T* to = row(delta[d], tile, 0);
    load_tile<T>(plane(source(&ScanDirection::delta, d), batch), channel(tile), channels(tile), 0, p.seqlen, to);
    const Tensor& bias = source(&ScanDirection::delta_bias, d);
    if (!bias && !a.delta_softplus) return;
    const Vec<T> b = bias ? load_channels<T>(bias, channel(tile), channels(tile)) : Vec<T>{};
    const Mask<T> valid = lane_index<T>() < splat(T(channels(tile)));
    for (int64_t t = 0; t < p.seqlen; ++t) {
      Vec<T> x = load(to + t * W) + b;
      if (a.delta_softplus) x = select(valid, softplus(x), Vec<T>{});
      store(to + t * W, x);
    }
  }

  void load_A(int d, int64_t tile) {
    const Tensor& source_A = a.direction[d].A;
    for (int64_t n = 0; n < p.dstate; ++n) {
      Vec<T> v = {};
      for (int c = 0; c < channels(tile); ++c) v[c] = load_element<T>(source_A.at(channel(tile) + c, n), source_A.dtype);
      store(state(A[d], tile, n), v);
      store(state(A2[d], tile, n), v * T(1.4426950408889634));
    }
  }

  // B or C of a chunk as (time, state); constant ones once as (tile, state, lane).
  void load_coefficient(const Tensor& t, T* to, int64_t t0, int64_t t1) const {
    const Plane from{t.data + (batch * t.stride[0] + group * t.stride[1]) * item_size(t.dtype), t.dtype, t.stride[2], t.stride[3]};
    for (int64_t n = 0; n < p.dstate; n += W) {
      const int count = int(p.dstate - n < W ? p.dstate - n : W);
      alignas(64) T block[kChunk * W];
      load_tile<T>(from, n, count, t0, t1 - t0, block);
      for (int64_t t = 0; t < t1 - t0; ++t) memcpy(to + t * p.dstate + n, block + t * W, size_t(count) * sizeof(T));
    }
  }
  void load_constant(const Tensor& t, T* to) const {
    for (int64_t tile = 0; tile < tiles; ++tile)
      for (int64_t n = 0; n < p.dstate; ++n) {
        Vec<T> v = {};
        for (int c = 0; c < channels(tile); ++c) v[c] = load_element<T>(t.at(channel(tile) + c, n), t.dtype);
        store(state(to, tile, n), v);
      }
  }

  void load_states(const Tensor& from, T* to) const {  // (batch, dim, dstate), or zeros
    for (int64_t tile = 0; tile < tiles; ++tile)
      for (int64_t n = 0; n < p.dstate; ++n) {
        Vec<T> v = {};
        if (from)
          for (int c = 0; c < channels(tile); ++c) v[c] = load_element<T>(from.at(batch, channel(tile) + c, n), from.dtype);
        store(state(to, tile, n), v);
      }
  }
  void store_states(const Tensor& to, const T* from) const {
    for (int64_t tile = 0; tile < tiles; ++tile)
      for (int c = 0; c < channels(tile); ++c)
        for (int64_t n = 0; n < p.dstate; ++n)
          store_element<T>(to.at(batch, channel(tile) + c, n), to.dtype, from[(tile * p.dstate + n) * W + c]);
  }

  // Least and greatest delta of a chunk, lane by lane; `finite` is false if one is infinite or NaN.
  struct Range {
    Vec<T> low, high;
    bool finite;
  };
  Range delta_range(const T* at, int64_t steps) const {
    Range r{load(at), load(at), true};
    Vec<T> probe = {};
    for (int64_t t = 0; t < steps; ++t) {
      const Vec<T> d = load(at + t * W);
      r.low = d < r.low ? d : r.low;
      r.high = d > r.high ? d : r.high;
      probe += d - d;
    }
    for (int i = 0; i < W; ++i) r.finite &= probe[i] == T(0);
    return r;
  }
  // Whether delta * A2 of `count` states stays where the short form of exp2 is exact.
  static bool is_safe(const Range& r, const T* A2, int count) {
    Vec<T> bad = {};
    for (int k = 0; k < count; ++k) {
      const Vec<T> a2 = load(A2 + k * W), x = a2 * r.low, y = a2 * r.high;
      const Vec<T> low = x < y ? x : y, high = x < y ? y : x;
      const Mask<T> good = (low > T(-65536)) & (high < T(kExp2High));
      bad = good ? bad : Vec<T>{} + T(1);
    }
    bool safe = r.finite;
    for (int i = 0; i < W; ++i) safe &= bad[i] == T(0);
    return safe;
  }
};

// Calls f(count as a constant) for the states in passes of kStates, the rest one by one.
template <class F>
inline void for_states(int64_t dstate, F&& f) {
  int64_t n = 0;
  for (; n + kStates <= dstate; n += kStates) f(n, ConstantInt<kStates>{});
  for (; n < dstate; ++n) f(n, ConstantInt<1>{});
}

template <class F>
inline void with_bool(bool b, F&& f) {
  if (b) f(ConstantInt<1>{});
  else f(ConstantInt<0>{});
}

template <class T>
Steps<T> steps_at(const Block<T>& b, int d, int64_t tile, int64_t t0, int64_t n, const Run& run) {
  constexpr int W = kLanes<T>;
  const ScanDirection& dir = b.a.direction[d];
  const bool varies_B = b.source(&ScanDirection::B, d).ndim == 4, varies_C = b.source(&ScanDirection::C, d).ndim == 4;
  const T* B = varies_B ? b.B + run.offset * b.p.dstate + n : b.B + (tile * b.p.dstate + n) * W;
  const T* C = varies_C ? b.C + run.offset * b.p.dstate + n : b.C + (tile * b.p.dstate + n) * W;
  return {run.count, dir.reverse ? -1 : 1, b.row(b.u[d], tile, t0 + run.offset), b.row(b.delta[d], tile, t0 + run.offset), B, C,
          b.p.dstate};
}

template <class T, bool kVariesB, bool kVariesC>
void forward_direction(Block<T>& b, int d) {
  constexpr int W = kLanes<T>;
  const ScanDirection& dir = b.a.direction[d];
  const Plan& p = b.p;
  const Tensor &B = b.source(&ScanDirection::B, d), &C = b.source(&ScanDirection::C, d);
  if (!kVariesB) b.load_constant(B, b.B);
  if (!kVariesC) b.load_constant(C, b.C);
  b.load_states(dir.initial_state, b.h);
  Run runs[kChunk];
  for (int64_t k = 0; k < p.chunks; ++k) {
    const int64_t chunk = dir.reverse ? p.chunks - 1 - k : k, t0 = chunk * kChunk;
    const int64_t t1 = t0 + kChunk < p.seqlen ? t0 + kChunk : p.seqlen;
    if (kVariesB) b.load_coefficient(B, b.B, t0, t1);
    if (kVariesC) b.load_coefficient(C, b.C, t0, t1);
    const int count = find_runs(b.a.seq_idx, b.batch, t0, t1, p.seqlen, dir.reverse, runs);
    for (int64_t tile = 0; tile < b.tiles; ++tile) {
      if (dir.states) memcpy(b.kept(dir.states, chunk, tile), b.state(b.h, tile, 0), size_t(p.dstate) * W * sizeof(T));
      const auto range = b.delta_range(b.row(b.delta[d], tile, t0), t1 - t0);
      for_states(p.dstate, [&](int64_t n, auto states) {
        constexpr int N = decltype(states)::value;
        const T* A2 = b.state(b.A2[d], tile, n);
        T* h = b.state(b.h, tile, n);
        with_bool(Block<T>::is_safe(range, A2, N), [&](auto safe) {
          for (int r = 0; r < count; ++r) {
            if (runs[r].fresh) memset(h, 0, sizeof(T) * W * N);
            scan_steps<T, N, kVariesB, kVariesC, decltype(safe)::value>(steps_at(b, d, tile, t0, n, runs[r]), A2, h,
                                                                        b.row(b.y, tile, t0 + runs[r].offset));
          }
        });
      });
    }
  }
  if (dir.last_state) b.store_states(dir.last_state, b.h);
}

// f(varies_B, varies_C) as compile-time constants.
template <class T, class F>
void with_variation(const Block<T>& b, int d, F&& f) {
  with_bool(b.source(&ScanDirection::B, d).ndim == 4, [&](auto varies_B) {
    with_bool(b.source(&ScanDirection::C, d).ndim == 4, [&](auto varies_C) { f(varies_B, varies_C); });
  });
}

template <class T>
void forward_block(Block<T>& b) {
  constexpr int W = kLanes<T>;
  const Plan& p = b.p;
  b.load_rows();
  for (int64_t tile = 0; tile < b.tiles; ++tile) {  // y starts as the skip connection
    for (int64_t t = 0; t < p.seqlen; ++t) {
      Vec<T> y = {};
      for (int d = 0; d < b.a.directions; ++d) y += load(b.D[d] + tile * W) * load(b.row(b.u[d], tile, t));
      store(b.row(b.y, tile, t), y);
    }
  }
  for (int d = 0; d < b.a.directions; ++d)
    with_variation(b, d, [&](auto varies_B, auto varies_C) {
      forward_direction<T, decltype(varies_B)::value, decltype(varies_C)::value>(b, d);
    });
  const Plane out = plane(b.a.out, b.batch), z = plane(b.a.z, b.batch);
  const T scale = T(b.a.scale);
  alignas(64) T gate[kChunk * W];
  for (int64_t tile = 0; tile < b.tiles; ++tile)
    for (int64_t t0 = 0; t0 < p.seqlen; t0 += kChunk) {
      const int64_t steps = t0 + kChunk < p.seqlen ? kChunk : p.seqlen - t0;
      T* y = b.row(b.y, tile, t0);
      if (z) load_tile<T>(z, b.channel(tile), b.channels(tile), t0, steps, gate);
      for (int64_t i = 0; i < steps; ++i) {
        Vec<T> v = load(y + i * W) * scale;
        if (z) {
          const Vec<T> g = load(gate + i * W);
          v *= g * sigmoid(g);
        }
        store(y + i * W, v);
      }
      store_tile<T>(out, b.channel(tile), b.channels(tile), t0, steps, y);
    }
}

template <class T>
const char* forward(const ScanArgs& a) {
  const Plan p = make_plan<T>(a);
  bool failed = false;
#pragma omp parallel for schedule(dynamic, 1) num_threads(a.threads)
  for (int64_t task = 0; task < p.tasks(); ++task) {
    Scratch scratch(Block<T>::bytes(a, p));
    if (!scratch) {
      failed = true;
      continue;
    }
    Block<T> b(a, p, task, scratch);
    forward_block(b);
  }
  return failed ? "selective_scan: out of memory for scratch" : nullptr;
}

// ---- backward --------------------------------------------------------------------------------------------------------

// Partial sums of every task, added up in a fixed order at the end. Null where a gradient is shared or not wanted.
template <class T>
struct Partials {
  T *dA[2], *dB[2], *dC[2], *dD[2], *dbias[2];
};

template <class T>
struct Gradients {
  static constexpr int W = kLanes<T>;
  T *dy, *du[2], *ddelta[2];                     // (tile, time, lane)
  T *dh, *dA[2], *dB[2], *dC[2], *dD[2], *dbias[2];  // (tile, state, lane); the last two (tile, lane); dB, dC only where constant
  T *dx, *ddecay;                                // (tile, time in chunk, lane)
  T *decays, *states;                            // of one pass, see recompute_steps
  T *pass_dB, *pass_dC, *tile_dB, *tile_dC;      // (time in chunk, state of the pass, lane)
  T *chunk_dB, *chunk_dC;                        // (time in chunk, state)

  static int64_t bytes(const ScanArgs& a, const Plan& p) {
    const int64_t row = p.block_tiles * p.seqlen * W, states = p.block_tiles * p.dstate * W;
    const int64_t pass = kChunk * kStates * W;
    return (row * (3 + 2 * (a.directions - 1)) + states * 7 + p.block_tiles * W * 4 + 2 * p.block_tiles * kChunk * W + pass * 7 +
            2 * kChunk * (p.dstate + W)) * int64_t(sizeof(T)) + 32 * 128;
  }

  Gradients(const Block<T>& b, Scratch& scratch) {
    const Plan& p = b.p;
    const int64_t row = b.tiles * p.seqlen * W, states_size = b.tiles * p.dstate * W, pass = kChunk * kStates * W;
    auto zeros = [&](int64_t count) {
      T* q = scratch.take<T>(count);
      memset(q, 0, size_t(count) * sizeof(T));
      return q;
    };
    dy = scratch.take<T>(row);
    for (int d = 0; d < b.a.directions; ++d) {
      const ScanDirection& dir = b.a.direction[d];
      du[d] = d && !b.separate_u ? du[0] : zeros(row);
      ddelta[d] = d && !b.separate_delta ? ddelta[0] : zeros(row);
      dA[d] = d && !dir.A ? dA[0] : zeros(states_size);
      dB[d] = d && !dir.B ? dB[0] : zeros(states_size);
      dC[d] = d && !dir.C ? dC[0] : zeros(states_size);
      dD[d] = d && !dir.D ? dD[0] : zeros(b.tiles * W);
      dbias[d] = d && !dir.delta_bias ? dbias[0] : zeros(b.tiles * W);
    }
    dh = scratch.take<T>(states_size);
    dx = scratch.take<T>(b.tiles * kChunk * W);
    ddecay = scratch.take<T>(b.tiles * kChunk * W);
    decays = scratch.take<T>(pass);
    states = scratch.take<T>(2 * pass);  // every run has a state more than it has steps
    pass_dB = scratch.take<T>(pass);
    pass_dC = scratch.take<T>(pass);
    tile_dB = scratch.take<T>(pass);
    tile_dC = scratch.take<T>(pass);
    chunk_dB = scratch.take<T>(kChunk * (p.dstate + W));
    chunk_dC = scratch.take<T>(kChunk * (p.dstate + W));
  }
};

// Sums (row, lane) over the lanes into out[row / kCount * dstate + row % kCount]; kCount states a step.
template <class T, int kCount>
void reduce_lanes(T* rows, int steps, int64_t dstate, T* out) {
  constexpr int W = kLanes<T>;
  for (int i = 0; i < steps * kCount; i += W) {
    Vec<T> v[W];
    for (int j = 0; j < W; ++j) v[j] = i + j < steps * kCount ? load(rows + (i + j) * W) : Vec<T>{};
    const Vec<T> sums = sum_lanes<T>(v);
    for (int j = 0; j < W && i + j < steps * kCount; ++j) out[(i + j) / kCount * dstate + (i + j) % kCount] = sums[j];
  }
}

// Adds the valid lanes only: in the others a NaN or infinity of B or C may have met a zero.
template <class T>
void add_valid_lanes(T* to, const T* from, int64_t count, int channels) {
  const Mask<T> valid = lane_index<T>() < splat(T(channels));
  for (int64_t i = 0; i < count; ++i, to += kLanes<T>, from += kLanes<T>) store(to, load(to) + select(valid, load(from), Vec<T>{}));
}

template <class T, bool kVariesB, bool kVariesC>
void backward_direction(Block<T>& b, Gradients<T>& g, int d, const Partials<T>& partials) {
  constexpr int W = kLanes<T>;
  const ScanDirection& dir = b.a.direction[d];
  const Plan& p = b.p;
  const Tensor &B = b.source(&ScanDirection::B, d), &C = b.source(&ScanDirection::C, d);
  if (!kVariesB) b.load_constant(B, b.B);
  if (!kVariesC) b.load_constant(C, b.C);
  b.load_states(dir.dlast_state, g.dh);
  const bool need_y = b.a.dz || b.a.out;
  Run runs[kChunk];
  for (int64_t k = p.chunks - 1; k >= 0; --k) {
    const int64_t chunk = dir.reverse ? p.chunks - 1 - k : k, t0 = chunk * kChunk;
    const int64_t t1 = t0 + kChunk < p.seqlen ? t0 + kChunk : p.seqlen;
    const int steps = int(t1 - t0);
    if (kVariesB) b.load_coefficient(B, b.B, t0, t1);
    if (kVariesC) b.load_coefficient(C, b.C, t0, t1);
    const int count = find_runs(b.a.seq_idx, b.batch, t0, t1, p.seqlen, dir.reverse, runs);
    memset(g.dx, 0, sizeof(T) * size_t(b.tiles) * kChunk * W);
    memset(g.ddecay, 0, sizeof(T) * size_t(b.tiles) * kChunk * W);
    for_states(p.dstate, [&](int64_t n, auto states_count) {
      constexpr int N = decltype(states_count)::value;
      const size_t pass_bytes = sizeof(T) * size_t(steps) * N * W;
      if (kVariesB) memset(g.pass_dB, 0, pass_bytes);
      if (kVariesC) memset(g.pass_dC, 0, pass_bytes);
      for (int64_t tile = 0; tile < b.tiles; ++tile) {
        const bool whole = b.channels(tile) == W;
        T* dB = kVariesB ? (whole ? g.pass_dB : g.tile_dB) : b.state(g.dB[d], tile, n);
        T* dC = kVariesC ? (whole ? g.pass_dC : g.tile_dC) : b.state(g.dC[d], tile, n);
        if (kVariesB && !whole) memset(dB, 0, pass_bytes);
        if (kVariesC && !whole) memset(dC, 0, pass_bytes);
        const T* A2 = b.state(b.A2[d], tile, n);
        alignas(64) T h[N * W];
        memcpy(h, b.kept(dir.states, chunk, tile) + n * W, sizeof h);
        // Run r's decays start at its first step in scan order, its states r slots later.
        int begin[kChunk];
        const auto range = b.delta_range(b.row(b.delta[d], tile, t0), steps);
        with_bool(Block<T>::is_safe(range, A2, N), [&](auto safe) {
          with_bool(need_y, [&](auto with_y) {
            int done = 0;
            for (int r = 0; r < count; ++r) {
              if (runs[r].fresh) memset(h, 0, sizeof h);
              begin[r] = done;
              recompute_steps<T, N, kVariesB, kVariesC, decltype(safe)::value, decltype(with_y)::value>(
                  steps_at(b, d, tile, t0, n, runs[r]), A2, h, b.row(b.y, tile, t0 + runs[r].offset), g.decays + done * N * W,
                  g.states + (done + r) * N * W);
              done += runs[r].count;
            }
          });
        });
        for (int r = count - 1; r >= 0; --r) {
          const int64_t at = (tile * kChunk + runs[r].offset) * W;
          sweep_steps<T, N, kVariesB, kVariesC>(
              steps_at(b, d, tile, t0, n, runs[r]),
              {b.row(g.dy, tile, t0 + runs[r].offset), g.dx + at, g.ddecay + at, g.decays + begin[r] * N * W,
               g.states + (begin[r] + r) * N * W, kVariesB ? dB + begin[r] * N * W : dB, kVariesC ? dC + begin[r] * N * W : dC,
               b.state(g.dh, tile, n), b.state(g.dA[d], tile, n)},
              b.state(b.A[d], tile, n));
          if (runs[r].fresh) memset(b.state(g.dh, tile, n), 0, sizeof(T) * N * W);
        }
        if (kVariesB && !whole) add_valid_lanes(g.pass_dB, dB, int64_t(steps) * N, b.channels(tile));
        if (kVariesC && !whole) add_valid_lanes(g.pass_dC, dC, int64_t(steps) * N, b.channels(tile));
      }
      if (kVariesB) reduce_lanes<T, N>(g.pass_dB, steps, p.dstate, g.chunk_dB + n);
      if (kVariesC) reduce_lanes<T, N>(g.pass_dC, steps, p.dstate, g.chunk_dC + n);
    });
    // chunk_dB is in scan order: step i belongs to time t0 + i, or t1 - 1 - i in the reverse direction.
    for (int i = 0; i < steps; ++i) {
      const int64_t t = dir.reverse ? t1 - 1 - i : t0 + i;
      const int64_t at = (((b.block * p.batch + b.batch) * p.groups + b.group) * p.seqlen + t) * p.dstate;
      for (int64_t n = 0; n < p.dstate; ++n) {
        if (kVariesB && partials.dB[d]) partials.dB[d][at + n] += g.chunk_dB[i * p.dstate + n];
        if (kVariesC && partials.dC[d]) partials.dC[d][at + n] += g.chunk_dC[i * p.dstate + n];
      }
    }
    for (int64_t tile = 0; tile < b.tiles; ++tile) {
      const Vec<T> skip = load(b.D[d] + tile * W);
      Vec<T> dD = load(g.dD[d] + tile * W);
      for (int i = 0; i < steps; ++i) {
        const int64_t at = (tile * kChunk + i) * W;
        const T *u = b.row(b.u[d], tile, t0 + i), *delta = b.row(b.delta[d], tile, t0 + i), *dy = b.row(g.dy, tile, t0 + i);
        T *du = b.row(g.du[d], tile, t0 + i), *ddelta = b.row(g.ddelta[d], tile, t0 + i);
        store(du, load(du) + (load(delta) * load(g.dx + at) + skip * load(dy)));
        store(ddelta, load(ddelta) + (load(u) * load(g.dx + at) + load(g.ddecay + at)));
        dD += load(u) * load(dy);
      }
      store(g.dD[d] + tile * W, dD);
    }
  }
  if (dir.dinitial_state) b.store_states(dir.dinitial_state, g.dh);
}

// dy = scale * dout * silu(z), and y's skip part where the gradient of z needs y.
template <class T>
void load_output_gradient(Block<T>& b, Gradients<T>& g) {
  constexpr int W = kLanes<T>;
  const Plane dout = plane(b.a.dout, b.batch), z = plane(b.a.z, b.batch);
  const T scale = T(b.a.scale);
  alignas(64) T gate[kChunk * W];
  for (int64_t tile = 0; tile < b.tiles; ++tile)
    for (int64_t t0 = 0; t0 < b.p.seqlen; t0 += kChunk) {
      const int64_t steps = t0 + kChunk < b.p.seqlen ? kChunk : b.p.seqlen - t0;
      T* dy = b.row(g.dy, tile, t0);
      load_tile<T>(dout, b.channel(tile), b.channels(tile), t0, steps, dy);
      if (z) load_tile<T>(z, b.channel(tile), b.channels(tile), t0, steps, gate);
      for (int64_t i = 0; i < steps; ++i) {
        Vec<T> v = load(dy + i * W) * scale;
        if (z) {
          const Vec<T> x = load(gate + i * W);
          v *= x * sigmoid(x);
        }
        store(dy + i * W, v);
        if (!b.a.dz && !b.a.out) continue;
        Vec<T> y = {};
        for (int d = 0; d < b.a.directions; ++d) y += load(b.D[d] + tile * W) * load(b.row(b.u[d], tile, t0 + i));
        store(b.row(b.y, tile, t0 + i), y);
      }
    }
}

// From the recomputed y: the gradient of z, and the output once more for whoever did not keep it.
template <class T>
void store_gate(Block<T>& b) {
  constexpr int W = kLanes<T>;
  const Plane dout = plane(b.a.dout, b.batch), z = plane(b.a.z, b.batch), dz = plane(b.a.dz, b.batch), out = plane(b.a.out, b.batch);
  const T scale = T(b.a.scale);
  alignas(64) T gate[kChunk * W], grad[kChunk * W];
  for (int64_t tile = 0; tile < b.tiles; ++tile)
    for (int64_t t0 = 0; t0 < b.p.seqlen; t0 += kChunk) {
      const int64_t steps = t0 + kChunk < b.p.seqlen ? kChunk : b.p.seqlen - t0, ch = b.channel(tile);
      const int n = b.channels(tile);
      T* y = b.row(b.y, tile, t0);
      if (dz) load_tile<T>(dout, ch, n, t0, steps, grad);
      if (z) load_tile<T>(z, ch, n, t0, steps, gate);
      for (int64_t i = 0; i < steps; ++i) {
        Vec<T> v = load(y + i * W) * scale;
        if (z) {
          const Vec<T> x = load(gate + i * W), s = sigmoid(x);
          if (dz) store(grad + i * W, load(grad + i * W) * v * (s * (1 + x * (1 - s))));
          v *= x * s;
        }
        store(y + i * W, v);
      }
      if (dz) store_tile<T>(dz, ch, n, t0, steps, grad);
      if (out) store_tile<T>(out, ch, n, t0, steps, y);
    }
}

// Through bias and softplus back to the delta that was passed in; then out.
template <class T>
void store_input_gradients(Block<T>& b, Gradients<T>& g) {
  constexpr int W = kLanes<T>;
  const int64_t L = b.p.seqlen;
  for (int d = 0; d < b.a.directions; ++d) {
    if (d && !b.separate_delta) continue;
    const Plane raw = plane(b.source(&ScanDirection::delta, d), b.batch);
    const Tensor& bias = b.source(&ScanDirection::delta_bias, d);
    alignas(64) T before[kChunk * W];
    for (int64_t tile = 0; tile < b.tiles; ++tile) {
      const Vec<T> shift = bias ? load_channels<T>(bias, b.channel(tile), b.channels(tile)) : Vec<T>{};
      Vec<T> dbias = load(g.dbias[d] + tile * W);
      for (int64_t t0 = 0; t0 < L; t0 += kChunk) {
        const int64_t steps = t0 + kChunk < L ? kChunk : L - t0;
        if (b.a.delta_softplus) load_tile<T>(raw, b.channel(tile), b.channels(tile), t0, steps, before);
        for (int64_t i = 0; i < steps; ++i) {
          T* at = b.row(g.ddelta[d], tile, t0 + i);
          Vec<T> v = load(at);
          if (b.a.delta_softplus) {
            const Vec<T> x = load(before + i * W) + shift;
            v = select(x > 20, v, v * sigmoid(x));
          }
          store(at, v);
          dbias += v;
        }
      }
      store(g.dbias[d] + tile * W, dbias);
    }
  }
  if (b.separate_delta && !b.a.direction[1].delta)  // one delta, two biases
    for (int64_t i = 0; i < b.tiles * L * W; i += W) store(g.ddelta[0] + i, load(g.ddelta[0] + i) + load(g.ddelta[1] + i));
  for (int d = 0; d < b.a.directions; ++d)
    for (int64_t tile = 0; tile < b.tiles; ++tile) {
      const ScanDirection& dir = b.a.direction[d];
      if (dir.du) store_tile<T>(plane(dir.du, b.batch), b.channel(tile), b.channels(tile), 0, L, b.row(g.du[d], tile, 0));
      if (dir.ddelta) store_tile<T>(plane(dir.ddelta, b.batch), b.channel(tile), b.channels(tile), 0, L, b.row(g.ddelta[d], tile, 0));
    }
}

// (tile, state, lane) -> (batch, dim, count): this task's part of a gradient that is summed over the batch.
template <class T>
void store_partial(const Block<T>& b, const T* from, int64_t count, T* to) {
  if (!to) return;
  for (int64_t tile = 0; tile < b.tiles; ++tile)
    for (int c = 0; c < b.channels(tile); ++c)
      for (int64_t n = 0; n < count; ++n)
        to[(b.batch * b.p.dim + b.channel(tile) + c) * count + n] = from[(tile * count + n) * kLanes<T> + c];
}

template <class T>
void backward_block(Block<T>& b, Gradients<T>& g, const Partials<T>& partials) {
  b.load_rows();
  load_output_gradient(b, g);
  for (int d = 0; d < b.a.directions; ++d)
    with_variation(b, d, [&](auto varies_B, auto varies_C) {
      backward_direction<T, decltype(varies_B)::value, decltype(varies_C)::value>(b, g, d, partials);
    });
  if (b.a.dz || b.a.out) store_gate(b);
  store_input_gradients(b, g);
  for (int d = 0; d < b.a.directions; ++d) {
    const ScanDirection& dir = b.a.direction[d];
    if (dir.dA) store_partial(b, g.dA[d], b.p.dstate, partials.dA[d]);
    if (dir.dB && dir.B.ndim == 2) store_partial(b, g.dB[d], b.p.dstate, partials.dB[d]);
    if (dir.dC && dir.C.ndim == 2) store_partial(b, g.dC[d], b.p.dstate, partials.dC[d]);
    if (dir.dD) store_partial(b, g.dD[d], 1, partials.dD[d]);
    if (dir.ddelta_bias) store_partial(b, g.dbias[d], 1, partials.dbias[d]);
  }
}

// One gradient's partial sums: (parts, size), zeroed, summed over `parts` in order into the contiguous output.
template <class T>
class PartialSum {
 public:
  PartialSum() = default;
  ~PartialSum() { free(data_); }
  PartialSum(const PartialSum&) = delete;

  bool open(const Tensor& out, int64_t parts, int64_t size) {
    if (!out) return true;
    out_ = reinterpret_cast<T*>(out.data), parts_ = parts, size_ = size;
    data_ = static_cast<T*>(calloc(size_t(parts * size) + 1, sizeof(T)));
    return data_ != nullptr;
  }
  T* data() const { return data_; }
  void close(int threads) const {
    if (!out_) return;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t i = 0; i < size_; ++i) {
      T sum = data_[i];
      for (int64_t k = 1; k < parts_; ++k) sum += data_[k * size_ + i];
      out_[i] = sum;
    }
  }

 private:
  T *data_ = nullptr, *out_ = nullptr;
  int64_t parts_ = 0, size_ = 0;
};

template <class T>
const char* backward(const ScanArgs& a) {
  const Plan p = make_plan<T>(a);
  PartialSum<T> sums[2][5];
  Partials<T> partials{};
  bool failed = false;
  for (int d = 0; d < a.directions; ++d) {
    const ScanDirection& dir = a.direction[d];
    const int64_t rows = p.batch * p.groups * p.seqlen * p.dstate, states = p.dim * p.dstate;
    PartialSum<T>* s = sums[d];
    failed |= !s[0].open(dir.dA, p.batch, states) | !s[3].open(dir.dD, p.batch, p.dim) | !s[4].open(dir.ddelta_bias, p.batch, p.dim);
    failed |= !(dir.B.ndim == 4 ? s[1].open(dir.dB, p.group_blocks, rows) : s[1].open(dir.dB, p.batch, states));
    failed |= !(dir.C.ndim == 4 ? s[2].open(dir.dC, p.group_blocks, rows) : s[2].open(dir.dC, p.batch, states));
    partials.dA[d] = s[0].data();
    partials.dB[d] = d && !dir.B ? partials.dB[0] : s[1].data();
    partials.dC[d] = d && !dir.C ? partials.dC[0] : s[2].data();
    partials.dD[d] = s[3].data();
    partials.dbias[d] = s[4].data();
  }
  if (!failed) {
#pragma omp parallel for schedule(dynamic, 1) num_threads(a.threads)
    for (int64_t task = 0; task < p.tasks(); ++task) {
      Scratch scratch(Block<T>::bytes(a, p) + Gradients<T>::bytes(a, p));
      if (!scratch) {
        failed = true;
        continue;
      }
      Block<T> b(a, p, task, scratch);
      Gradients<T> g(b, scratch);
      backward_block(b, g, partials);
    }
  }
  if (failed) return "selective_scan backward: out of memory for scratch";
  for (auto& direction : sums)
    for (auto& sum : direction) sum.close(a.threads);
  return nullptr;
}

}  // namespace

const char* scan_forward(const ScanArgs& a) { return a.use_double ? forward<double>(a) : forward<float>(a); }
const char* scan_backward(const ScanArgs& a) { return a.use_double ? backward<double>(a) : backward<float>(a); }

}  // namespace PIXELBYTES_ISA
}  // namespace pixelbytes
