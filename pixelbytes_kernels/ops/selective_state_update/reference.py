"""selective_state_update, the definition: one step of the selective scan."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def selective_state_update_ref(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
) -> Tensor:
    """Arguments, shapes and result as `selective_state_update`; `state` is updated in place."""
    dim = x.shape[1]
    if dt_bias is not None:
        dt = dt + dt_bias
    if dt_softplus:
        dt = F.softplus(dt)
    B, C = (t[:, None] if t.ndim == 2 else t for t in (B, C))
    B, C = (t.repeat_interleave(dim // t.shape[1], dim=1) for t in (B, C))  # (batch, dim, dstate)
    state.copy_(torch.exp(dt[..., None] * A) * state + (dt * x)[..., None] * B)
    y = (state.to(C.dtype) * C).sum(-1)
    if D is not None:
        y = y + D * x
    if z is not None:
        y = y * F.silu(z)
    return y.to(x.dtype)
