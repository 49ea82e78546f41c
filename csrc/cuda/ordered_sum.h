// Sum over the rows of an fp32 matrix in an order that depends on its shape alone: the last step of every gradient that many blocks add to.
#pragma once
#include <cstdint>

#include "launch.h"

namespace pixelbytes::cuda {

// out[column] = sum over rows of partial[row * columns + column].
const char* ordered_sum(const Launch& at, const float* partial, int64_t rows, int64_t columns, float* out);

}  // namespace pixelbytes::cuda
