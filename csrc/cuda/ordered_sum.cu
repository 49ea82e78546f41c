// A block owns 32 columns; each of its 32 warps adds every 32nd row, then the 32 sums are added in order. 4 KB of shared memory; deterministic.
#include "ordered_sum.h"

#include "device.h"

namespace pixelbytes::cuda {
namespace {

constexpr int kColumns = 32, kWarps = 32;

__global__ void __launch_bounds__(kColumns * kWarps) ordered_sum_kernel(const float* partial, int64_t rows, int64_t columns, float* out) {
  PIXELBYTES_SHARED(float, sums, kColumns* kWarps);
  const int64_t column = int64_t(blockIdx.x) * kColumns + threadIdx.x;
  float sum = 0;
  if (column < columns) {
#pragma unroll 4
    for (int64_t row = threadIdx.y; row < rows; row += kWarps) sum += load_readonly(partial + row * columns + column);
  }
  sums[threadIdx.y * kColumns + threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y || column >= columns) return;
  for (int w = 1; w < kWarps; ++w) sum += sums[w * kColumns + threadIdx.x];
  store(out + column, sum);
}

}  // namespace

const char* ordered_sum(const Launch& at, const float* partial, int64_t rows, int64_t columns, float* out) {
  const char* error = launch("ordered_sum", ordered_sum_kernel, dim3(unsigned(ceil_div<int64_t>(columns, kColumns))), dim3(kColumns, kWarps), 0,
                             at, partial, rows, columns, out);
  return with_sizes(error, "rows=%lld, columns=%lld", (long long)rows, (long long)columns);
}

}  // namespace pixelbytes::cuda
