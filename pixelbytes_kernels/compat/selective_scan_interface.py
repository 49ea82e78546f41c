"""Stand-in for mamba_ssm.ops.selective_scan_interface, with the functions that Vim's fork adds. No kernels of its own.

Letters and shapes: u, delta, z (batch, dim, seqlen); A (dim, dstate); B, C (batch, [groups,] dstate, seqlen) or (dim,
dstate); D, delta_bias (dim). Signatures as published by state-spaces/mamba (2.2) and hustvl/Vim (mamba 1.1.1).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.bidirectional_selective_scan import bidirectional_selective_scan, bidirectional_selective_scan_ref
from ..ops.causal_conv1d import causal_conv1d
from ..ops.mamba_inner import mamba_inner
from ..ops.mamba_inner import mamba_inner_ref as plain_mamba_inner
from ..ops.mamba_inner.interface import check_inner
from ..ops.mamba_inner.reference import inner_inputs
from ..ops.selective_scan import selective_scan
from ..ops.selective_scan import selective_scan_ref as plain_scan
from ._not_served import NotServed


def selective_scan_fn(
    u,
    delta,
    A,
    B,
    C,
    D=None,
    z=None,
    delta_bias=None,
    delta_softplus=False,
    return_last_state=False,
):
    """`selective_scan`: out in u's dtype, and with `return_last_state` (out, last_state (batch, dim, dstate), float32).

    Beyond mamba_ssm: CPU tensors, any strides, mixed dtypes, and a gradient of last_state.
    """
    refuse_complex("selective_scan_fn", A)
    return selective_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state)


def selective_scan_ref(
    u,
    delta,
    A,
    B,
    C,
    D=None,
    z=None,
    delta_bias=None,
    delta_softplus=False,
    return_last_state=False,
):
    """The definition in plain torch, computed in float32 (float64 for float64 u), out in u's dtype."""
    refuse_complex("selective_scan_ref", A)
    out = plain_scan(*widened(u, delta, A, B, C, D, z, delta_bias), delta_softplus, return_last_state)
    return (out[0].to(u.dtype), out[1]) if isinstance(out, tuple) else out.to(u.dtype)


def mamba_inner_fn(
    xz,
    conv1d_weight,
    conv1d_bias,
    x_proj_weight,
    delta_proj_weight,
    out_proj_weight,
    out_proj_bias,
    A,
    B=None,
    C=None,
    D=None,
    delta_bias=None,
    B_proj_bias=None,
    C_proj_bias=None,
    delta_softplus=True,
    checkpoint_lvl=1,
    b_rms_weight=None,
    c_rms_weight=None,
    dt_rms_weight=None,
    b_c_dt_rms_eps=1e-6,
):
    """`mamba_inner`: xz (batch, 2 * dim, seqlen) -> (batch, seqlen, d_model).

    Args:
        checkpoint_lvl: 0 or 1; both recompute the convolution and delta.
        b_rms_weight, c_rms_weight: (dstate), and dt_rms_weight (dim): RMS norms of B, C and of delta behind delta_proj
            (before delta_bias). These weights get gradients, unlike in mamba_ssm.
    """
    refuse_complex("mamba_inner_fn", A)
    if checkpoint_lvl not in (0, 1):
        raise ValueError(f"mamba_inner_fn: checkpoint_lvl must be 0 or 1, got {checkpoint_lvl}")
    if b_rms_weight is None and c_rms_weight is None and dt_rms_weight is None:
        return mamba_inner(
            xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, out_proj_weight, out_proj_bias, A, B, C,
            D, delta_bias, B_proj_bias, C_proj_bias, delta_softplus,
        )  # fmt: skip
    convolution, projections = (conv1d_weight, conv1d_bias), (x_proj_weight, delta_proj_weight)
    weights = (*convolution, *projections, A, B, C, D, delta_bias, B_proj_bias, C_proj_bias)
    check_inner("mamba_inner_fn", xz, out_proj_weight, out_proj_bias, weights, None)
    x, z = xz.chunk(2, dim=1)
    u, delta, B, C = inputs_of(x, *convolution, *projections, A, B, C, B_proj_bias, C_proj_bias)
    delta = normed(delta, dt_rms_weight, b_c_dt_rms_eps)
    B, C = normed(B, b_rms_weight, b_c_dt_rms_eps), normed(C, c_rms_weight, b_c_dt_rms_eps)
    y = selective_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus)
    assert isinstance(y, Tensor)
    return project(y, out_proj_weight, out_proj_bias)


