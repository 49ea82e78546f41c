// Gradient of the embedding's tables: sums of rows by key, and the small matrices between weights and table.
//
// Sums by key: the keys are sorted, so equal ones lie together. A thread owns kVec columns of one run of entries and writes one part for each
// key in it; then a thread owns kVec columns of a key and adds its parts in order. However hot a key, its work is cut into runs; one that every row
// has is known already. No atomics, no shared memory but for one block sum; deterministic.
#include "device.h"
#include "pxby_embed.h"

namespace pixelbytes::cuda {
namespace {

constexpr int kThreads = 128, kCells = 9;

struct KeySumParams {
  const float *rows, *whole;
  const char* keys;
  DType key_dtype;
  const int64_t *order, *starts;
  float *parts, *out;
  int64_t entries, known, run;
  unsigned period, lanes;  // lanes: threads side by side over the columns
  int dim;

  __device__ int64_t start(int64_t key) const { return load_value_readonly(reinterpret_cast<const long long*>(starts) + key); }
};

template <int kVec>
__device__ void add_row(const float* p, float (&sum)[kVec]) {
  float row[kVec];
  if constexpr (kVec == 1) {
    row[0] = load_readonly(p);
  } else {
    load_many_readonly<kVec>(p, row);
  }
#pragma unroll
  for (int i = 0; i < kVec; ++i) sum[i] += row[i];
}

template <int kVec>
__device__ void store_row(float* p, const float (&sum)[kVec]) {
  if constexpr (kVec == 1) {
    store(p, sum[0]);
  } else {
    store_many<kVec>(p, sum);
  }
}

// The part of key k in run c goes to row c + k: of two pairs in sorted order the later has the larger sum, so no two meet.
template <int kVec>
__global__ void __launch_bounds__(kThreads) key_parts_kernel(const KeySumParams p) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x, run = i / p.lanes;
  const int column = int(i % p.lanes) * kVec;
  int64_t first = run * p.run;
  const int64_t last = min(first + p.run, p.entries);
  while (first < last) {
    const int64_t key = load_int(p.keys, p.key_dtype, first);
    if (key >= p.known) return;  // and all that follow
    const int64_t begin = p.start(key), stop = p.start(key + 1), end = min(stop, last);
    if (!(p.whole && stop - begin == p.period)) {
      float sum[kVec] = {};
#pragma unroll 4
      for (int64_t e = first; e < end; ++e) {
        const unsigned row = unsigned(load_value_readonly(reinterpret_cast<const long long*>(p.order) + e)) % p.period;
        add_row<kVec>(p.rows + int64_t(row) * p.dim + column, sum);
      }
      store_row<kVec>(p.parts + (run + key) * p.dim + column, sum);
    }
    first = end;
  }
}

template <int kVec>
__global__ void __launch_bounds__(kThreads) key_sums_kernel(const KeySumParams p) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x, key = i / p.lanes;
  const int column = int(i % p.lanes) * kVec;
  if (key >= p.known) return;
  const int64_t begin = p.start(key), stop = p.start(key + 1);
  float sum[kVec] = {};
  if (p.whole && stop - begin == p.period) {
    add_row<kVec>(p.whole + column, sum);
  } else if (stop > begin) {
    const int64_t last = (stop - 1) / p.run;
#pragma unroll 4
    for (int64_t c = begin / p.run; c <= last; ++c) add_row<kVec>(p.parts + (c + key) * p.dim + column, sum);
  }
  store_row<kVec>(p.out + key * p.dim + column, sum);
}

struct MixingParams {
  const float *conv_weight, *conv_bias, *alpha;  // null where absent
  float* mixing;
  const float* dmixing;
  float *dconv, *dbias, *dgate;
  int width;

  // What multiplies the embedding at a cell; its convolution gets the rest of 1.
  __device__ float keep(int cell) const {
    if (alpha) return 1.0f / (1.0f + expf(-load_readonly(alpha + cell)));
    return conv_weight ? 0.5f : 1.0f;
  }
};

__global__ void __launch_bounds__(kThreads) mixing_kernel(const MixingParams p) {
  const int size = kCells * p.width, i = blockIdx.x * kThreads + threadIdx.x, row = i / size, column = i % size;
  if (row > size) return;
  const int cell_in = row % kCells, cell = column % kCells, channel = column / kCells;
  const float keep = p.keep(cell), mix = 1.0f - keep;
  float value = row == column ? keep : 0.0f;
  if (p.conv_weight && row < size) {
    const int dy = cell_in / 3 - cell / 3 + 1, dx = cell_in % 3 - cell % 3 + 1;
    if (dy >= 0 && dy < 3 && dx >= 0 && dx < 3)
      value += mix * load_readonly(p.conv_weight + (int64_t(channel) * p.width + row / kCells) * kCells + dy * 3 + dx);
  }
  if (p.conv_bias && row == size) value += mix * load_readonly(p.conv_bias + channel);
  store(p.mixing + int64_t(row) * size + column, value);
}

