// The roof a benchmark measures against: vector multiply-adds a second of one core, from independent chains in registers.
#include <chrono>

#include "cpu/kernels.h"
#include "cpu/simd.h"

namespace pixelbytes {
namespace PIXELBYTES_ISA {

namespace {

// Each chain is a variable of its own: as elements of an array they would live in memory, and the rate would be that of the stores. What the
// compiler cannot see through keeps them apart: it takes equal chains for one, whose time then counts ten times.
inline void multiply_add(vf& chain, vf factor) {
  chain = chain * factor + factor;
#if defined(__AVX512F__)
  asm volatile("" : "+v"(chain));
#elif defined(__x86_64__)
  asm volatile("" : "+x"(chain));
#endif
}

}  // namespace

double fma_rate(double seconds) {
  vf a = splat(1.0f), b = a, c = a, d = a, e = a, f = a, g = a, h = a, i = a, j = a;  // two pipes of latency 4 want eight chains or more
  const vf x = splat(0.999f);
  const auto start = std::chrono::steady_clock::now();
  double elapsed = 0;
  int64_t done = 0;
  while (elapsed < seconds) {
    for (int round = 0; round < 10000; ++round) {
      multiply_add(a, x), multiply_add(b, x), multiply_add(c, x), multiply_add(d, x), multiply_add(e, x);
      multiply_add(f, x), multiply_add(g, x), multiply_add(h, x), multiply_add(i, x), multiply_add(j, x);
    }
    done += 10 * 10000;
    elapsed = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  }
  const vf sum = a + b + c + d + e + f + g + h + i + j;
  return sum[0] == 0.5f ? 0.0 : double(done) / elapsed;  // the sum is used, so the chains are kept
}

}  // namespace PIXELBYTES_ISA
}  // namespace pixelbytes
