"""bimamba_inner, the definition: the mixer of `mamba_inner` in both directions, summed before one out_proj."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ..bidirectional_selective_scan.reference import bidirectional_selective_scan_ref
from ..mamba_inner.reference import inner_inputs


def bimamba_inner_ref(
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
    conv1d_weight_rev: Tensor | None = None,
    conv1d_bias_rev: Tensor | None = None,
    x_proj_weight_rev: Tensor | None = None,
    delta_proj_weight_rev: Tensor | None = None,
    A_rev: Tensor | None = None,
    D_rev: Tensor | None = None,
    delta_bias_rev: Tensor | None = None,
    scale: float = 1.0,
    seq_idx: Tensor | None = None,
) -> Tensor:
    """Arguments, shapes and result as `bimamba_inner`; plain torch, differentiable any number of times."""

    def own(rev: Tensor | None, shared: Tensor) -> Tensor:
        return shared if rev is None else rev

    x, z = xz.chunk(2, dim=1)
    u, delta, B_up, C_up = inner_inputs(
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
        False,
        seq_idx,
    )
    u_rev, delta_rev, B_rev, C_rev = inner_inputs(
        x,
        own(conv1d_weight_rev, conv1d_weight),
        conv1d_bias if conv1d_bias_rev is None else conv1d_bias_rev,
        own(x_proj_weight_rev, x_proj_weight),
        own(delta_proj_weight_rev, delta_proj_weight),
        own(A_rev, A),
        B,
        C,
        B_proj_bias,
        C_proj_bias,
        True,
        seq_idx,
    )
    y = bidirectional_selective_scan_ref(
        u, delta, A, B_up, C_up, D, z, delta_bias, delta_softplus, u_rev=u_rev, delta_rev=delta_rev, A_rev=A_rev, B_rev=B_rev,
        C_rev=C_rev, D_rev=D_rev, delta_bias_rev=delta_bias_rev, seq_idx=seq_idx, scale=scale,
    )  # fmt: skip
    return F.linear(y.transpose(1, 2).to(out_proj_weight.dtype), out_proj_weight, out_proj_bias)
