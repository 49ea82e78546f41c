"""The public function `selective_state_update`: checks, chooses a backend, calls."""

from __future__ import annotations

import importlib

import torch
from torch import Tensor

from ..._backend import resolve
from ..._check import require_device, require_floats, require_shape
from .reference import selective_state_update_ref

IMPLEMENTED = ("reference", "torch", "cpu", "cuda", "triton")


@torch.no_grad()
def selective_state_update(
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
    *,
    backend: str = "auto",
) -> Tensor:
    """One decoding step of `selective_scan`; `state` is updated in place. No gradients.

        state = exp(dt A) state + dt B x,   out = (C . state + D x) silu(z)

    Args:
        state: (batch, dim, dstate), any float dtype.
        x, dt, z: (batch, dim).
        A: (dim, dstate), real. B, C: (batch, dstate) or (batch, groups, dstate).
        D, dt_bias: (dim).
        dt_softplus: dt becomes softplus(dt + dt_bias).
        backend: see `available_backends`.

    Returns:
        out (batch, dim), in x's dtype.

    Raises:
        ValueError, TypeError, RuntimeError: as `selective_scan`.

    Source: names of mamba_ssm's selective_state_update.
    """
    op = "selective_state_update"
    floats = {"dt": dt, "A": A, "B": B, "C": C, "D": D, "z": z, "dt_bias": dt_bias, "state": state}
    require_floats(op, x=x, **floats)
    require_device(op, x, **floats)
    require_shape(op, "x", x, batch=-1, dim=-1)
    batch, dim = x.shape
    require_shape(op, "A", A, dim=dim, dstate=-1)
    dstate = A.shape[1]
    require_shape(op, "state", state, batch=batch, dim=dim, dstate=dstate)
    for name, row in (("dt", dt), ("z", z)):
        require_shape(op, name, row, batch=batch, dim=dim)
    for name, channel in (("D", D), ("dt_bias", dt_bias)):
        require_shape(op, name, channel, dim=dim)
    groups = set()
    for name, coefficient in (("B", B), ("C", C)):
        if coefficient.ndim == 2:
            require_shape(op, name, coefficient, batch=batch, dstate=dstate)
        else:
            require_shape(op, name, coefficient, batch=batch, groups=-1, dstate=dstate)
        groups.add(1 if coefficient.ndim == 2 else coefficient.shape[1])
    if len(groups) > 1 or 0 in groups or dim % max(groups):
        raise ValueError(
            f"{op}: B and C must have the same number of groups, one that divides dim={dim}, got {sorted(groups)}"
        )
    chosen = resolve(op, backend, x, IMPLEMENTED)
    if chosen in ("reference", "torch"):
        return selective_state_update_ref(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus)
    B, C = (t[:, None] if t.ndim == 2 else t for t in (B, C))
    update = importlib.import_module(f".{chosen}", __package__).update
    return update(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus)
