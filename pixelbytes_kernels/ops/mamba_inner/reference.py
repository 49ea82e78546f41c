"""mamba_inner, the definition: the Mamba mixer between in_proj and out_proj, composed of the reference ops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ..causal_conv1d.reference import causal_conv1d_ref
from ..selective_scan.reference import selective_scan_ref


def mamba_inner_ref(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    A: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
    *,
    reverse: bool = False,
    seq_idx: Tensor | None = None,
    rms_eps: float | None = None,
) -> Tensor:
    """Arguments, shapes and result as `mamba_inner`; plain torch, differentiable any number of times."""
    x, z = xz.chunk(2, dim=1)
    u, delta, B, C = inner_inputs(
        x,
        conv1d_weight,
        conv1d_bias,
        x_proj_weight,
        delta_proj_weight,
        A,
        B,
        C,
        B_proj_bias,
        C_proj_bias,
        reverse,
        seq_idx,
        rms_eps=rms_eps,
    )
    y = selective_scan_ref(u, delta, A, B, C, D, z, delta_bias, delta_softplus, reverse=reverse, seq_idx=seq_idx)
    assert isinstance(y, Tensor)
    return F.linear(y.transpose(1, 2).to(out_proj_weight.dtype), out_proj_weight, out_proj_bias)


def inner_inputs(
    x: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    A: Tensor,
    B: Tensor | None,
    C: Tensor | None,
    B_proj_bias: Tensor | None,
    C_proj_bias: Tensor | None,
    reverse: bool,
    seq_idx: Tensor | None,
    convolve: Callable[..., Any] = causal_conv1d_ref,
    rms_eps: float | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """u, delta, B, C of the scan from x (batch, dim, seqlen)."""
    weight = conv1d_weight.squeeze(1) if conv1d_weight.ndim == 3 else conv1d_weight
    u = convolve(x, weight, conv1d_bias, "silu", reverse=reverse, seq_idx=seq_idx)
    rank, dstate = delta_proj_weight.shape[1], A.shape[1]
    rows = F.linear(u.transpose(1, 2), x_proj_weight)  # (batch, seqlen, rank + what B and C take)
    delta = F.linear(normed(rows[..., :rank], rms_eps), delta_proj_weight).transpose(1, 2)
    if B is None:
        B = rows[..., rank : rank + dstate]
        B = normed(B if B_proj_bias is None else B + B_proj_bias, rms_eps).transpose(1, 2)
    if C is None:
        C = rows[..., rows.shape[-1] - dstate :]
        C = normed(C if C_proj_bias is None else C + C_proj_bias, rms_eps).transpose(1, 2)
    return u, delta, B, C


def normed(rows: Tensor, eps: float | None) -> Tensor:
    """rows (..., n) over their root mean square; None leaves them as they are."""
    return rows if eps is None else rows * (rows.square().mean(-1, keepdim=True) + eps).rsqrt()
