// The kernels that stage B and C, and the choice. See scan_backward.h; the kernels lie in two files, which compile side by side.
#include "scan_backward.h"

namespace pixelbytes::cuda {

const char* selective_scan_backward(const Launch& at, const ScanArgs& args) {
  return is_direct(args) ? selective_scan_backward_direct(at, args) : launch_scan<Backward, BackwardShape, StagedCases>(at, args);
}

}  // namespace pixelbytes::cuda
