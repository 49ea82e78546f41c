"""causal_conv1d, the definition: a sum over taps of shifted inputs, in the dtype it is given.

pre_t = bias + sum_j weight[width - 1 - j] x_{t - j},   out = silu(pre)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def causal_conv1d_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    *,
    seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    reverse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Arguments, shapes and result as `causal_conv1d`; plain torch, differentiable any number of times."""
    width, seqlen = weight.shape[1], x.shape[2]
    if reverse:
        x = x.flip(-1)
        seq_idx = None if seq_idx is None else seq_idx.flip(-1)
    past = x.new_zeros(*x.shape[:2], width - 1) if initial_states is None else initial_states
    padded = torch.cat([past.to(x.dtype), x], dim=-1)  # (batch, dim, width - 1 + seqlen)
    out = weight[:, -1, None] * x
    for j in range(1, width):
        shifted = padded[..., width - 1 - j : width - 1 - j + seqlen]
        if seq_idx is not None:  # initial states belong to the sequence that starts the row
            index = torch.cat([seq_idx[:, :1].expand(-1, j), seq_idx], dim=1)[:, :seqlen]
            shifted = torch.where((index == seq_idx)[:, None], shifted, 0)
        out = out + weight[:, width - 1 - j, None] * shifted
    if bias is not None:
        out = out + bias[:, None]
    if activation is not None:
        out = F.silu(out)
    out = out.to(x.dtype)
    if reverse:
        out = out.flip(-1)
    return (out, padded[..., padded.shape[-1] - (width - 1) :]) if return_final_states else out
