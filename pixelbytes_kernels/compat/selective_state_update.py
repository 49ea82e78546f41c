"""Stand-in for mamba_ssm.ops.triton.selective_state_update, with Mamba-2's heads and continuous batching."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops.selective_state_update import selective_state_update as step
from ..ops.selective_state_update import selective_state_update_ref as plain_step


def selective_state_update(
    state,
    x,
    dt,
    A,
    B,
    C,
    D=None,
    z=None,
    dt_bias=None,
    dt_softplus=False,
    state_batch_indices=None,
):
    """One decoding step; `state` is updated in place. No gradients.

    Args:
        state: (batch, dim, dstate) or (batch, nheads, dim, dstate).
        x, dt, z: (batch, dim) or (batch, nheads, dim).
        A: (dim, dstate) or (nheads, dim, dstate). D, dt_bias: (dim) or (nheads, dim).
        B, C: (batch, dstate) or (batch, ngroups, dstate).
        state_batch_indices: (batch), integers: the row of `state`, which may then have any number of rows, of each row
            of x. They must differ from each other.

    Returns:
        out like x.
    """
    if state_batch_indices is None:
        return _by_heads(step, state, x, dt, A, B, C, D, z, dt_bias, dt_softplus)
    rows = state_batch_indices.long()
    taken = state[rows]
    out = _by_heads(step, taken, x, dt, A, B, C, D, z, dt_bias, dt_softplus)
    with torch.no_grad():
        state[rows] = taken
    return out


def selective_state_update_ref(state, x, dt, A, B, C, D=None, z=None, dt_bias=None, dt_softplus=False):
    """The definition in plain torch; arguments as `selective_state_update`."""
    return _by_heads(plain_step, state, x, dt, A, B, C, D, z, dt_bias, dt_softplus)


def _by_heads(step, state: Tensor, x: Tensor, dt, A, B, C, D, z, dt_bias, dt_softplus: bool) -> Tensor:
    """Heads are channels: (nheads, dim) is read as nheads * dim channels, whose groups stay neighbours."""
    if state.ndim == 3:
        return step(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus)
    flat_state = state.flatten(1, 2)  # a view where the layout allows it
    dt, z = (None if t is None else t.flatten(1, 2) for t in (dt, z))
    D, dt_bias = (None if t is None else t.flatten() for t in (D, dt_bias))
    out = step(flat_state, x.flatten(1, 2), dt, A.flatten(0, 1), B, C, D, z, dt_bias, dt_softplus)
    if flat_state.data_ptr() != state.data_ptr():
        with torch.no_grad():
            state.copy_(flat_state.view(state.shape))
    return out.view(x.shape)
