// selective_scan and bidirectional_selective_scan on CUDA: what the launchers take.
#pragma once
#include "../scan_args.h"
#include "launch.h"

namespace pixelbytes::cuda {

constexpr int kChunk = 32;      // steps between stored states
constexpr int kDirectDstate = 64;  // up to here B and C that vary in time are staged in shared memory, in any dtype; states lie next to each other

// Which kernel serves a dstate, and what it wants of its memory; known to Python through `_cuda.scan_shape`.
//
// dstate_padded   states of a channel in `states`, in dB, dC and in B, C that are read directly
// tile            channels of a block: the backward writes one addend of dB and dC for each tile of a group
struct ScanShape {
  int dstate_padded, tile_forward, tile_backward;
};
// `direct`: B or C is constant in time, or dstate is above kDirectDstate. Then both are fp32 with the states of a step next to each other,
// padded with zeros: (batch, groups, seqlen, dstate_padded), or (dim, dstate_padded) where constant.
ScanShape scan_shape(int dstate, bool direct);

// With a `stretch` of steps, a multiple of kChunk, every stretch of a row is a row of its own: initial_state, last_state, dlast_state and
// dinitial_state have an axis (stretch) before the others, and where it says (batch) below it is (stretch and batch).
//
// A, D, delta_bias, initial_state, last_state, dlast_state: contiguous fp32. seq_idx: contiguous int32. states (chunk, batch, dim,
// dstate_padded). Addends of gradients, contiguous fp32, to be summed over the first axis or axes that the gradient lacks: dA (batch, dim, dstate);
// dB, dC (tile of the group, batch, groups, seqlen, dstate_padded), where constant zeros of (batch, dim, dstate_padded); dD, ddelta_bias
// (batch, dim). Of two directions that share du, ddelta, the second has none.
const char* selective_scan_forward(const Launch& at, const ScanArgs& args);
const char* selective_scan_backward(const Launch& at, const ScanArgs& args);
const char* selective_scan_backward_direct(const Launch& at, const ScanArgs& args);  // its part where is_direct

}  // namespace pixelbytes::cuda
