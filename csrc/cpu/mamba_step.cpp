// mamba_step: one decoding step of a whole stack of residual Mamba blocks in one call, fp32.
//
//   x += out_proj(scan_step(silu(conv_step(in_proj(norm(x)))))) for every layer
//
// The weights were packed when the plan was made: panels of kLanes outputs, so that a product is one broadcast and one multiply-add an
// input and panel, without sums across lanes; panels that are multiplied together lie in one stream, read in order. States are the
// caller's tensors, updated in place. A row of the batch is one task.
#include "cpu/denormals.h"
#include "cpu/kernels.h"
#include "cpu/tile.h"

namespace pixelbytes {
namespace PIXELBYTES_ISA {
namespace {

constexpr int W = kLanes<float>;

// A weight matrix (out, in) as (group of panels, in, panel of the group, lane) with an optional bias (panel, lane).
struct Packed {
  float *weight = nullptr, *bias = nullptr;
  int64_t in = 0, panels = 0;
};

// Calls f(first panel, count as a constant) for every group.
template <class F>
inline void for_groups(int64_t panels, F&& f) {
  int64_t panel = 0;
  for (; panel + 8 <= panels; panel += 8) f(panel, ConstantInt<8>{});
  for (; panel + 4 <= panels; panel += 4) f(panel, ConstantInt<4>{});
  for (; panel + 2 <= panels; panel += 2) f(panel, ConstantInt<2>{});
  for (; panel < panels; ++panel) f(panel, ConstantInt<1>{});
}

struct Layer {
  float* norm = nullptr;
  Packed in_x, in_z, x_proj, dt_proj, out_proj;  // in_proj is split, so that each part starts at a panel
  float *taps = nullptr, *conv_bias = nullptr;   // (width, inner), (inner)
  float *A = nullptr, *D = nullptr;              // A log2(e) (inner, dstate padded to lanes), (inner)
  float steepest = 0;                            // largest |A| log2(e)
  Tensor conv_state, state;                      // (batch, width - 1, inner), (batch, inner, dstate), contiguous
};

struct Plan {
  int64_t dim, inner, rank, dstate, width, layers;
  float eps;
  Layer* layer;
  char* memory;
};

inline int64_t padded(int64_t n) { return (n + W - 1) / W * W; }

float* take(char*& next, int64_t count) {
  float* p = reinterpret_cast<float*>(next);
  next += Scratch::round(count * 4);
  return p;
}

int64_t packed_bytes(int64_t out, int64_t in) { return Scratch::round(padded(out) * in * 4) + Scratch::round(padded(out) * 4); }

Packed pack(char*& next, const Tensor& weight, const Tensor& bias, int64_t first, int64_t out) {
  Packed p;
  p.in = weight.size[1];
  p.panels = padded(out) / W;
  p.weight = take(next, padded(out) * p.in);
  p.bias = take(next, padded(out));
  for (int64_t o = 0; o < padded(out); ++o) p.bias[o] = bias && o < out ? load_element<float>(bias.at(first + o), bias.dtype) : 0.0f;
  float* to = p.weight;
  for_groups(p.panels, [&](int64_t panel, auto count) {
    for (int64_t i = 0; i < p.in; ++i)
      for (int64_t o = panel * W; o < (panel + count.value) * W; ++o)
        *to++ = o < out ? load_element<float>(weight.at(first + o, i), weight.dtype) : 0.0f;
  });
  return p;
}

float* pack_vector(char*& next, const Tensor& t, int64_t n) {
  float* p = take(next, padded(n));
  for (int64_t i = 0; i < padded(n); ++i) p[i] = t && i < n ? load_element<float>(t.at(i), t.dtype) : 0.0f;
  return p;
}

// A group of kPanels panels, the inputs dealt to kWays accumulators each: eight chains hide the latency of the multiply-add.
template <int kPanels>
inline void multiply_group(const Packed& m, int64_t panel, const float* x, float* y) {
  constexpr int kWays = 8 / kPanels;
  vf sum[kPanels][kWays] = {};
  const float* w = m.weight + panel * m.in * W;
  int64_t i = 0;
  for (; i + kWays <= m.in; i += kWays)
#pragma GCC unroll 8
    for (int way = 0; way < kWays; ++way, w += kPanels * W)
#pragma GCC unroll 8
      for (int k = 0; k < kPanels; ++k) sum[k][way] += splat(x[i + way]) * load(w + k * W);
  for (; i < m.in; ++i, w += kPanels * W)
    for (int k = 0; k < kPanels; ++k) sum[k][0] += splat(x[i]) * load(w + k * W);
  for (int k = 0; k < kPanels; ++k) {
    for (int way = 1; way < kWays; ++way) sum[k][0] += sum[k][way];
    store(y + (panel + k) * W, sum[k][0] + load(m.bias + (panel + k) * W));
  }
}

void multiply(const Packed& m, const float* x, float* y) {
  for_groups(m.panels, [&](int64_t panel, auto count) { multiply_group<decltype(count)::value>(m, panel, x, y); });
}

// Convolution step of one row; the window (past, inner), oldest first, moves on by one.
void convolve(const Plan& p, const Layer& l, int64_t row, float* u) {
  const int64_t past = p.width - 1, inner = padded(p.inner);
  float* window = reinterpret_cast<float*>(l.conv_state.data) + row * past * p.inner;
  for (int64_t c = 0; c < p.inner; c += W) {
    const int count = int(p.inner - c < W ? p.inner - c : W);
    const vf newest = load(u + c);
    vf sum = load(l.conv_bias + c) + load(l.taps + past * inner + c) * newest;
    for (int64_t k = 0; k < past; ++k) {
      const vf x = load_part<float>(window + k * p.inner + c, count);
      sum += load(l.taps + k * inner + c) * x;
      if (k > 0) store_part<float>(window + (k - 1) * p.inner + c, count, x);
    }
    store_part<float>(window + (past - 1) * p.inner + c, count, newest);
    store(u + c, silu(sum));
  }
}

// A step of the states of a tile's channels; lanes are the states of one channel, as they lie in memory. Returns y before skip and gate:
// the sums over the states of all channels are taken together. kWhole: kLanes channels of kLanes states each.
template <bool kSafe, bool kWhole>
inline vf step_tile(int64_t dstate, int channels, const float* A, const float* delta, const float* x, const float* B, float* states) {
  vf sums[W] = {};
  if constexpr (kWhole) {
    const vf b = load(B), c = load(B + W);
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) {
      const vf h = exp2_product<kSafe>(splat(delta[i]), load(A + i * W)) * load(states + i * W) + b * splat(x[i]);
      store(states + i * W, h);
      sums[i] = h * c;
    }
  } else {
    for (int i = 0; i < channels; ++i)
      for (int64_t n = 0; n < dstate; n += W, A += W) {
        const int count = dstate - n < W ? int(dstate - n) : W;
        float* state = states + i * dstate + n;
        const vf driven = load_part<float>(B + n, count) * splat(x[i]);
        const vf h = exp2_product<kSafe>(splat(delta[i]), load(A)) * load_part<float>(state, count) + driven;
        store_part<float>(state, count, h);
        sums[i] += h * load_part<float>(B + dstate + n, count);
      }
  }
  return sum_lanes<float>(sums);
}

// Scan step of one row, gated.
template <bool kSafe>
void scan_step(const Plan& p, const Layer& l, int64_t row, const float* u, const float* z, const float* delta, const float* x, const float* B,
               float* y) {
  float* states = reinterpret_cast<float*>(l.state.data) + row * p.inner * p.dstate;
  for (int64_t c = 0; c < p.inner; c += W) {
    const int channels = int(p.inner - c < W ? p.inner - c : W);
    const float* A = l.A + c * padded(p.dstate);
    float* state = states + c * p.dstate;
    const vf sums = channels == W && p.dstate == W
                        ? step_tile<kSafe, true>(p.dstate, channels, A, delta + c, x + c, B, state)
                        : step_tile<kSafe, false>(p.dstate, channels, A, delta + c, x + c, B, state);
    store(y + c, (sums + load(l.D + c) * load(u + c)) * silu(load(z + c)));
  }
}

// delta after softplus, and x = delta u; whether the short form of exp2 is exact for all of the layer's decays.
bool begin_delta(const Plan& p, const Layer& l, const float* u, float* delta, float* x) {
  Mask<float> good = ~Mask<float>{};
  for (int64_t c = 0; c < p.inner; c += W) {
    const vf d = softplus(load(delta + c));
    store(delta + c, d);
    store(x + c, d * load(u + c));
    good &= d * l.steepest < kExp2High;  // false for NaN
  }
  for (int i = 0; i < W; ++i)
    if (!good[i]) return false;
  return true;
}

// 1 / sqrt(mean of squares + eps)
float norm_factor(const Plan& p, const float* x) {
  vf sum = {};
  for (int64_t k = 0; k < p.dim; k += W) {
    const vf v = load_part<float>(x + k, int(p.dim - k < W ? p.dim - k : W));
    sum += v * v;
  }
  return 1.0f / __builtin_sqrtf(sum_groups<float, 1>(sum)[0] / float(p.dim) + p.eps);
}

void run_row(const Plan& p, int64_t row, float* x, Scratch& scratch) {
  const int64_t inner = padded(p.inner), dim = padded(p.dim);
  float *e = scratch.take<float>(dim), *u = scratch.take<float>(inner), *z = scratch.take<float>(inner), *y = scratch.take<float>(inner);
  float *delta = scratch.take<float>(inner), *xd = scratch.take<float>(inner), *out = scratch.take<float>(dim);
  float* projected = scratch.take<float>(padded(p.rank + 2 * p.dstate));
  for (int64_t i = 0; i < p.layers; ++i) {
    const Layer& l = p.layer[i];
    const float* input = x;
    if (l.norm) {
      const float factor = norm_factor(p, x);
      for (int64_t k = 0; k < p.dim; ++k) e[k] = x[k] * factor * l.norm[k];
      input = e;
    }
    multiply(l.in_x, input, u);
    multiply(l.in_z, input, z);
    convolve(p, l, row, u);
    multiply(l.x_proj, u, projected);
    multiply(l.dt_proj, projected, delta);
    if (begin_delta(p, l, u, delta, xd)) scan_step<true>(p, l, row, u, z, delta, xd, projected + p.rank, y);
    else scan_step<false>(p, l, row, u, z, delta, xd, projected + p.rank, y);
    multiply(l.out_proj, y, out);
    for (int64_t k = 0; k < p.dim; ++k) x[k] += out[k];
  }
}

}  // namespace

void* step_create(const StepLayer* layers, int64_t count, double eps) {
  const StepLayer& f = layers[0];
  Plan* p = new Plan{f.in_proj.size[1], f.conv_weight.size[0], f.dt_proj.size[1], f.A.size[1], f.conv_weight.size[1],
                                        count, float(eps), nullptr, nullptr};

  const int64_t inner = padded(p->inner);
  const int64_t bytes = Scratch::round(count * int64_t(sizeof(Layer))) +
                        count * (Scratch::round(padded(p->dim) * 4) + 2 * packed_bytes(p->inner, p->dim) +
                                 packed_bytes(p->rank + 2 * p->dstate, p->inner) + packed_bytes(p->inner, p->rank) +
                                 packed_bytes(p->dim, p->inner) + Scratch::round(inner * p->width * 4) + 2 * Scratch::round(inner * 4) +
                                 Scratch::round(inner * padded(p->dstate) * 4));
  p->memory = static_cast<char*>(aligned_alloc(64, size_t(bytes)));
  if (!p->memory) {
    delete p;
    return nullptr;
  }
  memset(p->memory, 0, size_t(bytes));
  char* next = p->memory;
  p->layer = reinterpret_cast<Layer*>(next);
  next += Scratch::round(count * int64_t(sizeof(Layer)));
  for (int64_t i = 0; i < count; ++i) {
    const StepLayer& s = layers[i];
    Layer& l = p->layer[i];
    l = Layer{};
    if (s.norm) l.norm = pack_vector(next, s.norm, p->dim);
    l.in_x = pack(next, s.in_proj, s.in_proj_bias, 0, p->inner);
    l.in_z = pack(next, s.in_proj, s.in_proj_bias, p->inner, p->inner);
    l.x_proj = pack(next, s.x_proj, {}, 0, p->rank + 2 * p->dstate);
    l.dt_proj = pack(next, s.dt_proj, s.dt_bias, 0, p->inner);
    l.out_proj = pack(next, s.out_proj, s.out_proj_bias, 0, p->dim);
    l.taps = take(next, inner * p->width);
    for (int64_t c = 0; c < p->inner; ++c)
      for (int64_t k = 0; k < p->width; ++k) l.taps[k * inner + c] = load_element<float>(s.conv_weight.at(c, k), s.conv_weight.dtype);
    l.conv_bias = pack_vector(next, s.conv_bias, p->inner);
    l.D = pack_vector(next, s.D, p->inner);
    l.A = take(next, inner * padded(p->dstate));
    for (int64_t c = 0; c < p->inner; ++c)
      for (int64_t n = 0; n < p->dstate; ++n) {
        const float a = load_element<float>(s.A.at(c, n), s.A.dtype) * kLog2e;
        l.A[c * padded(p->dstate) + n] = a;
        if (!(__builtin_fabsf(a) <= l.steepest)) l.steepest = __builtin_fabsf(a);
      }
    l.conv_state = s.conv_state;
    l.state = s.state;
  }
  return p;
}

const char* step_run(void* plan, float* x, int64_t batch, int threads) {
  const Plan& p = *static_cast<Plan*>(plan);
  const int64_t inner = padded(p.inner), dim = padded(p.dim);
  const int64_t bytes = (2 * dim + 5 * inner + padded(p.rank + 2 * p.dstate)) * 4 + 16 * 128;
  bool failed = false;
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (batch > 1)
  for (int64_t row = 0; row < batch; ++row) {
    const FlushDenormals flush;
    Scratch scratch(bytes);
    if (scratch) run_row(p, row, x + row * p.dim, scratch);
    else failed = true;
  }
  return failed ? "mamba_step: out of memory for scratch" : nullptr;
}

void step_destroy(void* plan) {
  Plan* p = static_cast<Plan*>(plan);
  free(p->memory);
  delete p;
}

}  // namespace PIXELBYTES_ISA
}  // namespace pixelbytes
