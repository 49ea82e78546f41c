// Decoding steps: a few thousand elements, so latency is all that counts; dtypes and strides are looked up at run time.
//   state: a channel's states lie side by side in `lanes` lanes of a warp (a power of two), its sum is a butterfly of shuffles;
//   conv:  one thread a channel.
// No shared memory; deterministic.
#include "updates.h"

#include "activation.h"

namespace pixelbytes::cuda {
namespace {

constexpr int kThreads = 128;

// A tensor of up to three dimensions and any float dtype.
struct View {
  char* data;
  DType dtype;
  int64_t stride[3];
  __device__ float operator()(int64_t i, int64_t j = 0, int64_t k = 0) const {
    return load_any(data, dtype, i * stride[0] + j * stride[1] + k * stride[2]);
  }
  __device__ void put(float v, int64_t i, int64_t j = 0, int64_t k = 0) const {
    store_any(data, dtype, i * stride[0] + j * stride[1] + k * stride[2], v);
  }
};

View view_of(const Tensor& t) { return {t.data, t.dtype, {t.stride[0], t.stride[1], t.stride[2]}}; }

bool narrow(std::initializer_list<const Tensor*> tensors) {
  for (const Tensor* t : tensors)
    if (*t && t->dtype != DType::f32 && t->dtype != DType::f16 && t->dtype != DType::bf16) return false;
  return true;
}
constexpr const char* kDTypeError = "CUDA kernels take float32, float16 and bfloat16";

struct StateParams {
  View state, x, dt, A, B, C, D, z, dt_bias, out;
  int64_t batch, dim, per_group;
  int dstate, lanes;
  bool dt_softplus;
};

__global__ void __launch_bounds__(kThreads) state_update_kernel(const StateParams p) {
  const int64_t row = (int64_t(blockIdx.x) * kThreads + threadIdx.x) / p.lanes;
  const int lane = threadIdx.x % p.lanes;
  const bool inside = row < p.batch * p.dim;
  const int64_t b = inside ? row / p.dim : 0, d = inside ? row % p.dim : 0, group = d / p.per_group;
  float x = 0.0f, y = 0.0f;
  if (inside) {
    x = p.x(b, d);
    float dt = p.dt(b, d);
    if (p.dt_bias.data) dt += p.dt_bias(d);
    if (p.dt_softplus) dt = softplus(dt);
    const float input = dt * x;
    for (int n = lane; n < p.dstate; n += p.lanes) {
      const float state = __expf(dt * p.A(d, n)) * p.state(b, d, n) + input * p.B(b, group, n);
      p.state.put(state, b, d, n);
      y += state * p.C(b, group, n);
    }
  }
  for (int k = p.lanes / 2; k > 0; k /= 2) y += __shfl_xor_sync(~0u, y, k);  // every lane of the warp comes here
  if (!inside || lane) return;
  if (p.D.data) y += p.D(d) * x;
  if (p.z.data) y *= silu(p.z(b, d));
  p.out.put(y, b, d);
}

struct ConvUpdateParams {
  View x, conv_state, weight, bias, out;
  int64_t batch, dim;
  int steps, state_len, width;
  bool silu;
};

__global__ void __launch_bounds__(kThreads) conv_update_kernel(const ConvUpdateParams p) {
  const int64_t row = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (row >= p.batch * p.dim) return;
  const int64_t b = row / p.dim, d = row % p.dim;
  for (int t = 0; t < p.steps; ++t) {
    float sum = p.bias.data ? p.bias(d) : 0.0f;
    for (int k = 0; k < p.width; ++k) {
      const int source = t + k - (p.width - 1);  // before the first step: the newest of the state
      sum += p.weight(d, k) * (source >= 0 ? p.x(b, d, source) : p.conv_state(b, d, p.state_len + source));
    }
    p.out.put(p.silu ? silu(sum) : sum, b, d, t);
  }
  for (int i = 0; i < p.state_len; ++i) {  // reads ahead of what it writes
    const int source = i + p.steps - p.state_len;
    p.conv_state.put(source >= 0 ? p.x(b, d, source) : p.conv_state(b, d, i + p.steps), b, d, i);
  }
}

}  // namespace

const char* state_update(const Launch& at, const StateArgs& a) {
  if (!narrow({&a.state, &a.x, &a.dt, &a.A, &a.B, &a.C, &a.D, &a.z, &a.dt_bias, &a.out})) return kDTypeError;
  StateParams p{};
  p.state = view_of(a.state), p.x = view_of(a.x), p.dt = view_of(a.dt), p.A = view_of(a.A), p.B = view_of(a.B), p.C = view_of(a.C);
  p.D = view_of(a.D), p.z = view_of(a.z), p.dt_bias = view_of(a.dt_bias), p.out = view_of(a.out);
  p.batch = a.x.size[0], p.dim = a.x.size[1], p.dstate = int(a.A.size[1]), p.per_group = p.dim / a.B.size[1];
  p.dt_softplus = a.dt_softplus;
  p.lanes = 1;
  while (p.lanes < 32 && p.lanes < p.dstate) p.lanes *= 2;
  const int64_t threads = p.batch * p.dim * p.lanes;
  const char* error = launch("state_update", state_update_kernel, dim3(unsigned(ceil_div<int64_t>(threads, kThreads))), dim3(kThreads), 0, at, p);
  return with_sizes(error, "batch=%lld, dim=%lld, dstate=%d", (long long)p.batch, (long long)p.dim, p.dstate);
}

const char* conv_update(const Launch& at, const ConvUpdateArgs& a) {
  if (!narrow({&a.x, &a.conv_state, &a.weight, &a.bias, &a.out})) return kDTypeError;
  ConvUpdateParams p{};
  p.x = view_of(a.x), p.conv_state = view_of(a.conv_state), p.weight = view_of(a.weight), p.bias = view_of(a.bias), p.out = view_of(a.out);
  p.batch = a.x.size[0], p.dim = a.x.size[1], p.steps = int(a.x.size[2]);
  p.state_len = int(a.conv_state.size[2]), p.width = int(a.weight.size[1]), p.silu = a.silu;
  const dim3 grid(unsigned(ceil_div<int64_t>(p.batch * p.dim, kThreads)));
  const char* error = launch("conv_update", conv_update_kernel, grid, dim3(kThreads), 0, at, p);
  return with_sizes(error, "batch=%lld, dim=%lld, steps=%d", (long long)p.batch, (long long)p.dim, p.steps);
}

}  // namespace pixelbytes::cuda
