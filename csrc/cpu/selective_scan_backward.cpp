// selective_scan and bidirectional_selective_scan, gradients.
//
// Tasks as in the forward. Chunks are walked against the scan: the states of a chunk are recomputed from its stored entry state, then
// swept from its last step to its first. dB and dC are summed over the lanes step by step, and over the tiles of a block; what is
// summed over blocks or batch rows goes to partial sums, added up in task order. No atomics, and nothing that depends on threads.
#include "cpu/partial_sum.h"
#include "cpu/scan_block.h"

namespace pixelbytes {
namespace PIXELBYTES_ISA {
namespace {

// Partial sums of every task; null where a gradient is not wanted.
template <class T>
struct Partials {
  T *dA[2], *dB[2], *dC[2], *dD[2], *dbias[2];
};

template <class T>
struct Gradients {
  static constexpr int W = kLanes<T>;
  Rows<T> dy, du, ddelta;                            // du, ddelta wait here for the second direction where it shares u, delta
  Rows<T> gate, dgate, slope[2];                     // factors of out and dz, derivative of softplus; each where it is needed
  T *dh, *dA[2], *dB[2], *dC[2], *dD[2], *dbias[2];  // (tile, state, lane); the last two (tile, lane); dB, dC where constant
  T *dx, *ddecay;                                    // (tile, time in chunk, lane)
  T *decays, *states;                                // of one pass, see recompute_steps
  T* sums;                                           // (pass, step, kMaxVectors * lane), see Sweep

  static constexpr int64_t kMaxVectors = StepSums<T, kStates, true, true>::kVectors;
  static int64_t sums_of(const Plan& p) { return passes_of<kStates>(p.dstate) * kChunk * kMaxVectors * W; }

  static int64_t bytes(const ScanArgs& a, const Plan& p) {
    const int64_t row = Rows<T>::size(p.block_tiles, a.directions == 2 && p.seqlen > kChunk ? p.seqlen : kChunk);
    const int64_t states = p.block_tiles * p.dstate * W, pass = kChunk * kStates * W;
    return (row * 7 + states * 7 + p.block_tiles * W * 4 + 2 * p.block_tiles * kChunk * W + pass * 3 + sums_of(p)) *
               int64_t(sizeof(T)) + 32 * 128;
  }

