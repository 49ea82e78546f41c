"""The public function `mamba_inner`: checks, chooses a backend, calls."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ..._backend import resolve
from ..._check import fit, require_device, require_floats, require_ints, require_shape
from ..causal_conv1d.interface import causal_conv1d
from ..selective_scan.interface import IMPLEMENTED, MAX_DSTATE, selective_scan
from .reference import inner_inputs, mamba_inner_ref


def mamba_inner(
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
    backend: str = "auto",
) -> Tensor:
    """The Mamba mixer from in_proj's output to out_proj's: convolution, projections, scan, gate, in one autograd node.

        x, z = xz;  u = silu(conv(x));  delta, B, C = proj(u);  out = out_proj(scan(u, delta, A, B, C, D) silu(z))

    Kept for the backward: xz, the weights, one state of the scan a chunk. Everything else is formed once more.

    Args:
        xz: (batch, 2 * dim, seqlen), in_proj's output; channels last in memory (a transposed (batch, seqlen, 2 * dim)) is read in place.
        conv1d_weight: (dim, width) or (dim, 1, width), width 2 to 4. conv1d_bias: (dim).
        x_proj_weight: (rank + 2 * dstate, dim), less dstate for each of B and C that is given.
        delta_proj_weight: (dim, rank).
        out_proj_weight: (d_model, dim). out_proj_bias: (d_model).
        A: (dim, dstate), real.
        B, C: None (from x_proj), or as `selective_scan` takes them.
        D, delta_bias: (dim). B_proj_bias, C_proj_bias: (dstate), added to what x_proj gives.
        delta_softplus: delta becomes softplus(delta + delta_bias).
        reverse: convolution and scan run downwards in time.
        seq_idx: (batch, seqlen), integers, see `selective_scan`.
        rms_eps: not None: what x_proj gives for delta (before delta_proj), B and C, biases included, is divided by its root mean square
            at each step, `r / sqrt(mean(r^2) + rms_eps)`, as in FalconMamba. A given B or C is not.
        backend: see `available_backends`.

    Returns:
        (batch, seqlen, d_model), in xz's dtype; weights of another dtype are cast to it for the products.

    Raises:
        ValueError, TypeError, RuntimeError: as `selective_scan`.

    Source: argument order of mamba_ssm's mamba_inner_fn; its idea of recomputing convolution and delta.
    """
    op = "mamba_inner"
    weights = (
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
    check_inner(op, xz, out_proj_weight, out_proj_bias, weights, seq_idx)
    if rms_eps is not None and not rms_eps >= 0:
        raise ValueError(f"{op}: rms_eps must be None, or 0 or more, got {rms_eps}")
    name = resolve(op, backend, xz, IMPLEMENTED)
    arguments = (xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, out_proj_weight, out_proj_bias, A, B, C, D,
                 delta_bias, B_proj_bias, C_proj_bias, delta_softplus)  # fmt: skip
    if name == "reference":
        return mamba_inner_ref(*arguments, reverse=reverse, seq_idx=seq_idx, rms_eps=rms_eps)
    conv1d_weight = conv1d_weight.squeeze(1) if conv1d_weight.ndim == 3 else conv1d_weight
    if torch.compiler.is_compiling():  # the registered ops, with what lies between them for the compiler
        x, z = xz.chunk(2, dim=1)
        convolve = partial(causal_conv1d, backend=name)
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
            convolve,
            rms_eps,
        )
        y = selective_scan(
            u, delta, A, B, C, D, z, delta_bias, delta_softplus, seq_idx=seq_idx, reverse=reverse, backend=name
        )
        assert isinstance(y, Tensor)
        return F.linear(y.transpose(1, 2), out_proj_weight, out_proj_bias)
    from .autograd import Inner, InnerOptions

    options = InnerOptions(name, delta_softplus, 1.0, reverse, False, rms_eps)
    return Inner.apply(options, seq_idx, xz, out_proj_weight, out_proj_bias, conv1d_weight, *weights[1:])


def check_inner(
    op: str,
    xz: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    weights: tuple[Tensor | None, ...],
    seq_idx: Tensor | None,
    suffix: str = "",
) -> None:
    """Raises unless one direction's weights, in the order of mamba_inner's arguments, fit xz; `suffix` goes on their names."""
    if _is_usual(xz, out_proj_weight, out_proj_bias, weights, seq_idx):
        return
    names = ("conv1d_weight", "conv1d_bias", "x_proj_weight", "delta_proj_weight", "A", "B", "C", "D", "delta_bias", "B_proj_bias",
             "C_proj_bias")  # fmt: skip
    named = {name + suffix: t for name, t in zip(names, weights, strict=True)}
    require_floats(op, xz=xz, out_proj_weight=out_proj_weight, out_proj_bias=out_proj_bias, **named)
    require_ints(op, seq_idx=seq_idx)
    require_device(op, xz, out_proj_weight=out_proj_weight, out_proj_bias=out_proj_bias, seq_idx=seq_idx, **named)
    require_shape(op, "xz", xz, batch=-1, two_dim=-1, seqlen=-1)
    if xz.shape[1] % 2:
        raise ValueError(f"{op}: xz must have an even number of channels, got {xz.shape[1]}")
    batch, dim, seqlen = xz.shape[0], xz.shape[1] // 2, xz.shape[2]
    conv_weight, conv_bias, x_proj, dt_proj, A, B, C, D, delta_bias, B_bias, C_bias = weights
    assert conv_weight is not None and x_proj is not None and dt_proj is not None and A is not None
    if conv_weight.ndim == 3:
        require_shape(op, "conv1d_weight" + suffix, conv_weight, dim=dim, one=1, width=-1)
    else:
        require_shape(op, "conv1d_weight" + suffix, conv_weight, dim=dim, width=-1)
    if not 2 <= conv_weight.shape[-1] <= 4:
        raise ValueError(f"{op}: conv1d_weight{suffix} must have a width of 2, 3 or 4, got {conv_weight.shape[-1]}")
    require_shape(op, "A" + suffix, A, dim=dim, dstate=-1)
    require_shape(op, "delta_proj_weight" + suffix, dt_proj, dim=dim, rank=-1)
    dstate = A.shape[1]
    if not 1 <= dstate <= MAX_DSTATE:
        raise ValueError(f"{op}: A{suffix} must have a dstate from 1 to {MAX_DSTATE}, got {dstate}")
    rows = dt_proj.shape[1] + dstate * ((B is None) + (C is None))
    require_shape(op, "x_proj_weight" + suffix, x_proj, rows=rows, dim=dim)
    require_shape(op, "out_proj_weight", out_proj_weight, d_model=-1, dim=dim)
    require_shape(op, "out_proj_bias", out_proj_bias, d_model=out_proj_weight.shape[0])
    for name, channel in (("conv1d_bias", conv_bias), ("D", D), ("delta_bias", delta_bias)):
        require_shape(op, name + suffix, channel, dim=dim)
    for name, state in (("B_proj_bias", B_bias), ("C_proj_bias", C_bias)):
        require_shape(op, name, state, dstate=dstate)
    for name, t in (("B", B), ("C", C)):
        if t is None:
            continue
        if t.ndim == 2:
            require_shape(op, name, t, dim=dim, dstate=dstate)
        elif t.ndim == 3:
            require_shape(op, name, t, batch=batch, dstate=dstate, seqlen=seqlen)
        else:
            require_shape(op, name, t, batch=batch, groups=1, dstate=dstate, seqlen=seqlen)
    require_shape(op, "seq_idx", seq_idx, batch=batch, seqlen=seqlen)


def _is_usual(
    xz: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    weights: tuple[Tensor | None, ...],
    seq_idx: Tensor | None,
) -> bool:
    """Whether everything fits and B, C and seq_idx are None; False where `check_inner` has to look at each by name."""
    conv_weight, conv_bias, x_proj, dt_proj, A, B, C, D, delta_bias, B_bias, C_bias = weights
    given = B is not None or C is not None or seq_idx is not None
    if given or conv_weight is None or x_proj is None or dt_proj is None or A is None:
        return False
    if not (xz.ndim == 3 and A.ndim == dt_proj.ndim == out_proj_weight.ndim == 2 <= conv_weight.ndim <= 3):
        return False
    batch, two_dim, seqlen = xz.shape
    dim, width, dstate, rank = two_dim // 2, conv_weight.shape[-1], A.shape[1], dt_proj.shape[1]
    channel, state, d_model = (dim,), (dstate,), out_proj_weight.shape[0]
    conv_shape = (dim, width) if conv_weight.ndim == 2 else (dim, 1, width)
    return (
        2 <= width <= 4
        and 1 <= dstate <= MAX_DSTATE
        and fit(xz, (xz, (batch, 2 * dim, seqlen)), (conv_weight, conv_shape), (conv_bias, channel), (A, (dim, dstate)))
        and fit(xz, (x_proj, (rank + 2 * dstate, dim)), (dt_proj, (dim, rank)), (D, channel), (delta_bias, channel))
        and fit(xz, (out_proj_weight, (d_model, dim)), (out_proj_bias, (d_model,)), (B_bias, state), (C_bias, state))
    )
