// Depthwise causal convolution: what the bindings hand to the launchers in causal_conv1d.cu.
#pragma once
#include "../tensor.h"
#include "launch.h"

namespace pixelbytes::cuda {

// x, out, dout, dx (batch, dim, seqlen) of one dtype, any strides; weight (dim, width) and bias (dim) contiguous fp32; seq_idx (batch,
// seqlen) int32 or int64; initial_states, final_states, dfinal_states (batch, dim, width - 1) in x's dtype, any strides; dinitial_states the
// same in fp32. `reverse`: time runs downwards, states lie behind the last step.
struct ConvArgs {
  Tensor x, weight, bias, seq_idx, initial_states;
  Tensor out, final_states;
  Tensor dout, dfinal_states, dx, dinitial_states;
  Tensor partial;  // backward, fp32 (batch * runs, width + 1, dim): sums over a run of steps; the last of the width + 1 is the bias'
  Tensor sums;     // backward, fp32 (width + 1, dim): dweight transposed, then dbias
  bool silu = false, reverse = false;
  int64_t steps = 0;  // in a run; see conv_runs in ops/causal_conv1d/cuda.py
};

const char* conv_forward(const Launch& at, const ConvArgs& args);
const char* conv_backward(const Launch& at, const ConvArgs& args);

}  // namespace pixelbytes::cuda
