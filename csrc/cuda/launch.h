// Where a kernel runs, as the launchers take it. No CUDA headers: the bindings include this too.
#pragma once
#include <cstdint>

namespace pixelbytes::cuda {

struct Launch {
  int device;        // index of the device that holds the tensors
  uintptr_t stream;  // the caller's cudaStream_t
};

// `error` with the sizes of the call behind it, or nullptr where there is none. The sentence lives until the thread's next error.
__attribute__((format(printf, 2, 3))) const char* with_sizes(const char* error, const char* format, ...);

}  // namespace pixelbytes::cuda
