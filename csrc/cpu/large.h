// Outputs too large for the caches: huge pages for them, and whether to write them past the caches.
#pragma once
#include "tensor.h"
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace pixelbytes {
namespace {

constexpr int64_t kHugePagesFrom = int64_t(4) << 20, kStreamFrom = int64_t(8) << 20;  // bytes; at 4 MiB streams neither gained nor lost

// Memory that a tensor spans; 0 where it is empty or a stride is negative.
inline int64_t span_bytes(const Tensor& t) {
  if (!t) return 0;
  int64_t last = 0;
  for (int i = 0; i < t.ndim; ++i) {
    if (t.size[i] == 0 || t.stride[i] < 0) return 0;
    last += (t.size[i] - 1) * t.stride[i];
  }
  return (last + 1) * item_size(t.dtype);
}

// To be called before fresh memory is written. malloc hands large blocks back to the system, so that the next output faults in anew, page by
// page of 4 KiB; on many a Linux, huge pages are for those who ask. Measured on a virtual machine, fp32, one thread, forward and gradients of
// selective_scan, (batch, dim, seqlen): (8, 1024, 1024) 337 -> 270 ms, (8, 512, 1024) 153 -> 135 ms. Less memory costs
// no system call. A refusal changes nothing but time: ignored.
inline void ask_for_huge_pages([[maybe_unused]] const void* data, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = uintptr_t(2) << 20;
  if (bytes < kHugePagesFrom) return;
  // Whole huge pages inside only: what lies beside it is not ours.
  const uintptr_t at = reinterpret_cast<uintptr_t>(data), begin = (at + kPage - 1) / kPage * kPage, end = (at + uintptr_t(bytes)) / kPage * kPage;
  (void)madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}
inline void ask_for_huge_pages(const Tensor& t) { ask_for_huge_pages(t.data, span_bytes(t)); }

}  // namespace
}  // namespace pixelbytes
