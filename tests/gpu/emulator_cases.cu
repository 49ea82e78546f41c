// Small kernels, right and wrong, that show what the emulator of gpu_checks/emulator finds. Called by test_emulator.py through ctypes.
#include "cuda/device.h"

namespace pixelbytes::cuda {
namespace {

constexpr int kBlock = 96;  // three warps

// out[i] = the value of the thread opposite in the block, through shared memory; `barrier` off: a race.
__global__ void mirror(const float* in, float* out, bool barrier) {
  float* shared = shared_memory<float>();
  const int i = threadIdx.x, block = blockIdx.x * kBlock;
  shared[i] = load(in + block + i);
  if (barrier) __syncthreads();
  store(out + block + i, shared[kBlock - 1 - i]);
}

// Sum of a block by shuffles and a static shared array.
__global__ void block_sum(const float* in, float* out) {
  PIXELBYTES_SHARED(float, sums, kBlock / 32);
  float v = load_readonly(in + blockIdx.x * kBlock + threadIdx.x);
  for (int k = 16; k > 0; k /= 2) v += __shfl_xor_sync(~0u, v, k);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = v;
  __syncthreads();
  if (threadIdx.x == 0) store(out + blockIdx.x, sums[0] + sums[1] + sums[2]);
}

// out (8, 32): what each lane gets from the collectives.
__global__ void collectives(float* out) {
  const int lane = threadIdx.x;
  const float v = float(lane);
  store(out + lane, __shfl_up_sync(~0u, v, 3));
  store(out + 32 + lane, __shfl_down_sync(~0u, v, 3));
  store(out + 64 + lane, __shfl_xor_sync(~0u, v, 5));
  store(out + 96 + lane, __shfl_sync(~0u, v, lane + 1, 8));
  store(out + 128 + lane, __shfl_up_sync(~0u, v, 3, 8));
  store(out + 160 + lane, __shfl_down_sync(~0u, v, 3, 8));
  store(out + 192 + lane, float(__popc(__ballot_sync(~0u, lane % 3 == 0))));
  if (lane < 8) store(out + 224 + lane, __shfl_sync(0xffu, v, 7 - lane) + float(__any_sync(0xffu, lane == 7)));
}

__global__ void reads_at(const float* in, float* out, int64_t index, bool raw) { store(out, raw ? in[index] : load(in + index)); }
__global__ void writes_at(float* out, int64_t index) { store(out + index, 1.0f); }
__global__ void reads_packet(const float* in, float* out, int64_t index) {
  float v[4];
  load_many<4>(in + index, v);
  store(out, v[0]);
}
__global__ void reads_its_own_output(float* out) {
  store(out + threadIdx.x, 1.0f);
  store(out + threadIdx.x, load_readonly(out + threadIdx.x) + 1.0f);
}
__global__ void uninitialised(float* out) { store(out + threadIdx.x, shared_memory<float>()[threadIdx.x]); }
__global__ void half_waits() {
  if (threadIdx.x < 16) __syncthreads();
  else __syncwarp();
}
__global__ void lane_missing(float* out) {
  if (threadIdx.x == 5) return;
  store(out, __shfl_sync(~0u, 1.0f, 0));
}
__global__ void beyond_shared_array(float* out) {
  PIXELBYTES_SHARED(float, four, 4);
  four[threadIdx.x] = 1.0f;
  __syncthreads();
  store(out + threadIdx.x, four[threadIdx.x]);
}
__global__ void beyond_dynamic_memory() { shared_memory<float>()[threadIdx.x + 32] = 1.0f; }
__global__ void adds_across_blocks(float* out) { store(out, 2.0f * load(out) + float(blockIdx.x)); }  // no atomics, no order: a race
template <class T>
__global__ void rounds(const float* in, T* out, float* back) {
  const int i = blockIdx.x * kBlock + threadIdx.x;
  store(out + i, load(in + i));
  store(back + i, load(out + i));
}

const Launch kHere{0, 0};

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

void* case_tensor(void* data, int64_t item, int64_t size, int64_t stride) { return emulator::guarded(data, item, 1, &size, &stride); }
const char* case_write_back() { return emulator::write_back(); }
void case_configure(int order, uint64_t seed, bool at_end) { emulator::configure(emulator::Order(order), seed, at_end); }

const char* case_mirror(const float* in, float* out, int blocks, bool barrier) {
  return launch("mirror", mirror, blocks, kBlock, kBlock * sizeof(float), kHere, in, out, barrier);
}
const char* case_block_sum(const float* in, float* out, int blocks) { return launch("block_sum", block_sum, blocks, kBlock, 0, kHere, in, out); }
const char* case_collectives(float* out) { return launch("collectives", collectives, 1, 32, 0, kHere, out); }
const char* case_reads_at(const float* in, float* out, int64_t index, bool raw) {
  return launch("reads_at", reads_at, 1, 1, 0, kHere, in, out, index, raw);
}
const char* case_writes_at(float* out, int64_t index) { return launch("writes_at", writes_at, 1, 1, 0, kHere, out, index); }
const char* case_reads_packet(const float* in, float* out, int64_t index) {
  return launch("reads_packet", reads_packet, 1, 1, 0, kHere, in, out, index);
}
const char* case_reads_its_own_output(float* out) { return launch("reads_its_own_output", reads_its_own_output, 1, 32, 0, kHere, out); }
const char* case_uninitialised(float* out) { return launch("uninitialised", uninitialised, 1, 32, 128, kHere, out); }
const char* case_half_waits() { return launch("half_waits", half_waits, 1, 32, 0, kHere); }
const char* case_lane_missing(float* out) { return launch("lane_missing", lane_missing, 1, 32, 0, kHere, out); }
const char* case_beyond_shared_array(float* out) { return launch("beyond_shared_array", beyond_shared_array, 1, 5, 0, kHere, out); }
const char* case_beyond_dynamic_memory() { return launch("beyond_dynamic_memory", beyond_dynamic_memory, 1, 32, 128, kHere); }
const char* case_much_shared() { return launch("uninitialised", uninitialised, 1, 32, 65 * 1024, kHere, static_cast<float*>(nullptr)); }
const char* case_large_block() { return launch("half_waits", half_waits, 1, 2048, 0, kHere); }
const char* case_adds_across_blocks(float* out) { return launch("adds_across_blocks", adds_across_blocks, 8, 1, 0, kHere, out); }
const char* case_half(const float* in, __half* out, float* back, int blocks) {
  return launch("rounds", rounds<__half>, blocks, kBlock, 0, kHere, in, out, back);
}
const char* case_bfloat16(const float* in, __nv_bfloat16* out, float* back, int blocks) {
  return launch("rounds", rounds<__nv_bfloat16>, blocks, kBlock, 0, kHere, in, out, back);
}
}
#pragma GCC visibility pop

}  // namespace pixelbytes::cuda
