// From a run-time dtype to a template argument.
#pragma once
#include "device.h"

// Runs the statement with `T` as float, __half or __nv_bfloat16.
#define PIXELBYTES_DISPATCH_FLOAT(dtype, T, ...)                       \
  switch (dtype) {                                                     \
    case DType::f32: { using T = float; __VA_ARGS__ } break;           \
    case DType::f16: { using T = __half; __VA_ARGS__ } break;          \
    case DType::bf16: { using T = __nv_bfloat16; __VA_ARGS__ } break;  \
    default: return "CUDA kernels take float32, float16 and bfloat16"; \
  }
