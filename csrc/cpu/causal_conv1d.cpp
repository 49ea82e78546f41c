// causal_conv1d: depthwise, 2 to 4 taps, with SiLU, forward and backward.
//
//   pre[s] = bias + sum_j tap[j] x[s - j],  out = silu(pre),  tap[j] = weight[width - 1 - j]
//
// s counts steps in the direction of the convolution: s = t, or seqlen - 1 - t in the anti-causal form. A task owns one batch row and a
// block of channels. Channels-last tensors go through tiles, lanes being channels; where time is contiguous lanes are steps. Both take
// windows of time with a halo of width - 1 steps on both sides. Nothing but x is kept for the backward.
#include "cpu/kernels.h"
#include "cpu/partial_sum.h"
#include "cpu/tile.h"

namespace pixelbytes {
namespace PIXELBYTES_ISA {
namespace {

constexpr int64_t kWindow = 64, kMaxTiles = 8;
constexpr int kTaps = 4, kHalo = kTaps - 1;

struct Plan {
  int64_t batch, dim, seqlen, tiles, block_tiles, blocks;
  int width;
  int64_t tasks() const { return batch * blocks; }
};

Plan make_plan(const Tensor& x, const Tensor& weight, int64_t lanes) {
  Plan p{x.size[0], x.size[1], x.size[2], (x.size[1] + lanes - 1) / lanes, 0, 0, int(weight.size[1])};
  int64_t tiles = p.batch * p.tiles / 8;
  tiles = tiles > kMaxTiles ? kMaxTiles : tiles < 1 ? 1 : tiles;
  p.blocks = (p.tiles + tiles - 1) / tiles;
  p.block_tiles = (p.tiles + p.blocks - 1) / p.blocks;
  return p;
}

template <class T>
struct ConvTask {
  static constexpr int W = kLanes<T>;
  static constexpr int64_t kRows = kWindow + 2 * kHalo;
  const ConvArgs& a;
  const Plan& p;
  int64_t batch, channel, channels, tiles;
  T *x, *tap, *bias;  // (tile, row, lane): row r is time t0 - kHalo + r; (tile, kTaps, lane), unused taps zero; (tile, lane)
  int64_t index[kRows];

  static int64_t size(const Plan& p) { return p.block_tiles * (kRows + kTaps + 1) * W; }

  ConvTask(const ConvArgs& args, const Plan& plan, int64_t task, Scratch& scratch) : a(args), p(plan) {
    batch = task / p.blocks;
    const int64_t tile0 = task % p.blocks * p.block_tiles;
    tiles = p.tiles - tile0 < p.block_tiles ? p.tiles - tile0 : p.block_tiles;
    channel = tile0 * W;
    channels = p.dim - channel < tiles * W ? p.dim - channel : tiles * W;
    x = scratch.take<T>(tiles * kRows * W);
    tap = scratch.take<T>(tiles * kTaps * W);
    bias = scratch.take<T>(tiles * W);
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int n = valid_channels(channels, tile, W);
      store(bias + tile * W, a.bias ? load_channels<T>(a.bias, channel + tile * W, n) : Vec<T>{});
      for (int j = 0; j < kTaps; ++j) {
        Vec<T> v = {};
        for (int c = 0; c < n && j < p.width; ++c)
          v[c] = load_element<T>(a.weight.at(channel + tile * W + c, p.width - 1 - j), a.weight.dtype);
        store(tap + (tile * kTaps + j) * W, v);
      }
    }
  }

  int64_t step() const { return a.reverse ? -W : W; }
  Block<T> rows(T* base, int64_t row) const { return {base + row * W, kRows * W, int(tiles)}; }
  T* row(T* base, int64_t tile, int64_t r) const { return base + (tile * kRows + r) * W; }
  int64_t before(int64_t t) const { return a.reverse ? t - p.seqlen : -1 - t; }  // >= 0: t lies so many steps before the first