// A block owns one channel out. Shared memory: the block sum over nine cells, 144 bytes.
__global__ void __launch_bounds__(kThreads) mixing_backward_kernel(const MixingParams p) {
  constexpr int kWarps = kThreads / 32;
  PIXELBYTES_SHARED(float, sums, kWarps* kCells);
  const int size = kCells * p.width, channel = blockIdx.x;
  float dmix[kCells] = {};
  if (p.conv_weight) {
    for (int j = threadIdx.x; j < size; j += kThreads) {  // (channel in, tap)
      const int in = j / kCells, tap = j % kCells;
      const float weight = load_readonly(p.conv_weight + int64_t(channel) * size + j);
      float total = 0.0f;
#pragma unroll
      for (int cell = 0; cell < kCells; ++cell) {
        const int y = cell / 3 + tap / 3 - 1, x = cell % 3 + tap % 3 - 1;
        if (y < 0 || y > 2 || x < 0 || x > 2) continue;
        const float d = load_readonly(p.dmixing + int64_t(in * kCells + y * 3 + x) * size + channel * kCells + cell);
        total += (1.0f - p.keep(cell)) * d;
        dmix[cell] += weight * d;
      }
      store(p.dconv + int64_t(channel) * size + j, total);
    }
  }
#pragma unroll
  for (int cell = 0; cell < kCells; ++cell) {
    for (int k = 16; k > 0; k /= 2) dmix[cell] += __shfl_xor_sync(~0u, dmix[cell], k);
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32 * kCells + cell] = dmix[cell];
  }
  __syncthreads();
  if (threadIdx.x) return;
  const float bias = p.conv_bias ? load_readonly(p.conv_bias + channel) : 0.0f;
  float dbias = 0.0f;
  for (int cell = 0; cell < kCells; ++cell) {
    const float keep = p.keep(cell), mix = 1.0f - keep;
    const int column = channel * kCells + cell;
    float sum = 0.0f;
    for (int w = 0; w < kWarps; ++w) sum += sums[w * kCells + cell];
    if (p.conv_bias) {
      const float d = load_readonly(p.dmixing + int64_t(size) * size + column);
      dbias += mix * d, sum += bias * d;
    }
    if (p.dgate) store(p.dgate + column, keep * mix * (load_readonly(p.dmixing + int64_t(column) * size + column) - sum));
  }
  if (p.dbias) store(p.dbias + channel, dbias);
}

template <class T = float>
T* data(const Tensor& t) { return reinterpret_cast<T*>(t.data); }

dim3 blocks_for(int64_t threads) { return dim3(unsigned(ceil_div<int64_t>(threads, kThreads))); }

MixingParams params_of(const MixingArgs& a, const Tensor& matrix) {
  MixingParams p{};
  p.conv_weight = data(a.conv_weight), p.conv_bias = data(a.conv_bias), p.alpha = data(a.alpha);
  p.mixing = data(a.mixing), p.dmixing = data(a.dmixing), p.dconv = data(a.dconv), p.dbias = data(a.dbias), p.dgate = data(a.dgate);
  p.width = int(matrix.size[1]) / kCells;
  return p;
}

}  // namespace

const char* sums_by_key(const Launch& at, const KeySumArgs& a) {
  KeySumParams p{};
  p.rows = data(a.rows), p.whole = data(a.whole), p.keys = a.keys.data, p.key_dtype = a.keys.dtype;
  p.order = data<int64_t>(a.order), p.starts = data<int64_t>(a.starts), p.parts = data(a.parts), p.out = data(a.out);
  p.entries = a.keys.size[0], p.known = a.out.size[0], p.run = a.run;
  p.period = unsigned(a.rows.size[0]), p.dim = int(a.rows.size[1]);
  if (p.entries > 0xffffffff) return "pxby_embed: more than 2^32 cells; split the batch";
  const bool packets = p.dim % 4 == 0;
  p.lanes = unsigned(packets ? p.dim / 4 : p.dim);
  const int64_t runs = ceil_div(p.entries, p.run);
  const char* error = launch("embed_key_parts", packets ? key_parts_kernel<4> : key_parts_kernel<1>, blocks_for(runs * p.lanes), dim3(kThreads), 0, at, p);
  if (!error)
    error = launch("embed_key_sums", packets ? key_sums_kernel<4> : key_sums_kernel<1>, blocks_for(p.known * p.lanes), dim3(kThreads), 0, at, p);
  return with_sizes(error, "rows=%u, D=%d, keys=%lld", p.period, p.dim, (long long)p.known);
}

const char* embed_mixing(const Launch& at, const MixingArgs& a) {
  const MixingParams p = params_of(a, a.mixing);
  const char* error = launch("embed_mixing", mixing_kernel, blocks_for(a.mixing.size[0] * a.mixing.size[1]), dim3(kThreads), 0, at, p);
  return with_sizes(error, "E=%d", p.width);
}

const char* embed_mixing_backward(const Launch& at, const MixingArgs& a) {
  const MixingParams p = params_of(a, a.dmixing);
  const char* error = launch("embed_mixing_backward", mixing_backward_kernel, dim3(unsigned(p.width)), dim3(kThreads), 0, at, p);
  return with_sizes(error, "E=%d", p.width);
}

}  // namespace pixelbytes::cuda
