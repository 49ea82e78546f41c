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
void store_output(ScanTask<T>& k, Tiles part, int64_t t0, int64_t t1) {
  constexpr int W = kLanes<T>;
  const Block<T> gates = k.staging(part);
  const T scale = T(k.a.scale);
  if (k.a.z) k.load_rows(k.a.z, part, t0, t1, gates);
  for (int64_t tile = part.first; tile < part.end(); ++tile) {
    T *y = k.y.at(tile, t0), *gate = gates.data + (tile - part.first) * gates.pitch;
    for (int64_t i = 0; i < (t1 - t0) * W; i += W) {
      Vec<T> v = load(y + i) * scale;
      if (k.a.z) v *= silu(load(gate + i));
      store(y + i, v);
    }
  }
  k.store_rows(k.a.out, part, t0, t1, k.y.block(part, t0));
}

template <class T, bool kVariesB, bool kVariesC>
void forward_direction(ScanTask<T>& k, int d) {
  constexpr int W = kLanes<T>;
  const ScanDirection& dir = k.a.direction[d];
  const Plan& p = k.p;
  const bool last = d == k.a.directions - 1;
  // Tiles are brought in and written out in the order of memory: all at once where channels are neighbours there, else one by one.
  const int64_t step = k.a.out.stride[1] == 1 ? k.tiles : 1;
  k.load_constants(d);
  k.load_states(dir.initial_state, k.h);
  Run runs[kChunk];
  for (int64_t i = 0; i < p.chunks; ++i) {
    const int64_t chunk = dir.reverse ? p.chunks - 1 - i : i, t0 = chunk * kChunk, t1 = p.end_of(chunk);
    k.begin_chunk(d, t0);
    k.load_coefficients(d, t0, t1);
    const int count = find_runs(k.a.seq_idx, k.batch, t0, t1, p.seqlen, dir.reverse, runs);
    for (int64_t first = 0; first < k.tiles; first += step) {
      const Tiles part{first, step};
      k.load_inputs(d, part, t0, t1);
      k.begin_y(d, part, t0, t1);
      const bool turn = part.end() == k.tiles;
      const Tiles next_part{turn ? 0 : part.end(), step};
      const Soon soon = k.following(d, turn ? (dir.reverse ? chunk - 1 : chunk + 1) : chunk);
      AheadList ahead;
      k.add_inputs_ahead(ahead, next_part, soon);
      if (soon.direction == k.a.directions - 1) k.add_ahead(ahead, k.a.z, next_part, soon), k.add_output_ahead(ahead, k.a.out, next_part, soon);
      if (turn) k.add_coefficients_ahead(ahead, soon);
      ahead.deal(step * passes_of<kForwardStates>(p.dstate));
      for (int64_t tile = part.first; tile < part.end(); ++tile) {
        if (dir.states) memcpy(k.kept(dir.states, chunk, tile), k.state(k.h, tile, 0), size_t(p.dstate) * W * sizeof(T));
        const bool safe_tile = is_safe(k.rows_delta(d).at(tile, t0), t1 - t0, k.steepest[d] + tile * W);
        const Steps<T> steps = k.template steps<kVariesB, kVariesC>(d, tile, t0);
        for_states<kForwardStates>(p.dstate, [&](int64_t n, auto states) {
          constexpr int N = decltype(states)::value;
          const T *A = k.state(k.A[d], tile, n), *A2 = k.state(k.A2[d], tile, n);
          T* h = k.state(k.h, tile, n);
          const Ahead lines = ahead.next(2);
          with_safe<T>(safe_tile, [&](auto safe) {
            for (int r = 0; r < count; ++r) {
              if (runs[r].fresh) memset(h, 0, sizeof(T) * W * N);
              scan_steps<T, N, kVariesB, kVariesC, decltype(safe)::value>(steps.template of<kVariesB, kVariesC>(runs[r], n, lines), A, A2, h,
                                                                          k.y.at(tile, t0 + runs[r].offset));
            }
          });
        });
      }
      if (last) store_output(k, part, t0, t1);
    }
  }
  if (dir.last_state) k.store_states(dir.last_state, k.h);
}

template <class T>
const char* forward(const ScanArgs& a) {
  const Plan p = make_plan<T>(a);
  bool failed = false;
#pragma omp parallel for schedule(dynamic, 1) num_threads(a.threads)
  for (int64_t i = 0; i < p.tasks(); ++i) {
    const FlushDenormals flush;
    Scratch scratch(ScanTask<T>::bytes(a, p));
    if (!scratch) {
      failed = true;
      continue;
    }
    ScanTask<T> task(a, p, i, scratch);
    for (int d = 0; d < a.directions; ++d)
      with_variation(task, d, [&](auto varies_B, auto varies_C) {
        forward_direction<T, decltype(varies_B)::value, decltype(varies_C)::value>(task, d);
      });
    end_streams();
  }
  return failed ? "selective_scan: out of memory for scratch" : nullptr;
}

}  // namespace

const char* scan_forward(const ScanArgs& a) { return a.use_double ? forward<double>(a) : forward<float>(a); }

}  // namespace PIXELBYTES_ISA
}  // namespace pixelbytes
