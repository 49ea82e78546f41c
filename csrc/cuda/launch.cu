// Errors of launches as sentences, and what the module says about devices.
#include <cstdarg>
#include <cstdio>

#include "device.h"
#include "devices.h"

namespace pixelbytes::cuda {
namespace {
thread_local char g_sentence[1024];
}

const char* launch_error(const char* kernel, dim3 grid, dim3 block, size_t shared_bytes, const char* reason) {
  if (!reason) return nullptr;
  char copy[512];  // the reason may stand in g_sentence
  snprintf(copy, sizeof copy, "%s", reason);
  snprintf(g_sentence, sizeof g_sentence, "CUDA kernel %s cannot run: %s; grid (%u, %u, %u), block (%u, %u, %u), %zu bytes of shared memory",
           kernel, copy, grid.x, grid.y, grid.z, block.x, block.y, block.z, shared_bytes);
  return g_sentence;
}

const char* with_sizes(const char* error, const char* format, ...) {
  if (!error) return nullptr;
  char joined[sizeof g_sentence];
  const int length = snprintf(joined, sizeof joined, "%s; ", error);
  if (length > 0 && size_t(length) < sizeof joined) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(joined + length, sizeof joined - size_t(length), format, arguments);
    va_end(arguments);
  }
  snprintf(g_sentence, sizeof g_sentence, "%s", joined);
  return g_sentence;
}

#ifdef PIXELBYTES_EMULATE
int device_count(const char** reason) {
  *reason = nullptr;
  return 1;
}
#else
int device_count(const char** reason) {
  int count = 0;  // stays as it is where there is no driver
  const cudaError_t status = cudaGetDeviceCount(&count);
  *reason = status == cudaSuccess ? nullptr : cudaGetErrorString(status);
  if (status != cudaSuccess) cudaGetLastError();  // so that no later launch reports it
  return status == cudaSuccess ? count : 0;
}
#endif

}  // namespace pixelbytes::cuda
