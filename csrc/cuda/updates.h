// One decoding step of the scan and of the convolution, states in place: what the bindings hand to updates.cu.
#pragma once
#include "../tensor.h"
#include "launch.h"

namespace pixelbytes::cuda {

// Any mixture of fp32, fp16, bf16 and any strides. state (batch, dim, dstate); x, dt, z, out (batch, dim); A (dim, dstate); B, C (batch,
// groups, dstate); D, dt_bias (dim).
struct StateArgs {
  Tensor state, x, dt, A, B, C, D, z, dt_bias, out;
  bool dt_softplus = false;
};

// x, out (batch, dim, steps); conv_state (batch, dim, state_len); weight (dim, width); bias (dim).
struct ConvUpdateArgs {
  Tensor x, conv_state, weight, bias, out;
  bool silu = false;
};

const char* state_update(const Launch& at, const StateArgs& args);
const char* conv_update(const Launch& at, const ConvUpdateArgs& args);

}  // namespace pixelbytes::cuda
