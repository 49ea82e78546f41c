"""causal_conv1d_update, the definition: the newest input joins the window, and the convolution is taken once."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def causal_conv1d_update_ref(
    x: Tensor, conv_state: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None
) -> Tensor:
    """Arguments, shapes and result as `causal_conv1d_update`; `conv_state` is updated in place."""
    steps = x[..., None] if x.ndim == 2 else x  # (batch, dim, seqlen)
    width, seqlen = weight.shape[1], steps.shape[2]
    window = torch.cat([conv_state.to(steps.dtype), steps], dim=-1)
    conv_state.copy_(window[..., seqlen:])
    newest = window[..., window.shape[-1] - (width - 1 + seqlen) :]
    out = torch.stack([weight[:, k, None] * newest[..., k : k + seqlen] for k in range(width)]).sum(0)
    if bias is not None:
        out = out + bias[:, None]
    if activation is not None:
        out = F.silu(out)
    return (out[..., 0] if x.ndim == 2 else out).to(x.dtype)