def mamba_inner_ref(
    xz,
    conv1d_weight,
    conv1d_bias,
    x_proj_weight,
    delta_proj_weight,
    out_proj_weight,
    out_proj_bias,
    A,
    B=None,
    C=None,
    D=None,
    delta_bias=None,
    B_proj_bias=None,
    C_proj_bias=None,
    delta_softplus=True,
):
    """The definition in plain torch, in the dtype it is given. Heeds `delta_softplus`, which mamba_ssm's does not."""
    refuse_complex("mamba_inner_ref", A)
    return plain_mamba_inner(
        xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, out_proj_weight, out_proj_bias, A, B, C, D,
        delta_bias, B_proj_bias, C_proj_bias, delta_softplus,
    )  # fmt: skip


def mamba_inner_fn_no_out_proj(
    xz,
    conv1d_weight,
    conv1d_bias,
    x_proj_weight,
    delta_proj_weight,
    A,
    B=None,
    C=None,
    D=None,
    delta_bias=None,
    B_proj_bias=None,
    C_proj_bias=None,
    delta_softplus=True,
):
    """Vim's mixer without out_proj: xz (batch, 2 * dim, seqlen) -> (batch, dim, seqlen)."""
    refuse_complex("mamba_inner_fn_no_out_proj", A)
    x, z = xz.chunk(2, dim=1)
    u, delta, B, C = inputs_of(
        x, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, A, B, C, B_proj_bias, C_proj_bias
    )
    return selective_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus)


def bimamba_inner_fn(
    xz,
    conv1d_weight,
    conv1d_bias,
    x_proj_weight,
    delta_proj_weight,
    out_proj_weight,
    out_proj_bias,
    A,
    A_b,
    B=None,
    C=None,
    D=None,
    delta_bias=None,
    B_proj_bias=None,
    C_proj_bias=None,
    delta_softplus=True,
):
    """Vim's "v1": one causal convolution, a scan upwards with A and one downwards with A_b, summed before out_proj.

    Not `bimamba_inner`, whose downward direction convolves anti-causally.
    """
    refuse_complex("bimamba_inner_fn", A)
    x, z = xz.chunk(2, dim=1)
    u, delta, B, C = inputs_of(
        x, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, A, B, C, B_proj_bias, C_proj_bias
    )
    y = bidirectional_selective_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, A_rev=A_b)
    return project(y, out_proj_weight, out_proj_bias)


def bimamba_inner_ref(
    xz,
    conv1d_weight,
    conv1d_bias,
    x_proj_weight,
    delta_proj_weight,
    out_proj_weight,
    out_proj_bias,
    A,
    A_b,
    B=None,
    C=None,
    D=None,
    delta_bias=None,
    B_proj_bias=None,
    C_proj_bias=None,
    delta_softplus=True,
):
    """`bimamba_inner_fn` in plain torch, in the dtype it is given."""
    refuse_complex("bimamba_inner_ref", A)
    x, z = xz.chunk(2, dim=1)
    u, delta, B, C = inner_inputs(
        x, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, A, B, C, B_proj_bias, C_proj_bias, False, None
    )
    y = bidirectional_selective_scan_ref(u, delta, A, B, C, D, z, delta_bias, delta_softplus, A_rev=A_b)
    return project(y, out_proj_weight, out_proj_bias)


def refuse_complex(op: str, A: Tensor) -> None:
    if A.is_complex():
        raise NotServed(f"{op}: complex A is not served; A must be real")


def widened(u: Tensor, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    wide = torch.float64 if u.dtype == torch.float64 else torch.float32
    return tuple(None if t is None else t.to(wide) for t in (u, *tensors))


def inputs_of(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """u, delta, B, C of the scan from x (batch, dim, seqlen), the convolution on the chosen backend."""
    weights = (conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight)
    return inner_inputs(x, *weights, A, B, C, B_proj_bias, C_proj_bias, False, None, causal_conv1d)


def normed(rows: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """RMS norm over the channels of rows (batch, channels, seqlen)."""
    if weight is None:
        return rows
    return F.rms_norm(rows.transpose(1, 2), (rows.shape[1],), weight.to(rows.dtype), eps).transpose(1, 2)


def project(y: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(y.transpose(1, 2).to(weight.dtype), weight, bias)
