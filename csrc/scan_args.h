// What a selective scan takes, on every device: tensors as Python gave them, checked there.
#pragma once
#include "tensor.h"

namespace pixelbytes {

// One direction of a selective scan. Letters as in the paper: u, delta (batch, dim, seqlen); A (dim, dstate); B, C
// (dim, dstate) constant in time or (batch, groups, dstate, seqlen); D, delta_bias (dim); states (batch, dim, dstate).
// In the second direction a null u, delta, A, B, C, D or delta_bias is shared with the first, values and gradients.
struct ScanDirection {
  bool reverse = false;
  Tensor u, delta, A, B, C, D, delta_bias, initial_state;
  Tensor last_state;  // out, or null
  Tensor states;      // state at each chunk's entry, in the kernel's own layout: out of the forward (or null), into the backward
  Tensor dlast_state;
  // Gradients, null where unwanted. du, ddelta: any layout and dtype. The others contiguous in the compute type. On the CPU: dA (dim, dstate),
  // dB, dC (dim, dstate) or (batch, groups, seqlen, dstate), dD, ddelta_bias (dim), dinitial_state (batch, dim, dstate). On a GPU,
  // addends that the caller sums over the first axis: see cuda/selective_scan.h.
  Tensor du, ddelta, dA, dB, dC, dD, ddelta_bias, dinitial_state;
};

struct ScanArgs {
  int directions = 1;
  ScanDirection direction[2];
  Tensor z, seq_idx;       // (batch, dim, seqlen), (batch, seqlen)
  Tensor out;              // (batch, dim, seqlen); in the backward: the output once more, or null
  Tensor partial;          // GPU, forward, or null: what the direction that comes first leaves for the other; `out` where null
  Tensor dout, dz;         // backward only
  int64_t stretch = 0;     // GPU: steps of the stretches of time that run side by side; 0: all of a row one after the other
  double scale = 1.0;      // out = scale * (sum over directions) * silu(z)
  bool delta_softplus = false;
  bool use_double = false; // compute type fp64 instead of fp32 (CPU only)
  int threads = 1;         // CPU only
};

}  // namespace pixelbytes
