// pxby_embed: what the bindings hand to the launchers of pxby_embed*.cu. How they follow each other: ops/pxby_embed/cuda.py.
#pragma once
#include "../tensor.h"
#include "launch.h"

namespace pixelbytes::cuda {

// tokens (batch, seqlen, 3, 3) integer ids, any strides. V ids, E channels of an embedding, D width of the output, N = batch * seqlen.
// fp32 and contiguous unless said otherwise.
struct EmbedArgs {
  Tensor tokens;
  Tensor table;       // (V, 9, D), any float dtype, contiguous
  Tensor shift;       // (D)
  Tensor norm_weight, norm_bias;  // (D)
  Tensor out;         // (batch, seqlen, D) in the table's dtype, contiguous
  Tensor dout;        // (batch, seqlen, D) in the table's dtype, contiguous
  Tensor dpre;        // (N, D): gradient of what goes into the LayerNorm
  Tensor keys;        // (9, N) int16 or int32: the table row of every cell, 9 V for an unknown id
  Tensor partial;     // (groups, 3, D): sums for norm_weight, norm_bias and shift over the tokens of a group of lanes
  Tensor sums;        // (3, D)
  double eps = 1e-5;
};

// Sums of rows (period, D) by key: entry i of the sorted keys adds row order[i] % period.
struct KeySumArgs {
  Tensor rows;    // (period, D)
  Tensor keys;    // (entries), sorted, int16 or int32; those >= known are left out
  Tensor order;   // (entries) int64
  Tensor starts;  // (known + 1) int64: first entry of each key
  Tensor whole;   // (D): sum of all rows, for a key that each of them has; or null
  Tensor parts;   // (runs + known, D): scratch
  Tensor out;     // (known, D)
  int64_t run = 64;  // entries of a run
};

// Convolution and gate as a matrix (9 E + 1, 9 E): row (channel, cell) in, column (channel, cell) out; the last row is the bias.
struct MixingArgs {
  Tensor conv_weight, conv_bias, alpha;  // (E, E, 3, 3), (E), (1, 1, 3, 3), or null
  Tensor mixing;
  // Backward: dmixing as mixing; dconv (E, E, 9), dbias (E), dgate (E, 9): parts of alpha's gradient, to be added up.
  Tensor dmixing, dconv, dbias, dgate;
};

const char* embed_forward(const Launch& at, const EmbedArgs& args);
const char* embed_backward(const Launch& at, const EmbedArgs& args);
const char* embed_groups(int64_t dim, int64_t* lanes);  // lanes that share a token, or an error
const char* sums_by_key(const Launch& at, const KeySumArgs& args);
const char* embed_mixing(const Launch& at, const MixingArgs& args);
const char* embed_mixing_backward(const Launch& at, const MixingArgs& args);

}  // namespace pixelbytes::cuda
