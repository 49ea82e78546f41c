"""selective_state_update on NVIDIA GPUs: the call of csrc/cuda/updates.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from ..._cuda_launch import extension, where


def update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
) -> Tensor:
    """out (batch, dim), in x's dtype; `state` is updated in place. B and C are (batch, groups, dstate)."""
    out = torch.empty_like(x)
    if x.numel():
        extension().state_update(*where(x), state, x, dt, A, B, C, D, z, dt_bias, out, dt_softplus)
    return out
