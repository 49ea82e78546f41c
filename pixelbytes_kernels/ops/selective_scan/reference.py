"""selective_scan, the definition: a loop over time in the dtype it is given. Slow; never tuned.

    h_t = exp(delta_t A) h_{t-1} + delta_t B_t u_t        state (batch, dim, dstate)
    y_t = C_t . h_t + D u_t
    out = y silu(z)

Letters: u input, delta step size, A decay, B and C input and output coefficients, D skip, z gate.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def selective_scan_ref(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    *,
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
    reverse: bool = False,
    out_dtype: torch.dtype | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Arguments, shapes and result as `selective_scan`; plain torch, differentiable any number of times."""
    batch, dim, seqlen = u.shape
    delta = step_size(delta, delta_bias, delta_softplus)
    B_at, C_at = coefficient_at(B, dim), coefficient_at(C, dim)
    u_at, delta_at = u.unbind(-1), delta.unbind(-1)
    state = u.new_zeros(batch, dim, A.shape[1]) if initial_state is None else initial_state
    y: list[Tensor] = [u] * seqlen
    order = range(seqlen - 1, -1, -1) if reverse else range(seqlen)
    for step, t in enumerate(order):
        if seq_idx is not None and step > 0:
            same = seq_idx[:, t] == seq_idx[:, t + 1 if reverse else t - 1]  # (batch)
            state = torch.where(same[:, None, None], state, 0)
        decay = torch.exp(delta_at[t][..., None] * A)  # (batch, dim, dstate)
        state = decay * state + (delta_at[t] * u_at[t])[..., None] * B_at(t)
        y[t] = (state * C_at(t)).sum(-1)  # (batch, dim)
    out = torch.stack(y, dim=-1) if seqlen else torch.zeros_like(u)
    if D is not None:
        out = out + D[:, None] * u
    if z is not None:
        out = out * F.silu(z)
    out = out.to(out_dtype or u.dtype)
    return (out, state) if return_last_state else out


def step_size(delta: Tensor, delta_bias: Tensor | None, delta_softplus: bool) -> Tensor:
    """delta as the recurrence uses it. (batch, dim, seqlen)"""
    if delta_bias is not None:
        delta = delta + delta_bias[:, None]
    return F.softplus(delta) if delta_softplus else delta


def coefficient_at(coefficient: Tensor, dim: int):
    """A function of t that gives B_t or C_t, broadcastable to (batch, dim, dstate)."""
    if coefficient.ndim == 2:  # constant, (dim, dstate)
        return lambda t: coefficient
    if coefficient.ndim == 3:  # one group
        coefficient = coefficient[:, None]
    rows = coefficient.unbind(-1)  # of (batch, groups, dstate)
    repeats = dim // coefficient.shape[1]
    return lambda t: rows[t].repeat_interleave(repeats, dim=1)
