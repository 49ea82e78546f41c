// The kernels that read B and C from global memory. See scan_backward.h.
#include "scan_backward.h"

namespace pixelbytes::cuda {

const char* selective_scan_backward_direct(const Launch& at, const ScanArgs& args) {
  return launch_scan<Backward, BackwardShape, DirectCases>(at, args);
}

}  // namespace pixelbytes::cuda