  Gradients(const ScanTask<T>& k, Scratch& scratch) {
    const Plan& p = k.p;
    const int64_t states_size = k.tiles * p.dstate * W, pass = kChunk * kStates * W;
    auto zeros = [&](int64_t count) {
      T* q = scratch.take<T>(count);
      memset(q, 0, size_t(count) * sizeof(T));
      return q;
    };
    const bool two = k.a.directions == 2;
    dy.open(scratch, k.tiles, two, p.seqlen);
    if (two && !k.separate_u) du.open(scratch, k.tiles, true, p.seqlen);
    if (two && !k.separate_delta) ddelta.open(scratch, k.tiles, true, p.seqlen);
    if (k.a.z && k.a.out) gate.open(scratch, k.tiles, two, p.seqlen);
    if (k.a.z && k.a.dz) dgate.open(scratch, k.tiles, two, p.seqlen);
    for (int d = 0; d < k.a.directions; ++d) {
      const ScanDirection& dir = k.a.direction[d];
      if (k.a.delta_softplus && (d == 0 || k.separate_delta)) slope[d].open(scratch, k.tiles, two && !k.separate_delta, p.seqlen);
      dA[d] = d && !dir.A ? dA[0] : zeros(states_size);
      dB[d] = d && !dir.B ? dB[0] : zeros(states_size);
      dC[d] = d && !dir.C ? dC[0] : zeros(states_size);
      dD[d] = d && !dir.D ? dD[0] : zeros(k.tiles * W);
      dbias[d] = d && !dir.delta_bias ? dbias[0] : zeros(k.tiles * W);
    }
    dh = scratch.take<T>(states_size);
    dx = scratch.take<T>(k.tiles * kChunk * W);
    ddecay = scratch.take<T>(k.tiles * kChunk * W);
    decays = scratch.take<T>(pass);
    states = scratch.take<T>(2 * pass);  // every run has a state more than it has steps
    sums = scratch.take<T>(sums_of(p));
  }
  void begin_chunk(int64_t t0) {
    Rows<T>* all[] = {&dy, &du, &ddelta, &gate, &dgate, &slope[0], &slope[1]};
    for (Rows<T>* rows : all) rows->begin_chunk(t0);
  }
  Block<T> block(T* chunk_rows, int64_t tiles) const { return {chunk_rows, kChunk * W, int(tiles)}; }
  Rows<T>& rows_slope(const ScanTask<T>& k, int d) { return slope[k.separate_delta ? d : 0]; }
};

// dy = scale * dout * silu(z), and what y will be multiplied with: dgate for dz, gate for out. Formed once, for both directions.
template <class T>
void begin_dy(ScanTask<T>& k, Gradients<T>& g, int64_t t0, int64_t t1) {
  constexpr int W = kLanes<T>;
  const Tiles all = k.all();
  const Block<T> zs = k.staging(all);
  const T scale = T(k.a.scale);
  k.load_rows(k.a.dout, all, t0, t1, g.dy.block(all, t0));
  if (k.a.z) k.load_rows(k.a.z, all, t0, t1, zs);
  for (int64_t tile = 0; tile < k.tiles; ++tile) {
    T *dy = g.dy.at(tile, t0), *z = zs.data + tile * zs.pitch;
    T *gate = g.gate.data ? g.gate.at(tile, t0) : nullptr, *dgate = g.dgate.data ? g.dgate.at(tile, t0) : nullptr;
    for (int64_t i = 0; i < (t1 - t0) * W; i += W) {
      const Vec<T> v = load(dy + i) * scale;
      if (!k.a.z) {
        store(dy + i, v);
        continue;
      }
      const Vec<T> x = load(z + i), s = sigmoid(x), silu = x * s;
      store(dy + i, v * silu);
      if (dgate) store(dgate + i, v * (s + silu * (1 - s)));
      if (gate) store(gate + i, silu * scale);
    }
  }
}

// From the recomputed y: the gradient of z, and the output once more for whoever did not keep it.
template <class T>
void store_gate(ScanTask<T>& k, Gradients<T>& g, int64_t t0, int64_t t1) {
  constexpr int W = kLanes<T>;
  const Tiles all = k.all();
  const Block<T> products = k.staging(all);
  auto write = [&](const Tensor& to, const Rows<T>& factors, T factor) {
    if (!to) return;
    for (int64_t tile = 0; tile < k.tiles; ++tile) {
      const T *y = k.y.at(tile, t0), *by = factors.data ? factors.at(tile, t0) : nullptr;
      T* product = products.data + tile * products.pitch;
      for (int64_t i = 0; i < (t1 - t0) * W; i += W) store(product + i, load(y + i) * (by ? load(by + i) : splat(factor)));
    }
    k.store_rows(to, all, t0, t1, products);
  };
  write(k.a.dz, g.dgate, T(1));
  write(k.a.out, g.gate, T(k.a.scale));
}

// One tile over one chunk, states n, n + 1, ... (kCount of them): recompute, then sweep.
template <class T, bool kVariesB, bool kVariesC, int kCount>
void backward_pass(ScanTask<T>& k, Gradients<T>& g, int d, int64_t chunk, int64_t t0, int64_t tile, int64_t n, const Steps<T>& steps, T* sums,
                   const Run* runs, int count, bool is_safe_tile, AheadList& ahead) {
  constexpr int W = kLanes<T>, kRow = kCount * W, kSums = StepSums<T, kCount, kVariesB, kVariesC>::kVectors * W;
  const T *A = k.state(k.A[d], tile, n), *A2 = k.state(k.A2[d], tile, n);
  T *dh = k.state(g.dh, tile, n), *dA = k.state(g.dA[d], tile, n);
  const T* kept = k.kept(k.a.direction[d].states, chunk, tile) + n * W;  // later runs start from zero
  Ahead lines = ahead.next(1);
  with_safe<T>(is_safe_tile, [&](auto safe) {
    with_bool(k.a.dz || k.a.out, [&](auto with_y) {
      for (int r = 0; r < count; ++r) {  // decays of run r start at its first step, its states r slots later
        const int begin = runs[r].begin;
        recompute_steps<T, kCount, kVariesB, kVariesC, decltype(safe)::value, decltype(with_y)::value>(
            steps.template of<kVariesB, kVariesC>(runs[r], n, lines), A, A2, runs[r].fresh ? nullptr : kept, k.y.at(tile, t0 + runs[r].offset),
            g.decays + begin * kRow, g.states + (begin + r) * kRow);
      }
    });
  });
  lines = ahead.next(1);
  with_bool(k.valid(tile) == W, [&](auto whole) {
    for (int r = count - 1; r >= 0; --r) {
      const int begin = runs[r].begin;
      const int64_t at = (tile * kChunk + runs[r].offset) * W;
      const Sweep<T> sweep{g.dy.at(tile, t0 + runs[r].offset), g.dx + at, g.ddecay + at, g.decays + begin * kRow,
                           g.states + (begin + r) * kRow, sums + begin * kSums, k.state(g.dB[d], tile, n), k.state(g.dC[d], tile, n), dh, dA,
                           k.valid(tile), n == 0};
      sweep_steps<T, kCount, kVariesB, kVariesC, decltype(whole)::value>(steps.template of<kVariesB, kVariesC>(runs[r], n, lines), sweep, A);
      if (runs[r].fresh) memset(dh, 0, sizeof(T) * kRow);
    }
  });
}

template <int kCount, class T>
inline void put(T* to, const T* values, bool add) {
  if (!add) memcpy(to, values, kCount * sizeof(T));
  else
    for (int j = 0; j < kCount; ++j) to[j] += values[j];
}

// The sums of a chunk, in scan order, to the task's partial sums of dB and dC in order of time; added to what the first direction left where
// they are of both.
template <class T, bool kVariesB, bool kVariesC>
void add_sums(const ScanTask<T>& k, const Gradients<T>& g, int d, int64_t t0, int64_t t1, T* dB, T* dC) {
  constexpr int W = kLanes<T>;
  const ScanDirection& dir = k.a.direction[d];
  const int64_t first = k.sums_at(dir.reverse ? t1 - 1 : t0), by = dir.reverse ? -k.p.dstate : k.p.dstate;
  const bool add_B = d && !dir.B, add_C = d && !dir.C;
  const T* pass = g.sums;
  for_states<kStates>(k.p.dstate, [&](int64_t n, auto states) {
    constexpr int N = decltype(states)::value;
    using Sums = StepSums<T, N, kVariesB, kVariesC>;
    if constexpr (Sums::kValues > 0) {
      T *to_B = kVariesB && dB ? dB + first + n : nullptr, *to_C = kVariesC && dC ? dC + first + n : nullptr;
      for (int64_t i = 0; i < t1 - t0; ++i) {
        alignas(64) T values[Sums::kVectors * W];
        for (int v = 0; v < Sums::kVectors; ++v) store(values + v * W, sum_groups<T, Sums::kValues>(load(pass + (i * Sums::kVectors + v) * W)));
        if (to_C) {
          put<N>(to_C, values, add_C);
          to_C += by;
        }
        if (to_B) {
          put<N>(to_B, values + kVariesC * N, add_B);
          to_B += by;
        }
      }
    }
    pass += kChunk * Gradients<T>::kMaxVectors * W;
  });
}

// From dx and ddecay of a chunk to du, and ddelta back through softplus and bias; written out once both directions are in.
template <class T>
void store_input_gradients(ScanTask<T>& k, Gradients<T>& g, int d, int64_t t0, int64_t t1) {
  constexpr int W = kLanes<T>;
  const bool last = d == k.a.directions - 1, whole_u = last || k.separate_u, whole_delta = last || k.separate_delta;
  const bool add_u = d && !k.separate_u, add_delta = d && !k.separate_delta;
  for (int64_t tile = 0; tile < k.tiles; ++tile) {
    const Vec<T> skip = load(k.D[d] + tile * W);
    Vec<T> dD = load(g.dD[d] + tile * W), dbias = load(g.dbias[d] + tile * W);
    const T *u = k.rows_u(d).at(tile, t0), *delta = k.rows_delta(d).at(tile, t0), *dy = g.dy.at(tile, t0);
    const T* slope = k.a.delta_softplus ? g.rows_slope(k, d).at(tile, t0) : nullptr;
    T *dx = g.dx + tile * kChunk * W, *ddecay = g.ddecay + tile * kChunk * W;
    for (int64_t i = 0; i < (t1 - t0) * W; i += W) {
      const Vec<T> gx = load(dx + i), gy = load(dy + i), x = load(u + i);
      Vec<T> du = load(delta + i) * gx + skip * gy, ddelta = x * gx + load(ddecay + i);
      dD += x * gy;
      if (add_u) du += load(g.du.at(tile, t0) + i);
      if (add_delta) ddelta += load(g.ddelta.at(tile, t0) + i);
      if (!whole_u) store(g.du.at(tile, t0) + i, du);
      if (!whole_delta) {
        store(g.ddelta.at(tile, t0) + i, ddelta);
      } else {
        if (slope) ddelta *= load(slope + i);
        dbias += ddelta;
      }
      store(dx + i, du);
      store(ddecay + i, ddelta);
    }
    store(g.dD[d] + tile * W, dD);
    store(g.dbias[d] + tile * W, dbias);
  }
  const Tensor &du = k.a.direction[k.separate_u ? d : 0].du, &ddelta = k.a.direction[k.separate_delta ? d : 0].ddelta;
  if (whole_u && du) k.store_rows(du, k.all(), t0, t1, g.block(g.dx, k.tiles));
  if (whole_delta && ddelta) k.store_rows(ddelta, k.all(), t0, t1, g.block(g.ddecay, k.tiles));
}

template <class T, bool kVariesB, bool kVariesC>
void backward_direction(ScanTask<T>& k, Gradients<T>& g, int d, const Partials<T>& partials) {
  const ScanDirection& dir = k.a.direction[d];
  const Plan& p = k.p;
  const bool last = d == k.a.directions - 1, with_y = k.a.dz || k.a.out;
  k.load_constants(d);
  k.load_states(dir.dlast_state, g.dh);
  Run runs[kChunk];
  for (int64_t i = p.chunks - 1; i >= 0; --i) {
    const int64_t chunk = dir.reverse ? p.chunks - 1 - i : i, t0 = chunk * kChunk, t1 = p.end_of(chunk);
    k.begin_chunk(d, t0);
    g.begin_chunk(t0);
    k.load_inputs(d, k.all(), t0, t1, k.a.delta_softplus ? &g.rows_slope(k, d) : nullptr);
    if (with_y) k.begin_y(d, k.all(), t0, t1);
    if (d == 0) begin_dy(k, g, t0, t1);
    k.load_coefficients(d, t0, t1);
    AheadList ahead;
    auto output = [&](const Tensor& t) { k.add_output_ahead(ahead, t, k.all(), {k, d, chunk}); };
    const Soon soon = k.following(d, dir.reverse ? chunk + 1 : chunk - 1);
    k.add_inputs_ahead(ahead, k.all(), soon);
    if (soon.direction == 0) k.add_ahead(ahead, k.a.dout, k.all(), soon), k.add_ahead(ahead, k.a.z, k.all(), soon);
    if (last || k.separate_u) output(k.a.direction[k.separate_u ? d : 0].du);
    if (last || k.separate_delta) output(k.a.direction[k.separate_delta ? d : 0].ddelta);
    if (last) output(k.a.dz), output(k.a.out);
    if (kVariesB) k.add_sums_ahead(ahead, partials.dB[d], t0, t1);
    if (kVariesC) k.add_sums_ahead(ahead, partials.dC[d], t0, t1);
    k.add_coefficients_ahead(ahead, soon);
    ahead.deal(k.tiles * passes_of<kStates>(p.dstate) * 2);
    const int count = find_runs(k.a.seq_idx, k.batch, t0, t1, p.seqlen, dir.reverse, runs);
    if (kVariesB || kVariesC) memset(g.sums, 0, size_t(g.sums_of(p)) * sizeof(T));
    for (int64_t tile = 0; tile < k.tiles; ++tile) {
      const bool safe = is_safe(k.rows_delta(d).at(tile, t0), t1 - t0, k.steepest[d] + tile * kLanes<T>);
      const Steps<T> steps = k.template steps<kVariesB, kVariesC>(d, tile, t0);
      T* sums = g.sums;
      for_states<kStates>(p.dstate, [&](int64_t n, auto states) {
        backward_pass<T, kVariesB, kVariesC, decltype(states)::value>(k, g, d, chunk, t0, tile, n, steps, sums, runs, count, safe, ahead);
        sums += kChunk * g.kMaxVectors * kLanes<T>;
      });
    }
    if (kVariesB || kVariesC) add_sums<T, kVariesB, kVariesC>(k, g, d, t0, t1, partials.dB[d], partials.dC[d]);
    store_input_gradients(k, g, d, t0, t1);
    if (last && with_y) store_gate(k, g, t0, t1);
  }
  if (dir.dinitial_state) k.store_states(dir.dinitial_state, g.dh);
}

// (tile, count, lane) -> (batch, dim, count): this task's part of a gradient that is summed over the batch.
template <class T>
void store_partial(const ScanTask<T>& k, T* from, int64_t count, T* to) {
  const Plane rows{reinterpret_cast<char*>(to), sizeof(T) == 8 ? DType::f64 : DType::f32, count, 1};
  store_block<T>(rows, k.batch * k.p.dim + k.channel, k.channels, 0, count, {from, count * kLanes<T>, int(k.tiles)});
}

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
    for (int64_t i = 0; i < p.tasks(); ++i) {
      const FlushDenormals flush;
      Scratch scratch(ScanTask<T>::bytes(a, p) + Gradients<T>::bytes(a, p));
      if (!scratch) {
        failed = true;
        continue;
      }
      ScanTask<T> task(a, p, i, scratch);
      Gradients<T> g(task, scratch);
      for (int d = 0; d < a.directions; ++d)
        with_variation(task, d, [&](auto varies_B, auto varies_C) {
          backward_direction<T, decltype(varies_B)::value, decltype(varies_C)::value>(task, g, d, partials);
        });
      for (int d = 0; d < a.directions; ++d) {
        const ScanDirection& dir = a.direction[d];
        if (dir.dA) store_partial(task, g.dA[d], p.dstate, partials.dA[d]);
        if (dir.dB && dir.B.ndim == 2) store_partial(task, g.dB[d], p.dstate, partials.dB[d]);
        if (dir.dC && dir.C.ndim == 2) store_partial(task, g.dC[d], p.dstate, partials.dC[d]);
        if (dir.dD) store_partial(task, g.dD[d], 1, partials.dD[d]);
        if (dir.ddelta_bias) store_partial(task, g.dbias[d], 1, partials.dbias[d]);
      }
      end_streams();
    }
  }
  if (failed) return "selective_scan backward: out of memory for scratch";
  for (auto& direction : sums)
    for (auto& sum : direction) sum.close(a.threads);
  return nullptr;
}

}  // namespace

const char* scan_backward(const ScanArgs& a) { return a.use_double ? backward<double>(a) : backward<float>(a); }

}  // namespace PIXELBYTES_ISA
}  // namespace pixelbytes
