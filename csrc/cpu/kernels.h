// What the bindings may call: one table of functions per instruction set, and the structs they take.
//
// Every function returns nullptr, or a sentence that says what went wrong (memory ran out). Shapes, dtypes and aliasing were
// checked before; kernels trust what they are given.
#pragma once
#include "scan_args.h"
#include "tensor.h"

namespace pixelbytes {

// x (batch, dim, seqlen), weight (dim, width), bias (dim), seq_idx (batch, seqlen), initial_states / final_states (batch, dim, width - 1).
struct ConvArgs {
  Tensor x, weight, bias, seq_idx, initial_states;
  Tensor out, final_states;
  Tensor dout, dfinal_states;
  Tensor dx, dweight, dbias, dinitial_states;  // dweight, dbias contiguous in the compute type
  bool silu = false, reverse = false, use_double = false;
  int threads = 1;
};

// tokens (batch, seqlen, 3, 3) integer ids; emb (V, E); conv_weight (E, E, 3, 3), conv_bias (E), alpha (1, 1, 3, 3), proj_bias (D)
// or null; proj_weight (D, 9E); norm_weight, norm_bias (D). out, dout contiguous (batch, seqlen, D). Gradients contiguous, of the
// weight's shape and dtype, null where unwanted.
struct EmbedArgs {
  Tensor tokens, emb, conv_weight, conv_bias, alpha, proj_weight, proj_bias, norm_weight, norm_bias;
  Tensor out;
  Tensor dout, demb, dconv_weight, dconv_bias, dalpha, dproj_weight, dproj_bias, dnorm_weight, dnorm_bias;
  double eps = 1e-5;
  bool folded = true;  // sum table rows, or compute the formula itself: see cpu/embed_weights.h
  bool use_double = false;
  int threads = 1;
};

struct EmbedOutcome {
  const char* error = nullptr;
  int64_t position = -1, id = 0;  // first cell of `tokens`, counted in row-major order, whose id is outside [0, V)
};

// state (batch, dim, dstate), updated in place, states of a channel next to each other; x, dt, z, out (batch, dim); A (dim, dstate); B, C
// (batch, groups, dstate); D, dt_bias (dim).
struct StateArgs {
  Tensor state, x, dt, A, B, C, D, z, dt_bias, out;
  bool dt_softplus = false, use_double = false;
  int threads = 1;
};

// A layer of mamba_step: norm (dim) or null; in_proj (2 inner, dim); conv_weight (inner, width); x_proj (rank + 2 dstate, inner);
// dt_proj (inner, rank); A (inner, dstate); D (inner); out_proj (dim, inner); biases or null. conv_state (batch, width - 1, inner), state
// (batch, inner, dstate): fp32, contiguous.
struct StepLayer {
  Tensor norm, in_proj, in_proj_bias, conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A, D, out_proj, out_proj_bias, conv_state, state;
};

struct Kernels {
  const char* name;
  int lanes;  // fp32 values in a vector
  int chunk;  // steps of a scan between stored states
  const char* (*scan_forward)(const ScanArgs&);
  const char* (*scan_backward)(const ScanArgs&);
  const char* (*conv_forward)(const ConvArgs&);
  const char* (*conv_backward)(const ConvArgs&);
  const char* (*state_update)(const StateArgs&);
  void* (*step_create)(const StepLayer* layers, int64_t count, double eps);  // null: out of memory
  const char* (*step_run)(void* plan, float* x, int64_t batch, int threads);
  void (*step_destroy)(void* plan);
  EmbedOutcome (*pxby_embed_forward)(const EmbedArgs&);
  EmbedOutcome (*pxby_embed_backward)(const EmbedArgs&);
  double (*fma_rate)(double seconds);  // vector multiply-adds a second, one thread
};

const Kernels& best_kernels();                  // for this processor, or what PIXELBYTES_CPU_ISA names
const Kernels* kernels_named(const char* name); // null if this build or processor lacks it

}  // namespace pixelbytes
