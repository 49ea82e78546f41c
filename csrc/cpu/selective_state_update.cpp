// selective_state_update: one decoding step of the selective scan, state updated in place.
//
// Lanes are the states of one channel: a row of (batch, dim, dstate) is contiguous where it matters. A task is a batch row and 64 channels.
#include "cpu/denormals.h"
#include "cpu/kernels.h"
#include "cpu/tile.h"

namespace pixelbytes {
namespace PIXELBYTES_ISA {
namespace {

constexpr int64_t kChannels = 64;

template <class T>
inline T element(const Tensor& t, int64_t i, T otherwise) {
  return t ? load_element<T>(t.at(i), t.dtype) : otherwise;
}

template <class T>
void update_channel(const StateArgs& a, int64_t b, int64_t c) {
  constexpr int W = kLanes<T>;
  const int64_t dstate = a.state.size[2], group = c / (a.x.size[1] / a.B.size[1]);
  const T x = load_element<T>(a.x.at(b, c), a.x.dtype);
  Vec<T> step = splat(load_element<T>(a.dt.at(b, c), a.dt.dtype) + element<T>(a.dt_bias, c, T(0)));
  if (a.dt_softplus) step = softplus(step);
  const T dt = step[0];
  Vec<T> sum = {};
  for (int64_t n = 0; n < dstate; n += W) {
    const int count = int(dstate - n < W ? dstate - n : W);
    auto row = [&](const Tensor& t, int64_t i, int64_t j) {
      Vec<T> v = {};
      const char* at = t.ndim == 2 ? t.at(i, n) : t.at(i, j, n);
      const int64_t stride = t.stride[t.ndim - 1];
      if (stride == 1) return load_run<T>(at, t.dtype, count);
      for (int k = 0; k < count; ++k) v[k] = load_element<T>(at + k * stride * item_size(t.dtype), t.dtype);
      return v;
    };
    const Vec<T> h = exp(splat(dt) * row(a.A, c, 0)) * row(a.state, b, c) + splat(dt * x) * row(a.B, b, group);
    for (int k = 0; k < count; ++k) store_element<T>(a.state.at(b, c, n + k), a.state.dtype, h[k]);
    const Vec<T> y = h * row(a.C, b, group);
    sum += select(lane_index<T>() < splat(T(count)), y, Vec<T>{});
  }
  T y = 0;
  for (int k = 0; k < W; ++k) y += sum[k];
  if (a.D) y += element<T>(a.D, c, T(0)) * x;
  if (a.z) y *= silu(splat(load_element<T>(a.z.at(b, c), a.z.dtype)))[0];
  store_element<T>(a.out.at(b, c), a.out.dtype, y);
}

template <class T>
const char* update(const StateArgs& a) {
  const int64_t batch = a.x.size[0], dim = a.x.size[1], blocks = (dim + kChannels - 1) / kChannels;
#pragma omp parallel for schedule(dynamic, 1) num_threads(a.threads) if (batch * blocks > 4)
  for (int64_t task = 0; task < batch * blocks; ++task) {
    const FlushDenormals flush;
    const int64_t first = task % blocks * kChannels, last = first + kChannels < dim ? first + kChannels : dim;
    for (int64_t c = first; c < last; ++c) update_channel<T>(a, task / blocks, c);
  }
  return nullptr;
}

}  // namespace

const char* state_update(const StateArgs& a) { return a.use_double ? update<double>(a) : update<float>(a); }

}  // namespace PIXELBYTES_ISA
}  // namespace pixelbytes