  // Brings times [t0 - kHalo, t1 + kHalo) in; what lies before the first step comes from initial_states, the rest is zero.
  void load_window(int64_t t0, int64_t t1) {
    const int64_t low = t0 < kHalo ? 0 : t0 - kHalo, high = t1 + kHalo > p.seqlen ? p.seqlen : t1 + kHalo;
    load_block<T>(plane(a.x, batch), channel, channels, low, high - low, rows(x, low - t0 + kHalo));
    for (int64_t r = 0; r < t1 - t0 + 2 * kHalo; ++r) {
      const int64_t t = t0 - kHalo + r;
      if (t < 0 || t >= p.seqlen) load_state_row(r, before(t));
    }
    if (!a.seq_idx) return;
    for (int64_t r = 0; r < t1 - t0 + 2 * kHalo; ++r) {  // initial states belong to the sequence that starts the row
      int64_t t = t0 - kHalo + r;
      t = t < 0 ? 0 : t >= p.seqlen ? p.seqlen - 1 : t;
      index[r] = load_index(a.seq_idx.at(batch, t), a.seq_idx.dtype);
    }
  }
  void load_state_row(int64_t r, int64_t steps_before) {
    for (int64_t tile = 0; tile < tiles; ++tile) {
      Vec<T> v = {};
      if (a.initial_states && steps_before >= 0 && steps_before < p.width - 1)
        for (int c = 0; c < valid_channels(channels, tile, W); ++c)
          v[c] = load_element<T>(a.initial_states.at(batch, channel + tile * W + c, p.width - 2 - steps_before), a.initial_states.dtype);
      store(row(x, tile, r), v);
    }
  }

  // Whether tap j of the step in row r stays within its sequence.
  bool same(int64_t r, int j) const { return index[r] == index[r - (a.reverse ? -j : j)]; }

  Vec<T> pre(int64_t tile, int64_t r) const {
    const T *at = x + (tile * kRows + r) * W, *w = tap + tile * kTaps * W;
    Vec<T> sum = load(bias + tile * W) + load(w) * load(at);
    for (int j = 1; j < p.width; ++j)
      if (!a.seq_idx || same(r, j)) sum += load(w + j * W) * load(at - j * step());
    return sum;
  }
};

// The common case in registers: kWidth taps, no sequence index.
template <class T, int kWidth>
inline void convolve_rows(const T* at, T* out, int64_t rows, int64_t step, const T* tap, Vec<T> bias) {
  constexpr int W = kLanes<T>;
  Vec<T> w[kWidth];
  for (int j = 0; j < kWidth; ++j) w[j] = load(tap + j * W);
  for (int64_t i = 0; i < rows; ++i, at += W, out += W) {
    Vec<T> sum = bias + w[0] * load(at);
#pragma GCC unroll 4
    for (int j = 1; j < kWidth; ++j) sum += w[j] * load(at - j * step);
    store(out, sum);
  }
}

// pre of `rows` rows of a tile from row r on.
template <class T>
void convolve(const ConvTask<T>& k, int64_t tile, int64_t r, int64_t rows, T* out) {
  constexpr int W = kLanes<T>;
  if (k.a.seq_idx) {
    for (int64_t i = 0; i < rows; ++i) store(out + i * W, k.pre(tile, r + i));
    return;
  }
  const T *at = k.row(k.x, tile, r), *tap = k.tap + tile * kTaps * W;
  const Vec<T> bias = load(k.bias + tile * W);
  if (k.p.width == 4) convolve_rows<T, 4>(at, out, rows, k.step(), tap, bias);
  else if (k.p.width == 3) convolve_rows<T, 3>(at, out, rows, k.step(), tap, bias);
  else convolve_rows<T, 2>(at, out, rows, k.step(), tap, bias);
}

// The last inputs in scan order, initial states where the row is shorter.
template <class T>
void store_final_states(const ConvArgs& a, int64_t batch, int64_t first, int64_t channels) {
  const int64_t width = a.weight.size[1], seqlen = a.x.size[2];
  for (int64_t i = 0; a.final_states && i < width - 1; ++i) {
    const int64_t s = seqlen - (width - 1) + i, t = a.reverse ? seqlen - 1 - s : s;
    for (int64_t c = first; c < first + channels; ++c) {
      T v = 0;
      if (s >= 0) v = load_element<T>(a.x.at(batch, c, t), a.x.dtype);
      else if (a.initial_states) v = load_element<T>(a.initial_states.at(batch, c, width - 1 + s), a.initial_states.dtype);
      store_element<T>(a.final_states.at(batch, c, i), a.final_states.dtype, v);
    }
  }
}

template <class T>
void forward_task(ConvTask<T>& k, T* out) {
  constexpr int W = kLanes<T>;
  const Plan& p = k.p;
  for (int64_t t0 = 0; t0 < p.seqlen; t0 += kWindow) {
    const int64_t t1 = t0 + kWindow < p.seqlen ? t0 + kWindow : p.seqlen;
    k.load_window(t0, t1);
    for (int64_t tile = 0; tile < k.tiles; ++tile) {
      T* to = out + tile * kWindow * W;
      convolve(k, tile, kHalo, t1 - t0, to);
      for (int64_t i = 0; k.a.silu && i < (t1 - t0) * W; i += W) store(to + i, silu(load(to + i)));
    }
    store_block<T>(plane(k.a.out, k.batch), k.channel, k.channels, t0, t1 - t0, {out, kWindow * W, int(k.tiles)});
  }
  store_final_states<T>(k.a, k.batch, k.channel, k.channels);
}

// ---- time contiguous: lanes are steps, nothing is transposed ------------------------------------------------------------

constexpr int64_t kRowWindow = 1024;
constexpr int64_t kRowSize = kRowWindow + 2 * kHalo + 64;  // with room for whole vectors behind the last step

// Channel rows of plain convolutions go this way; sequence indices and states take the tiles.
inline bool by_rows(const ConvArgs& a) {
  const Tensor* rows[] = {&a.x, &a.out, &a.dout, &a.dx};
  for (const Tensor* t : rows)
    if (*t && (t->stride[2] != 1 || t->stride[1] == 1)) return false;
  return !a.seq_idx && !a.initial_states && !a.dfinal_states;
}

template <class T>
struct Row {
  static constexpr int W = kLanes<T>;
  const ConvArgs& a;
  int64_t batch, channel, seqlen;
  int width, step;  // step -1: the anti-causal form
  bool finite = true;  // all taps
  T tap[kTaps] = {}, bias = 0;

