"""causal_conv1d_update on the CPU: the convolution's kernel over a short row, and the state moved on."""

from __future__ import annotations

import torch
from torch import Tensor

from ..causal_conv1d.cpu import forward


def update(x: Tensor, conv_state: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    """out like x; `conv_state` is updated in place."""
    steps = x[..., None] if x.ndim == 2 else x
    past = conv_state[..., conv_state.shape[2] - (weight.shape[1] - 1) :]
    out, _ = forward((steps, weight, bias, None, past), silu, False, False)
    conv_state.copy_(torch.cat([conv_state, steps.to(conv_state.dtype)], dim=-1)[..., steps.shape[2] :])
    return out[..., 0] if x.ndim == 2 else out
