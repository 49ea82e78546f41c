// The roof a benchmark measures against: vector multiply-adds a second of one core, from independent chains in registers.
#include <chrono>

#include "cpu/kernels.h"
#include "cpu/simd.h"

namespace pixelbytes {
namespace PIXELBYTES_ISA {

double fma_rate(double seconds) {
  constexpr int kChains = 12;
  vf chain[kChains];
  for (int i = 0; i < kChains; ++i) chain[i] = splat(float(i));
  const vf factor = splat(0.999f);
  const auto start = std::chrono::steady_clock::now();
  double elapsed = 0;
  int64_t done = 0;
  while (elapsed < seconds) {
    for (int round = 0; round < 10000; ++round) {
#pragma GCC unroll 12
      for (int i = 0; i < kChains; ++i) {
        chain[i] = chain[i] * factor + factor;
#if defined(__AVX512F__)
        asm volatile("" : "+v"(chain[i]));  // keeps the chains apart and in registers
#elif defined(__x86_64__)
        asm volatile("" : "+x"(chain[i]));
#endif
      }
    }
    done += 10000 * kChains;
    elapsed = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  }
  vf sum = {};
  for (int i = 0; i < kChains; ++i) sum += chain[i];
  return sum[0] == 0.5f ? 0.0 : double(done) / elapsed;
}

}  // namespace PIXELBYTES_ISA
}  // namespace pixelbytes