  Row(const ConvArgs& args, int64_t b, int64_t c)
      : a(args), batch(b), channel(c), seqlen(args.x.size[2]), width(int(args.weight.size[1])), step(args.reverse ? -1 : 1) {
    for (int j = 0; j < width; ++j) {
      tap[j] = load_element<T>(a.weight.at(c, width - 1 - j), a.weight.dtype);
      finite &= tap[j] - tap[j] == T(0);
    }
    if (a.bias) bias = load_element<T>(a.bias.at(c), a.bias.dtype);
  }
  // Times [t0 - kHalo, t1 + kHalo) of a tensor's row, zeros outside the sequence.
  void load(const Tensor& t, int64_t t0, int64_t t1, T* to) const {
    const int64_t low = t0 < kHalo ? 0 : t0 - kHalo, high = t1 + kHalo > seqlen ? seqlen : t1 + kHalo;
    for (int64_t i = 0; i < kHalo; ++i) to[i] = 0;
    T* at = to + low - t0 + kHalo;
    for (int64_t i = 0; i < high - low; i += W) {
      const int count = int(high - low - i < W ? high - low - i : W);
      store(at + i, load_run<T>(t.at(batch, channel, low + i), t.dtype, count));
    }
    for (int64_t i = high - t0 + kHalo; i < t1 - t0 + 2 * kHalo; ++i) to[i] = 0;
  }
  Vec<T> pre(const T* x) const {
    Vec<T> sum = splat(bias) + splat(tap[0]) * pixelbytes::load(x);
    for (int j = 1; j < width; ++j) sum += splat(tap[j]) * pixelbytes::load(x - j * step);
    return sum;
  }
};

template <class T>
void forward_row(const ConvArgs& a, int64_t batch, int64_t channel, T* x) {
  constexpr int W = kLanes<T>;
  const Row<T> k(a, batch, channel);
  for (int64_t t0 = 0; t0 < k.seqlen; t0 += kRowWindow) {
    const int64_t t1 = t0 + kRowWindow < k.seqlen ? t0 + kRowWindow : k.seqlen;
    k.load(a.x, t0, t1, x);
    for (int64_t i = 0; i < t1 - t0; i += W) {
      const Vec<T> v = k.pre(x + kHalo + i);
      const int count = int(t1 - t0 - i < W ? t1 - t0 - i : W);
      store_run<T>(a.out.at(batch, channel, t0 + i), a.out.dtype, count, a.silu ? silu(v) : v);
    }
  }
}

template <class T>
void backward_row(const ConvArgs& a, int64_t batch, int64_t channel, T* x, T* dpre, T* dweight, T* dbias) {
  constexpr int W = kLanes<T>;
  const Row<T> k(a, batch, channel);
  Vec<T> d[kTaps] = {}, db = {};
  for (int64_t t0 = 0; t0 < k.seqlen; t0 += kRowWindow) {
    const int64_t t1 = t0 + kRowWindow < k.seqlen ? t0 + kRowWindow : k.seqlen, steps = t1 - t0;
    k.load(a.x, t0, t1, x);
    k.load(a.dout, t0, t1, dpre);
    // The steps whose inputs these are reach kHalo beyond the window on one side; on the other `pre` would lack inputs.
    const int64_t low = a.reverse ? (t0 < kHalo ? kHalo - t0 : 0) : kHalo, high = a.reverse ? kHalo + steps : 2 * kHalo + steps;
    for (int64_t r = low; a.silu && r < high; r += W) {
      const int count = int(high - r < W ? high - r : W);
      const Vec<T> p = k.pre(x + r), s = sigmoid(p);
      store_part<T>(dpre + r, count, load(dpre + r) * (s * (1 + p * (1 - s))));
    }
    for (int64_t i = 0; i < steps; i += W) {
      const int count = int(steps - i < W ? steps - i : W);
      const T *g = dpre + kHalo + i, *in = x + kHalo + i;
      const Vec<T> own = load_part<T>(g, count);
      Vec<T> sum = splat(k.tap[0]) * own;
      for (int j = 1; j < k.width; ++j) sum += splat(k.tap[j]) * load(g + j * k.step);
      if (a.dx) store_run<T>(a.dx.at(batch, channel, t0 + i), a.dx.dtype, count, sum);
      db += own;
      for (int j = 0; j < k.width; ++j) d[j] += own * load_part<T>(in - j * k.step, count);
    }
    // Nothing follows the last steps; the zeros that stand there would make NaN of an infinite tap.
    for (int64_t t = t0; a.dx && !k.finite && t < t1; ++t) {
      const int64_t after = a.reverse ? t : k.seqlen - 1 - t;
      if (after >= k.width - 1) continue;
      T sum = 0;
      for (int j = 0; j < k.width && j <= after; ++j) sum += k.tap[j] * dpre[kHalo + t - t0 + j * k.step];
      store_element<T>(a.dx.at(batch, channel, t), a.dx.dtype, sum);
    }
  }
  for (int j = 0; j < k.width && dweight; ++j) {
    T sum = 0;
    for (int i = 0; i < W; ++i) sum += d[j][i];
    dweight[k.width - 1 - j] = sum;
  }
  if (dbias) {
    *dbias = 0;
    for (int i = 0; i < W; ++i) *dbias += db[i];
  }
}

template <class T>
const char* forward(const ConvArgs& a) {
  const Plan p = make_plan(a.x, a.weight, kLanes<T>);
  const int64_t out_size = p.block_tiles * kWindow * kLanes<T>;
  const bool rows = by_rows(a);
  bool failed = false;
#pragma omp parallel for schedule(dynamic, 1) num_threads(a.threads)
  for (int64_t i = 0; i < p.tasks(); ++i) {
    Scratch scratch((ConvTask<T>::size(p) + out_size + kRowSize) * int64_t(sizeof(T)) + 8 * 128);
    if (!scratch) {
      failed = true;
      continue;
    }
    if (rows) {
      const int64_t width = p.block_tiles * kLanes<T>, first = i % p.blocks * width;
      const int64_t last = first + width < p.dim ? first + width : p.dim;
      T* x = scratch.take<T>(kRowSize);
      for (int64_t c = first; c < last; ++c) forward_row<T>(a, i / p.blocks, c, x);
      store_final_states<T>(a, i / p.blocks, first, last - first);
      continue;
    }
    ConvTask<T> task(a, p, i, scratch);
    forward_task(task, scratch.take<T>(out_size));
  }
  return failed ? "causal_conv1d: out of memory for scratch" : nullptr;
}

// Gradient of `pre` for every row of the window that lies in the sequence, then of x, the taps and the bias.
template <class T>
void backward_task(ConvTask<T>& k, T* dpre, T* dx, T* dtap, T* dbias) {
  constexpr int W = kLanes<T>;
  constexpr int64_t kRows = ConvTask<T>::kRows;
  const Plan& p = k.p;
  const int64_t step = k.step();
  for (int64_t t0 = 0; t0 < p.seqlen; t0 += kWindow) {
    const int64_t t1 = t0 + kWindow < p.seqlen ? t0 + kWindow : p.seqlen, steps = t1 - t0;
    k.load_window(t0, t1);
    // A step's x reaches outputs up to kHalo steps later: their gradients are formed in both windows that need them.
    const int64_t low = k.a.reverse ? (t0 < kHalo ? 0 : t0 - kHalo) : t0;
    const int64_t high = k.a.reverse ? t1 : (t1 + kHalo > p.seqlen ? p.seqlen : t1 + kHalo);
    memset(dpre, 0, sizeof(T) * size_t(k.tiles) * kRows * W);
    load_block<T>(plane(k.a.dout, k.batch), k.channel, k.channels, low, high - low, k.rows(dpre, low - t0 + kHalo));
    for (int64_t tile = 0; tile < k.tiles; ++tile) {
      const T* w = k.tap + tile * kTaps * W;
      if (k.a.silu) {
        alignas(64) T pre[kRows * W];
        T* at = k.row(dpre, tile, low - t0 + kHalo);
        convolve(k, tile, low - t0 + kHalo, high - low, pre);
        for (int64_t i = 0; i < (high - low) * W; i += W) {
          const Vec<T> x = load(pre + i), s = sigmoid(x);
          store(at + i, load(at + i) * (s * (1 + x * (1 - s))));
        }
      }
      for (int64_t i = 0; i < steps; ++i) {
        const int64_t r = kHalo + i, after = k.a.reverse ? t0 + i : p.seqlen - 1 - (t0 + i);
        const T* at = k.row(dpre, tile, r);
        Vec<T> sum = load(w) * load(at);
        for (int j = 1; j < p.width && j <= after; ++j)
          if (!k.a.seq_idx || k.same(r + (k.a.reverse ? -j : j), j)) sum += load(w + j * W) * load(at + j * step);
        store(dx + (tile * kWindow + i) * W, sum);
      }
      Vec<T> d[kTaps], db = load(dbias + tile * W);
      for (int j = 0; j < kTaps; ++j) d[j] = load(dtap + (tile * kTaps + j) * W);
      for (int64_t i = 0; i < steps; ++i) {
        const int64_t r = kHalo + i;
        const Vec<T> g = load(k.row(dpre, tile, r));
        const T* at = k.row(k.x, tile, r);
        db += g;
        for (int j = 0; j < p.width; ++j)
          if (!k.a.seq_idx || k.same(r, j)) d[j] += g * load(at - j * step);
      }
      for (int j = 0; j < kTaps; ++j) store(dtap + (tile * kTaps + j) * W, d[j]);
      store(dbias + tile * W, db);
    }
    if (k.a.dfinal_states || k.a.dinitial_states) {
      for (int64_t tile = 0; tile < k.tiles; ++tile) {
        const int n = valid_channels(k.channels, tile, W);
        for (int64_t i = 0; k.a.dfinal_states && i < p.width - 1; ++i) {
          const int64_t s = p.seqlen - (p.width - 1) + i, t = k.a.reverse ? p.seqlen - 1 - s : s;
          for (int c = 0; c < n && t >= t0 && t < t1; ++c)
            dx[(tile * kWindow + t - t0) * W + c] +=
                load_element<T>(k.a.dfinal_states.at(k.batch, k.channel + tile * W + c, i), k.a.dfinal_states.dtype);
        }
        // Inputs before the first step: seen by the first steps of the row, and by final_states where the row is short.
        const bool first = k.a.reverse ? t1 == p.seqlen : t0 == 0;
        for (int64_t i = 0; k.a.dinitial_states && first && i < p.width - 1; ++i) {
          const int64_t m = p.width - 1 - i;  // so many steps before the first
          const int64_t r = k.a.reverse ? kHalo + steps - 1 + m : kHalo - m;
          Vec<T> sum = {};
          for (int64_t j = m; j < p.width && j - m < p.seqlen; ++j)
            if (!k.a.seq_idx || k.same(r + (k.a.reverse ? -j : j), int(j)))
              sum += load(k.tap + (tile * kTaps + j) * W) * load(k.row(dpre, tile, r) + j * step);
          for (int c = 0; c < n; ++c) {
            T v = sum[c];
            if (k.a.dfinal_states && p.seqlen < i + 1)
              v += load_element<T>(k.a.dfinal_states.at(k.batch, k.channel + tile * W + c, i - p.seqlen), k.a.dfinal_states.dtype);
            store_element<T>(k.a.dinitial_states.at(k.batch, k.channel + tile * W + c, i), k.a.dinitial_states.dtype, v);
          }
        }
      }
    }
    if (k.a.dx) store_block<T>(plane(k.a.dx, k.batch), k.channel, k.channels, t0, steps, {dx, kWindow * W, int(k.tiles)});
  }
}

template <class T>
const char* backward(const ConvArgs& a) {
  constexpr int W = kLanes<T>;
  const Plan p = make_plan(a.x, a.weight, W);
  PartialSum<T> dweight, dbias;
  if (!dweight.open(a.dweight, p.batch, p.dim * p.width) || !dbias.open(a.dbias, p.batch, p.dim))
    return "causal_conv1d backward: out of memory for partial sums";
  const int64_t rows = p.block_tiles * ConvTask<T>::kRows * W, out = p.block_tiles * kWindow * W, taps = p.block_tiles * (kTaps + 1) * W;
  const bool whole_rows = by_rows(a);
  bool failed = false;
#pragma omp parallel for schedule(dynamic, 1) num_threads(a.threads)
  for (int64_t i = 0; i < p.tasks(); ++i) {
    Scratch scratch((ConvTask<T>::size(p) + rows + out + taps + 2 * kRowSize) * int64_t(sizeof(T)) + 14 * 128);
    if (!scratch) {
      failed = true;
      continue;
    }
    if (whole_rows) {
      const int64_t batch = i / p.blocks, width = p.block_tiles * W, first = i % p.blocks * width;
      T *x = scratch.take<T>(kRowSize), *dpre = scratch.take<T>(kRowSize);
      memset(x, 0, sizeof(T) * kRowSize);
      memset(dpre, 0, sizeof(T) * kRowSize);
      for (int64_t c = first; c < first + width && c < p.dim; ++c)
        backward_row<T>(a, batch, c, x, dpre, dweight.data() ? dweight.part(batch) + c * p.width : nullptr,
                        dbias.data() ? dbias.part(batch) + c : nullptr);
      continue;
    }
    ConvTask<T> k(a, p, i, scratch);
    T *dpre = scratch.take<T>(rows), *dx = scratch.take<T>(out);
    T *dtap = scratch.take<T>(p.block_tiles * kTaps * W), *db = scratch.take<T>(p.block_tiles * W);
    memset(dtap, 0, sizeof(T) * size_t(p.block_tiles) * kTaps * W);
    memset(db, 0, sizeof(T) * size_t(p.block_tiles) * W);
    backward_task(k, dpre, dx, dtap, db);
    for (int64_t c = 0; c < k.channels; ++c) {
      const int64_t tile = c / W, lane = c % W;
      for (int j = 0; j < p.width && dweight.data(); ++j)
        dweight.part(k.batch)[(k.channel + c) * p.width + p.width - 1 - j] = dtap[(tile * kTaps + j) * W + lane];
      if (dbias.data()) dbias.part(k.batch)[k.channel + c] = db[tile * W + lane];
    }
  }
  if (failed) return "causal_conv1d backward: out of memory for scratch";
  dweight.close(a.threads);
  dbias.close(a.threads);
  return nullptr;
}

}  // namespace

const char* conv_forward(const ConvArgs& a) { return a.use_double ? forward<double>(a) : forward<float>(a); }
const char* conv_backward(const ConvArgs& a) { return a.use_double ? backward<double>(a) : backward<float>(a); }

}  // namespace PIXELBYTES_ISA
}  // namespace pixelbytes
