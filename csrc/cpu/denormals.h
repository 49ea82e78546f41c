// Denormal numbers, in float those below 1.2e-38, count as zero while an object of this class lives in a thread.
//
// An instruction that meets one takes some hundred cycles on many processors, and a state that nothing feeds any more, as behind a row's
// zero padding, decays into them and stays: rounding keeps it above zero. Measured, a scan of 128 channels over 2048 steps of which the last
// 1792 were zero: forward 88 -> 5.2 ms, backward 89 -> 10 ms.
#pragma once
#include <cstdint>

namespace pixelbytes {
namespace {

class FlushDenormals {
 public:
  FlushDenormals() : before_(get()) { set(before_ | kFlush); }
  ~FlushDenormals() { set(before_); }
  FlushDenormals(const FlushDenormals&) = delete;

 private:
  // "memory": nothing that is loaded or stored inside moves out.
#if defined(__x86_64__)
  using Control = uint32_t;
  static constexpr Control kFlush = 0x8040;  // results (FTZ) and operands (DAZ)
  static Control get() {
    Control c;
    asm volatile("stmxcsr %0" : "=m"(c)::"memory");
    return c;
  }
  static void set(Control c) { asm volatile("ldmxcsr %0" ::"m"(c) : "memory"); }
#elif defined(__aarch64__)
  using Control = uint64_t;
  static constexpr Control kFlush = 1 << 24;
  static Control get() {
    Control c;
    asm volatile("mrs %0, fpcr" : "=r"(c)::"memory");
    return c;
  }
  static void set(Control c) { asm volatile("msr fpcr, %0" ::"r"(c) : "memory"); }
#else
  using Control = int;
  static constexpr Control kFlush = 0;
  static Control get() { return 0; }
  static void set(Control) {}
#endif
  Control before_;
};

}  // namespace
}  // namespace pixelbytes
