"""selective_state_update on the CPU: the call of csrc/cpu/selective_state_update.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from ..._backend import load_extension


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
    cpu, reason = load_extension("_cpu")
    if cpu is None:
        raise RuntimeError(reason)
    out = torch.empty_like(x)
    if x.numel():
        double = torch.float64 in (x.dtype, state.dtype)
        cpu.state_update(state, x, dt, A, B, C, D, z, dt_bias, out, dt_softplus, double, torch.get_num_threads())
    return out
