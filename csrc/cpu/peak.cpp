// The roof a benchmark measures against: vector multiply-adds a second of one core, from independent chains in registers.
#include <chrono>

#include "cpu/kernels.h"
#include "cpu/simd.h"

namespace pixelbytes {
namespace PIXELBYTES_ISA {

namespace {

// Each chain is a variable of its own: as elements of an array they would live in memory, and the rate would be that of the stores.
inline void multiply_add(vf& chain, vf factor) {
  chain = chain * factor + factor;
#if defined(__AVX512F__)
  asm volatile("" : "+v"(chain));  // keeps the chains apart
#elif defined(__x86_64__)
  asm volatile("" : "+x"(chain));
#endif
}

}  // namespace

double fma_rate(double seconds) {
  constexpr int kRounds = 10000, kChains = 12;  // two pipes of latency 4 want 8 chains
  const vf factor = splat(0.999f);
  vf a = splat(0.0f), b = splat(1.0f), c = splat(2.0f), d = splat(3.0f), e = splat(4.0f), f = splat(5.0f);
  vf g = splat(6.0f), h = splat(7.0f), i = splat(8.0f), j = splat(9.0f), k = splat(10.0f), l = splat(11.0f);
  const auto start = std::chrono::steady_clock::now();
  double elapsed = 0;
  int64_t done = 0;
  while (elapsed < seconds) {
    for (int round = 0; round < kRounds; ++round) {
      multiply_add(a, factor), multiply_add(b, factor), multiply_add(c, factor), multiply_add(d, factor);
      multiply_add(e, factor), multiply_add(f, factor), multiply_add(g, factor), multiply_add(h, factor);
      multiply_add(i, factor), multiply_add(j, factor), multiply_add(k, factor), multiply_add(l, factor);
    }
    done += kRounds * kChains;
    elapsed = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  }
  const vf sum = a + b + c + d + e + f + g + h + i + j + k + l;
  return sum[0] == 0.5f ? 0.0 : double(done) / elapsed;
}

}  // namespace PIXELBYTES_ISA
}  // namespace pixelbytes
