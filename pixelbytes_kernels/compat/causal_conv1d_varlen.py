"""Stand-in for causal_conv1d.causal_conv1d_varlen: the states of a packed row, one per sequence."""

from __future__ import annotations

import torch
from torch import Tensor

from ..packing import check_cu_seqlens


@torch.no_grad()
def causal_conv1d_varlen_states(x: Tensor, cu_seqlens: Tensor, state_len: int) -> Tensor:
    """The last `state_len` inputs of each sequence, zeros before the start of a shorter one.

    Args:
        x: (total, dim). cu_seqlens: (batch + 1), integers, 0 first.

    Returns:
        (batch, dim, state_len) in x's dtype, channels last in memory.
    """
    check_cu_seqlens("causal_conv1d_varlen_states", cu_seqlens)
    if x.ndim != 2:
        raise ValueError(f"causal_conv1d_varlen_states: x must have shape (total, dim), got {tuple(x.shape)}")
    bounds = cu_seqlens.long()
    steps = bounds[1:, None] + torch.arange(-state_len, 0, device=x.device)  # (batch, state_len)
    states = x.new_zeros(steps.shape[0], state_len, x.shape[1])
    inside = steps >= bounds[:-1, None]
    states[inside] = x[steps[inside]]
    return states.transpose(1, 2)


def causal_conv1d_varlen_states_ref(x: Tensor, cu_seqlens: Tensor, state_len: int) -> Tensor:
    """`causal_conv1d_varlen_states`, sequence by sequence."""
    states = x.new_zeros(len(cu_seqlens) - 1, state_len, x.shape[1])
    for i, (start, stop) in enumerate(zip(cu_seqlens.tolist(), cu_seqlens.tolist()[1:], strict=False)):
        kept = x[max(start, stop - state_len) : stop]
        states[i, state_len - kept.shape[0] :] = kept
    return states.transpose(1, 2)
