"""The public function `bimamba_inner`: checks, chooses a backend, calls."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ..._backend import resolve
from ..bidirectional_selective_scan.interface import bidirectional_selective_scan
from ..causal_conv1d.interface import causal_conv1d
from ..mamba_inner.interface import check_inner
from ..mamba_inner.reference import inner_inputs
from ..selective_scan.interface import IMPLEMENTED
from .reference import bimamba_inner_ref


def bimamba_inner(
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
    backend: str = "auto",
) -> Tensor:
    """The mixer of `mamba_inner` upwards and downwards in time, summed before the gate and one out_proj.

        out = out_proj(scale * (scan(u, ...) + scan_reverse(u_rev, ...)) silu(z)),  u_rev = silu(anti-causal conv(x))

    With every weight shared it equals `m(x) + flip(m(flip(x)))` for `m = mamba_inner`: in_proj does not look along time, and out_proj
    is linear, so each is taken once. z is read once for both directions.

    Args:
        xz ... delta_softplus, seq_idx, backend: as `mamba_inner`.
        conv1d_weight_rev ... delta_bias_rev: the downward direction's own weights, shapes as their namesakes; None shares.
        scale: factor on the sum; 0.5 gives the mean of both directions.

    Returns:
        (batch, seqlen, d_model), in xz's dtype.

    Raises:
        ValueError, TypeError, RuntimeError: as `selective_scan`.

    Source: the mixers of Vision Mamba (arXiv 2401.09417), with shared or separate weights.
    """
    op = "bimamba_inner"
    first = (
        conv1d_weight,
        conv1d_bias,
        x_proj_weight,
        delta_proj_weight,
        A,
        B,
        C,
        D,
        delta_bias,
        B_proj_bias,
        C_proj_bias,
    )
    check_inner(op, xz, out_proj_weight, out_proj_bias, first, seq_idx)
    second = (
        conv1d_weight_rev,
        conv1d_bias_rev,
        x_proj_weight_rev,
        delta_proj_weight_rev,
        A_rev,
        D_rev,
        delta_bias_rev,
    )
    own = [s if s is not None else f for s, f in zip((*second[:5], None, None, *second[5:]), first[:9], strict=True)]
    check_inner(op, xz, out_proj_weight, out_proj_bias, (*own, B_proj_bias, C_proj_bias), seq_idx, "_rev")
    if own[4] is not None and own[4].shape != A.shape:
        raise ValueError(f"{op}: A_rev must have the shape of A {tuple(A.shape)}, got {tuple(own[4].shape)}")
    name = resolve(op, backend, xz, IMPLEMENTED)
    if name == "reference":
        return bimamba_inner_ref(
            xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, out_proj_weight, out_proj_bias, A, B, C, D, delta_bias,
            B_proj_bias, C_proj_bias, delta_softplus, conv1d_weight_rev=conv1d_weight_rev, conv1d_bias_rev=conv1d_bias_rev,
            x_proj_weight_rev=x_proj_weight_rev, delta_proj_weight_rev=delta_proj_weight_rev, A_rev=A_rev, D_rev=D_rev,
            delta_bias_rev=delta_bias_rev, scale=scale, seq_idx=seq_idx,
        )  # fmt: skip
    if torch.compiler.is_compiling():  # the registered ops, with what lies between them for the compiler
        x, z = xz.chunk(2, dim=1)
        convolve = partial(causal_conv1d, backend=name)
        (u, delta, B_up, C_up), (u_rev, delta_rev, B_rev, C_rev) = (
            inner_inputs(x, *side[:5], B, C, B_proj_bias, C_proj_bias, reverse, seq_idx, convolve)  # type: ignore
            for side, reverse in ((first, False), (own, True))
        )
        y = bidirectional_selective_scan(
            u, delta, A, B_up, C_up, D, z, delta_bias, delta_softplus, u_rev=u_rev, delta_rev=delta_rev, A_rev=A_rev, B_rev=B_rev,
            C_rev=C_rev, D_rev=D_rev, delta_bias_rev=delta_bias_rev, seq_idx=seq_idx, scale=scale, backend=name,
        )  # fmt: skip
        return F.linear(y.transpose(1, 2), out_proj_weight, out_proj_bias)
    from ..mamba_inner.autograd import Inner, InnerOptions

    options = InnerOptions(name, delta_softplus, scale, False, True)
    flat = [
        t.squeeze(1) if t is not None and i in (0, 11) and t.ndim == 3 else t for i, t in enumerate((*first, *second))
    ]
    return Inner.apply(options, seq_idx, xz, out_proj_weight, out_proj_bias, *flat)
