// What the module knows about devices without torch.
#pragma once

namespace pixelbytes::cuda {

// Number of CUDA devices; 0 and a reason where there is none, or no driver.
int device_count(const char** reason);

}  // namespace pixelbytes::cuda
