// SiLU and softplus with the hardware's exponential and division.
#pragma once
#include "device.h"

namespace pixelbytes::cuda {

__device__ inline float sigmoid(float x) { return __fdividef(1.0f, 1.0f + __expf(-x)); }

__device__ inline float silu(float x) { return x * sigmoid(x); }

// Derivative of x * sigmoid(x).
__device__ inline float silu_slope(float x) {
  const float s = sigmoid(x);
  return s * (1.0f + x * (1.0f - s));
}

// log(1 + exp(x)); above 20 it is x to the last bit.
__device__ inline float softplus(float x) { return x > 20.0f ? x : log1pf(__expf(x)); }

}  // namespace pixelbytes::cuda
