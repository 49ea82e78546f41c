// selective_scan and bidirectional_selective_scan, forward.
//
// A task owns one batch row and a block of channel tiles. Chunk by chunk it brings u and delta (after bias and softplus) into
// (tile, time, lane) scratch, runs the recurrence, and writes the gated output; with two directions the row's y waits in scratch for
// the second. Tasks depend on sizes alone: results are bitwise equal for any number of threads.
#include "cpu/scan_block.h"

namespace pixelbytes {
namespace PIXELBYTES_ISA {
namespace {

template <class T>
void store_output(ScanTask<T>& k, int64_t t0, int64_t t1, T* gate) {
  constexpr int W = kLanes<T>;
  const Plane z = plane(k.a.z, k.batch);
  const T scale = T(k.a.scale);
  const Block<T> gates{gate, kChunk * W, int(k.tiles)};
  if (z) load_block<T>(z, k.channel, k.channels, t0, t1 - t0, gates);
  for (int64_t tile = 0; tile < k.tiles; ++tile) {
    T* y = k.y.at(tile, t0);
    for (int64_t i = 0; i < (t1 - t0) * W; i += W) {
      Vec<T> v = load(y + i) * scale;
      if (z) v *= silu(load(gate + tile * gates.pitch + i));
      store(y + i, v);
    }
  }
  store_block<T>(plane(k.a.out, k.batch), k.channel, k.channels, t0, t1 - t0, k.y.block(k.tiles, t0));
}

template <class T, bool kVariesB, bool kVariesC>
void forward_direction(ScanTask<T>& k, int d, T* gate) {
  constexpr int W = kLanes<T>;
  const ScanDirection& dir = k.a.direction[d];
  const Plan& p = k.p;
  const bool last = d == k.a.directions - 1;
  k.load_constants(d);
  k.load_states(dir.initial_state, k.h);
  Run runs[kChunk];
  for (int64_t i = 0; i < p.chunks; ++i) {
    const int64_t chunk = dir.reverse ? p.chunks - 1 - i : i, t0 = chunk * kChunk;
    const int64_t t1 = t0 + kChunk < p.seqlen ? t0 + kChunk : p.seqlen;
    k.begin_chunk(d, t0, t1);
    k.begin_y(d, t0, t1);
    k.load_coefficients(d, t0, t1);
    const int64_t next = dir.reverse ? t0 - kChunk : t1, end = next + kChunk < p.seqlen ? next + kChunk : p.seqlen;
    if (next >= 0 && next < p.seqlen) k.prefetch(d, next, end);
    if (last) {
      prefetch_block<false>(plane(k.a.z, k.batch), k.channel, k.channels, t0, t1 - t0);
      prefetch_block<true>(plane(k.a.out, k.batch), k.channel, k.channels, t0, t1 - t0);
    }
    const int count = find_runs(k.a.seq_idx, k.batch, t0, t1, p.seqlen, dir.reverse, runs);
    for (int64_t tile = 0; tile < k.tiles; ++tile) {
      if (dir.states) memcpy(k.kept(dir.states, chunk, tile), k.state(k.h, tile, 0), size_t(p.dstate) * W * sizeof(T));
      const Range<T> range(k.rows_delta(d).at(tile, t0), t1 - t0);
      for_states(p.dstate, [&](int64_t n, auto states) {
        constexpr int N = decltype(states)::value;
        const T *A = k.state(k.A[d], tile, n), *A2 = k.state(k.A2[d], tile, n);
        T* h = k.state(k.h, tile, n);
        with_safe<T>(range.is_safe(A2, N), [&](auto safe) {
          for (int r = 0; r < count; ++r) {
            if (runs[r].fresh) memset(h, 0, sizeof(T) * W * N);
            scan_steps<T, N, kVariesB, kVariesC, decltype(safe)::value>(k.steps(d, tile, t0, n, runs[r]), A, A2, h,
                                                                        k.y.at(tile, t0 + runs[r].offset));
          }
        });
      });
    }
    if (last) store_output(k, t0, t1, gate);
  }
  if (dir.last_state) k.store_states(dir.last_state, k.h);
}

template <class T>
const char* forward(const ScanArgs& a) {
  const Plan p = make_plan<T>(a);
  const int64_t gate_size = p.block_tiles * kChunk * kLanes<T>;
  bool failed = false;
#pragma omp parallel for schedule(dynamic, 1) num_threads(a.threads)
  for (int64_t i = 0; i < p.tasks(); ++i) {
    Scratch scratch(ScanTask<T>::bytes(a, p) + gate_size * int64_t(sizeof(T)) + 128);
    if (!scratch) {
      failed = true;
      continue;
    }
    ScanTask<T> task(a, p, i, scratch);
    T* gate = scratch.take<T>(gate_size);
    for (int d = 0; d < a.directions; ++d)
      with_variation(task, d, [&](auto varies_B, auto varies_C) {
        forward_direction<T, decltype(varies_B)::value, decltype(varies_C)::value>(task, d, gate);
      });
  }
  return failed ? "selective_scan: out of memory for scratch" : nullptr;
}

}  // namespace

const char* scan_forward(const ScanArgs& a) { return a.use_double ? forward<double>(a) : forward<float>(a); }

}  // namespace PIXELBYTES_ISA
}  // namespace pixelbytes
