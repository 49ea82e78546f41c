// Gather of nine table rows and LayerNorm in one pass, and its gradient up to the rows. `lanes` lanes of a warp (a power of two) share a
// token and hold its D values in registers, kPackets packets of kVec each; packet k of lane l starts at column (l + k * lanes) * kVec.
// No shared memory; deterministic: the sums for norm_weight, norm_bias and shift are kept per group of lanes and added in order.
#include "pxby_embed.h"

#include "dispatch.h"
#include "ordered_sum.h"

namespace pixelbytes::cuda {
namespace {

constexpr int kThreads = 128, kCells = 9;

template <class T>
struct EmbedParams {
  const char* tokens;
  DType token_dtype;
  int64_t token_batch, token_time, token_row, token_column;
  const T* table;
  const float *shift, *norm_weight, *norm_bias;
  T* out;
  const T* dout;
  float *dpre, *partial;
  char* keys;
  DType key_dtype;
  unsigned count, seqlen, groups;  // groups: of lanes, in the whole grid
  int dim, lanes;
  int64_t vocab;
  float eps;

  __device__ int64_t token(unsigned n) const { return int64_t(n / seqlen) * token_batch + int64_t(n % seqlen) * token_time; }
  __device__ int64_t cell(int p) const { return p / 3 * token_row + p % 3 * token_column; }
};

template <class T, class Id>
__device__ void load_ids(const EmbedParams<T>& p, int64_t token, int64_t (&id)[kCells]) {
#pragma unroll
  for (int c = 0; c < kCells; ++c) id[c] = load_value_readonly(reinterpret_cast<const Id*>(p.tokens) + token + p.cell(c));
}

template <class T>
__device__ void load_ids(const EmbedParams<T>& p, int64_t token, int64_t (&id)[kCells]) {
  switch (p.token_dtype) {
    case DType::u8: return load_ids<T, uint8_t>(p, token, id);
    case DType::i8: return load_ids<T, signed char>(p, token, id);
    case DType::i16: return load_ids<T, int16_t>(p, token, id);
    case DType::i32: return load_ids<T, int32_t>(p, token, id);
    default: return load_ids<T, long long>(p, token, id);
  }
}

template <int kVec, class T>
__device__ void load_packet(const T* p, float (&v)[kVec]) {
  if constexpr (kVec == 1) {
    v[0] = load_readonly(p);
  } else {
    load_many_readonly<kVec>(p, v);
  }
}
template <int kVec, class T>
__device__ void store_packet(T* p, const float (&v)[kVec]) {
  if constexpr (kVec == 1) {
    store(p, v[0]);
  } else {
    store_many<kVec>(p, v);
  }
}

// Sum over the lanes that share a token. All lanes of the warp must come here.
__device__ inline float over_lanes(float v, int lanes) {
  for (int k = lanes / 2; k > 0; k /= 2) v += __shfl_xor_sync(~0u, v, k);
  return v;
}

// The values of token n minus their mean, and 1 / deviation. NaN for an id outside the vocabulary, which reads nothing.
template <class T, int kVec, int kPackets>
__device__ float gathered(const EmbedParams<T>& p, unsigned n, int lane, float (&v)[kPackets][kVec]) {
  int64_t id[kCells];
  load_ids(p, p.token(n), id);
  bool known = true;
#pragma unroll
  for (int c = 0; c < kCells; ++c) known &= id[c] >= 0 && id[c] < p.vocab;
  float sum = 0.0f;
#pragma unroll
  for (int k = 0; k < kPackets; ++k) {
    const int column = (lane + k * p.lanes) * kVec;
#pragma unroll
    for (int i = 0; i < kVec; ++i) v[k][i] = 0.0f;
    if (column >= p.dim) continue;
    load_packet<kVec>(p.shift + column, v[k]);
    if (known) {
#pragma unroll
      for (int c = 0; c < kCells; ++c) {
        float row[kVec];
        load_packet<kVec>(p.table + (id[c] * kCells + c) * p.dim + column, row);
#pragma unroll
        for (int i = 0; i < kVec; ++i) v[k][i] += row[i];
      }
    }
#pragma unroll
    for (int i = 0; i < kVec; ++i) sum += v[k][i];
  }
  float mean = over_lanes(sum, p.lanes) / p.dim;
  if (!known) mean = __int_as_float(0x7fffffff);  // NaN
  float squares = 0.0f;
#pragma unroll
  for (int k = 0; k < kPackets; ++k) {
    if ((lane + k * p.lanes) * kVec >= p.dim) continue;
#pragma unroll
    for (int i = 0; i < kVec; ++i) v[k][i] -= mean, squares += v[k][i] * v[k][i];
  }
  return rsqrtf(over_lanes(squares, p.lanes) / p.dim + p.eps);
}

template <class T, int kVec, int kPackets>
__global__ void __launch_bounds__(kThreads) embed_forward_kernel(const EmbedParams<T> p) {
  if constexpr (!kRunsHere<T>) return;
  const unsigned lane = threadIdx.x % p.lanes, n = blockIdx.x * (kThreads / p.lanes) + threadIdx.x / p.lanes;
  float v[kPackets][kVec];
  const float scale = gathered<T, kVec, kPackets>(p, min(n, p.count - 1), lane, v);  // lanes without a token follow the last one
  if (n >= p.count) return;
#pragma unroll
  for (int k = 0; k < kPackets; ++k) {
    const int column = (lane + k * p.lanes) * kVec;
    if (column >= p.dim) continue;
    float weight[kVec], bias[kVec];
    load_packet<kVec>(p.norm_weight + column, weight);
    load_packet<kVec>(p.norm_bias + column, bias);
#pragma unroll
    for (int i = 0; i < kVec; ++i) v[k][i] = v[k][i] * scale * weight[i] + bias[i];
    store_packet<kVec>(p.out + int64_t(n) * p.dim + column, v[k]);
  }
}

template <class T, int kVec, int kPackets>
__global__ void __launch_bounds__(kThreads) embed_backward_kernel(const EmbedParams<T> p) {
  if constexpr (!kRunsHere<T>) return;
  const unsigned lane = threadIdx.x % p.lanes, group = blockIdx.x * (kThreads / p.lanes) + threadIdx.x / p.lanes;
  float dweight[kPackets][kVec] = {}, dbias[kPackets][kVec] = {}, dshift[kPackets][kVec] = {};
  for (unsigned first = 0; first < p.count; first += p.groups) {
    const bool inside = p.count - first > group;
    const unsigned n = inside ? first + group : p.count - 1;
    float v[kPackets][kVec], g[kPackets][kVec];
    const float scale = gathered<T, kVec, kPackets>(p, n, lane, v);
    float mean = 0.0f, slope = 0.0f;
#pragma unroll
    for (int k = 0; k < kPackets; ++k) {
      const int column = (lane + k * p.lanes) * kVec;
#pragma unroll
      for (int i = 0; i < kVec; ++i) g[k][i] = 0.0f;
      if (column >= p.dim || !inside) continue;
      float weight[kVec];
      load_packet<kVec>(p.dout + int64_t(n) * p.dim + column, g[k]);
      load_packet<kVec>(p.norm_weight + column, weight);
#pragma unroll
      for (int i = 0; i < kVec; ++i) {
        v[k][i] *= scale;
        dweight[k][i] += g[k][i] * v[k][i];
        dbias[k][i] += g[k][i];
        g[k][i] *= weight[i];
        mean += g[k][i];
        slope += g[k][i] * v[k][i];
      }
    }
    mean = over_lanes(mean, p.lanes) / p.dim;
    slope = over_lanes(slope, p.lanes) / p.dim;
    if (!inside) continue;
#pragma unroll
    for (int k = 0; k < kPackets; ++k) {
      const int column = (lane + k * p.lanes) * kVec;
      if (column >= p.dim) continue;
#pragma unroll
      for (int i = 0; i < kVec; ++i) {
        g[k][i] = scale * (g[k][i] - mean - v[k][i] * slope);
        dshift[k][i] += g[k][i];
      }
      store_packet<kVec>(p.dpre + int64_t(n) * p.dim + column, g[k]);
    }
    for (int c = lane; c < kCells; c += p.lanes) {
      const int64_t id = load_int(p.tokens, p.token_dtype, p.token(n) + p.cell(c)), at = int64_t(c) * p.count + n;
      const int key = int(id >= 0 && id < p.vocab ? id * kCells + c : p.vocab * kCells);
      if (p.key_dtype == DType::i16)
        store_value(reinterpret_cast<int16_t*>(p.keys) + at, int16_t(key));
      else
        store_value(reinterpret_cast<int32_t*>(p.keys) + at, key);
    }
  }
#pragma unroll
  for (int k = 0; k < kPackets; ++k) {
    const int column = (lane + k * p.lanes) * kVec;
    if (column >= p.dim) continue;
    float* to = p.partial + int64_t(group) * 3 * p.dim + column;
    store_packet<kVec>(to, dweight[k]);
    store_packet<kVec>(to + p.dim, dbias[k]);
    store_packet<kVec>(to + 2 * p.dim, dshift[k]);
  }
}

// How D values are spread over registers and lanes.
struct Spread {
  int vec, packets, lanes;
};

Spread spread_of(int64_t dim) {
  Spread s{dim % 4 ? 1 : 4, 8, 1};
  if (s.vec == 4 && dim <= 256) s.packets = 2;
  while (s.lanes < 32 && int64_t(s.lanes) * s.packets * s.vec < dim) s.lanes *= 2;
  return s;
}

template <class T>
EmbedParams<T> params_of(const EmbedArgs& a) {
  EmbedParams<T> p{};
  p.tokens = a.tokens.data, p.token_dtype = a.tokens.dtype;
  p.token_batch = a.tokens.stride[0], p.token_time = a.tokens.stride[1], p.token_row = a.tokens.stride[2], p.token_column = a.tokens.stride[3];
  p.table = reinterpret_cast<const T*>(a.table.data), p.shift = reinterpret_cast<const float*>(a.shift.data);
  p.norm_weight = reinterpret_cast<const float*>(a.norm_weight.data), p.norm_bias = reinterpret_cast<const float*>(a.norm_bias.data);
  p.out = reinterpret_cast<T*>(a.out.data), p.dout = reinterpret_cast<const T*>(a.dout.data);
  p.dpre = reinterpret_cast<float*>(a.dpre.data), p.partial = reinterpret_cast<float*>(a.partial.data);
  p.keys = a.keys.data, p.key_dtype = a.keys.dtype;
  p.count = unsigned(a.tokens.size[0] * a.tokens.size[1]), p.seqlen = unsigned(a.tokens.size[1]);
  p.vocab = a.table.size[0], p.dim = int(a.table.size[2]), p.lanes = spread_of(p.dim).lanes, p.eps = float(a.eps);
  return p;
}

template <class T>
using Kernel = void (*)(EmbedParams<T>);

template <class T>
const char* launch_spread(const char* name, Kernel<T> two, Kernel<T> eight, Kernel<T> single, const EmbedParams<T>& p, unsigned groups,
                          const Launch& at) {
  const Spread s = spread_of(p.dim);
  const Kernel<T> kernel = s.vec == 1 ? single : s.packets == 2 ? two : eight;
  return launch(name, kernel, dim3(ceil_div(groups, unsigned(kThreads / s.lanes))), dim3(kThreads), 0, at, p);
}

const char* refused(const EmbedArgs& a) {
  int64_t lanes;
  if (const char* error = embed_groups(a.table.size[2], &lanes)) return error;
  return a.tokens.size[0] * a.tokens.size[1] >= int64_t(1) << 31 ? "pxby_embed: more than 2^31 tokens; split the batch" : nullptr;
}

const char* sizes_behind(const char* error, const EmbedArgs& a) {
  return with_sizes(error, "batch=%lld, seqlen=%lld, vocab=%lld, D=%lld", (long long)a.tokens.size[0], (long long)a.tokens.size[1],
                    (long long)a.table.size[0], (long long)a.table.size[2]);
}

}  // namespace

const char* embed_groups(int64_t dim, int64_t* lanes) {
  const Spread s = spread_of(dim);
  *lanes = s.lanes;
  return int64_t(s.lanes) * s.packets * s.vec < dim ? "pxby_embed: D is too large for the fused kernels" : nullptr;
}

const char* embed_forward(const Launch& at, const EmbedArgs& a) {
  const char* error = refused(a);
  if (error) return error;
  PIXELBYTES_DISPATCH_FLOAT(a.table.dtype, T, {
    const EmbedParams<T> p = params_of<T>(a);
    error = launch_spread<T>("embed_forward", embed_forward_kernel<T, 4, 2>, embed_forward_kernel<T, 4, 8>, embed_forward_kernel<T, 1, 8>, p, p.count, at);
  })
  return sizes_behind(error, a);
}

const char* embed_backward(const Launch& at, const EmbedArgs& a) {
  const char* error = refused(a);
  if (error) return error;
  const int64_t groups = a.partial.size[0];
  PIXELBYTES_DISPATCH_FLOAT(a.table.dtype, T, {
    EmbedParams<T> p = params_of<T>(a);
    p.groups = unsigned(groups);
    error = launch_spread<T>("embed_backward", embed_backward_kernel<T, 4, 2>, embed_backward_kernel<T, 4, 8>, embed_backward_kernel<T, 1, 8>, p,
                             p.groups, at);
  })
  if (!error) error = ordered_sum(at, reinterpret_cast<const float*>(a.partial.data), groups, 3 * a.table.size[2], reinterpret_cast<float*>(a.sums.data));
  return sizes_behind(error, a);
}

}  // namespace pixelbytes::cuda
