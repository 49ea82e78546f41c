"""The public function `causal_conv1d_update`: checks, chooses a backend, calls."""

from __future__ import annotations

import importlib

import torch
from torch import Tensor

from ..._backend import resolve
from ..._check import require_device, require_floats, require_shape
from ..causal_conv1d.interface import check_conv
from .reference import causal_conv1d_update_ref

IMPLEMENTED = ("reference", "torch", "cpu", "cuda", "triton")


@torch.no_grad()
def causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """One decoding step (or a few) of `causal_conv1d`; `conv_state` is updated in place. No gradients.

    Args:
        x: (batch, dim), or (batch, dim, seqlen) for several steps at once.
        conv_state: (batch, dim, state_len), state_len >= width - 1: the newest inputs, oldest first.
        weight: (dim, width), width 2 to 4. bias: (dim).
        activation: None, "silu" or "swish".
        backend: see `available_backends`.

    Returns:
        out like x.

    Raises:
        ValueError, TypeError, RuntimeError: as `causal_conv1d`.

    Source: names of the causal-conv1d package.
    """
    op = "causal_conv1d_update"
    silu = check_conv(op, x, weight, bias, activation)
    require_floats(op, conv_state=conv_state)
    require_device(op, x, conv_state=conv_state)
    if x.ndim not in (2, 3):
        raise ValueError(f"{op}: x must have shape (batch, dim) or (batch, dim, seqlen), got {tuple(x.shape)}")
    width = weight.shape[1]
    require_shape(op, "conv_state", conv_state, batch=x.shape[0], dim=x.shape[1], state_len=-1)
    if conv_state.shape[2] < width - 1:
        raise ValueError(
            f"{op}: conv_state must hold at least width - 1 = {width - 1} inputs, got {conv_state.shape[2]}"
        )
    name = resolve(op, backend, x, IMPLEMENTED)
    if name in ("reference", "torch"):
        return causal_conv1d_update_ref(x, conv_state, weight, bias, "silu" if silu else None)
    update = importlib.import_module(f".{name}", __package__).update
    return update(x, conv_state, weight, bias, silu)
