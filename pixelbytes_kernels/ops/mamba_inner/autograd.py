"""Autograd of the Mamba mixer, one direction or two, over the convolution and the scan of a backend.

Saved: xz, the weights, and the scan's chunk states. The convolution's output, delta, B, C and the gated output are formed once more in
the backward, the last by the scan itself. x_proj, dt_proj and out_proj are matrix products of torch.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..._autograd import in_dtype_of, once_differentiable, without_autocast
from ..causal_conv1d import autograd as conv
from ..selective_scan import autograd as scan

FIRST = ("conv_weight", "conv_bias", "x_proj", "dt_proj", "A", "B", "C", "D", "delta_bias", "B_bias", "C_bias")
SECOND = (
    "conv_weight",
    "conv_bias",
    "x_proj",
    "dt_proj",
    "A",
    "D",
    "delta_bias",
)  # of the second direction, None: shared


class InnerOptions(NamedTuple):
    backend: str
    delta_softplus: bool
    scale: float
    reverse: bool
    bidirectional: bool
    rms_eps: float | None = None


class Weights(NamedTuple):
    """One direction's tensors, in the dtype of xz where they enter products with it."""

    conv_weight: Tensor
    conv_bias: Tensor | None
    x_proj: Tensor
    dt_proj: Tensor
    A: Tensor
    B: Tensor | None
    C: Tensor | None
    D: Tensor | None
    delta_bias: Tensor | None
    B_bias: Tensor | None
    C_bias: Tensor | None


def weights_of(
    first: tuple[Tensor | None, ...], second: tuple[Tensor | None, ...] | None, dtype: torch.dtype
) -> list[Weights]:
    named = dict(zip(FIRST, first, strict=True))
    sides = [named]
    if second is not None:
        own = {name: t for name, t in zip(SECOND, second, strict=True) if t is not None}
        sides.append({**named, **own})
    for side in sides:
        for name in ("x_proj", "dt_proj", "B_bias", "C_bias"):
            tensor = side[name]
            if tensor is not None and tensor.dtype != dtype:
                side[name] = tensor.to(dtype)
    return [Weights(**side) for side in sides]  # type: ignore[arg-type]


class Inputs(NamedTuple):
    """What the scan of one direction reads, and what it comes from.

    delta_rows, B_rows, C_rows: (batch, seqlen, rank or dstate), what x_proj and the biases give, before any norm; None: given.
    """

    u: Tensor
    delta: Tensor
    B: Tensor
    C: Tensor
    delta_rows: Tensor
    B_rows: Tensor | None
    C_rows: Tensor | None


def inputs_of(x: Tensor, w: Weights, seq_idx: Tensor | None, reverse: bool, options: InnerOptions) -> Inputs:
    convolution = conv.implementation(options.backend)
    u, _ = convolution.forward((x, w.conv_weight, w.conv_bias, seq_idx, None), True, reverse, False)
    rows = u.transpose(1, 2) @ w.x_proj.T
    rank, dstate = w.dt_proj.shape[1], w.A.shape[1]
    delta_rows, B_rows, C_rows = rows[..., :rank], None, None
    delta = (normed(delta_rows, options.rms_eps) @ w.dt_proj.T).transpose(1, 2)
    B, C = w.B, w.C
    if B is None:
        B_rows = rows[..., rank : rank + dstate]
        B_rows = B_rows if w.B_bias is None else B_rows + w.B_bias
        B = normed(B_rows, options.rms_eps).transpose(1, 2)
    if C is None:
        C_rows = rows[..., rows.shape[-1] - dstate :]
        C_rows = C_rows if w.C_bias is None else C_rows + w.C_bias
        C = normed(C_rows, options.rms_eps).transpose(1, 2)
    return Inputs(u, delta, scan.with_groups(B), scan.with_groups(C), delta_rows, B_rows, C_rows)  # type: ignore[arg-type]


def normed(rows: Tensor, eps: float | None) -> Tensor:
    """rows (..., n) over their root mean square, in the dtype of the scan's states; None leaves them as they are."""
    if eps is None:
        return rows
    wide = rows.to(scan.compute_dtype(rows))
    return (wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt()).to(rows.dtype)


def normed_gradient(grad: Tensor, rows: Tensor, eps: float | None) -> Tensor:
    """The gradient of `rows` from that of `normed(rows, eps)`."""
    if eps is None:
        return grad
    wide, grad = rows.to(scan.compute_dtype(rows)), grad.to(scan.compute_dtype(rows))
    over = (wide.square().mean(-1, keepdim=True) + eps).rsqrt()
    unit = wide * over
    return (over * (grad - unit * (grad * unit).mean(-1, keepdim=True))).to(rows.dtype)


def directions_of(weights: list[Weights], inputs: list[Inputs], reverse: bool) -> tuple[scan.Direction, ...]:
    return tuple(
        scan.Direction(i.u, i.delta, w.A, i.B, i.C, w.D, w.delta_bias, None, reverse != bool(k))
        for k, (w, i) in enumerate(zip(weights, inputs, strict=True))
    )


class Inner(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        options: InnerOptions,
        seq_idx: Tensor | None,
        xz: Tensor,
        out_proj: Tensor,
        out_bias: Tensor | None,
        *rest: Any,
    ):
        ctx.set_materialize_grads(False)
        with without_autocast(xz.device.type):
            weights = weights_of(rest[:11], rest[11:] if options.bidirectional else None, xz.dtype)
            x, z = xz.chunk(2, dim=1)
            inputs = [inputs_of(x, w, seq_idx, options.reverse != bool(k), options) for k, w in enumerate(weights)]
            directions = directions_of(weights, inputs, options.reverse)
            scan_options = scan.Options(options.delta_softplus, options.scale, xz.dtype)
            keep = any(ctx.needs_input_grad)
            y, _, states = scan.implementation(options.backend).forward(directions, z, seq_idx, scan_options, keep)
            out = y.transpose(1, 2) @ out_proj.to(xz.dtype).T
            if out_bias is not None:
                out += out_bias.to(xz.dtype)
        ctx.save_for_backward(states, seq_idx, xz, out_proj, out_bias, *rest)
        ctx.options = options
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor | None):
        options: InnerOptions = ctx.options
        states, seq_idx, xz, out_proj, out_bias, *rest = ctx.saved_tensors
        if dout is None:
            return (None,) * (5 + len(rest))
        with without_autocast(xz.device.type):
            first, second = tuple(rest[:11]), tuple(rest[11:]) if options.bidirectional else None
            weights = weights_of(first, second, xz.dtype)
            x, z = xz.chunk(2, dim=1)
            inputs = [inputs_of(x, w, seq_idx, options.reverse != bool(k), options) for k, w in enumerate(weights)]
            directions = directions_of(weights, inputs, options.reverse)
            dxz = torch.empty_like(xz)
            dx, dz = dxz.chunk(2, dim=1)
            y = torch.empty_like(inputs[0].u)
            dy = (dout @ out_proj.to(dout.dtype)).transpose(1, 2)
            needs = [t is not None for t in scan.tensors_of(directions)]
            scan_options = scan.Options(options.delta_softplus, options.scale, xz.dtype)
            grads, _, _ = scan.implementation(options.backend).backward(
                directions, z, seq_idx, scan_options, states, dy, None, needs, True, dz, y
            )
            dout_rows, y_rows = dout.reshape(-1, dout.shape[-1]), y.transpose(1, 2).reshape(-1, y.shape[1])
            dout_proj = in_dtype_of(out_proj, dout_rows.T @ y_rows)
            dout_bias = None if out_bias is None else in_dtype_of(out_bias, dout_rows.sum(0))
            sides = []
            for k, (w, i) in enumerate(zip(weights, inputs, strict=True)):
                of_direction = grads[8 * k : 8 * k + 7]
                side = side_gradients(x, w, i, seq_idx, options, bool(k), of_direction, dx if k == 0 else None)
                if k:
                    dx += side["x"]  # type: ignore
                sides.append(side)
        merged = merge(sides, first, second)
        return None, None, dxz, dout_proj, dout_bias, *merged


def side_gradients(
    x: Tensor,
    w: Weights,
    i: Inputs,
    seq_idx: Tensor | None,
    options: InnerOptions,
    second: bool,
    grads: list[Tensor | None],
    dx: Tensor | None,
) -> dict[str, Tensor | None]:
    """From the gradients of the scan's inputs to those of x and of one direction's weights, by name."""
    du, ddelta, dA, dB, dC, dD, ddelta_bias = grads
    assert du is not None and ddelta is not None and dB is not None and dC is not None
    rank = w.dt_proj.shape[1]
    ddelta_rows = ddelta.transpose(1, 2)
    parts = [normed_gradient(ddelta_rows @ w.dt_proj, i.delta_rows, options.rms_eps)]  # of x_proj's rows, in order
    if i.B_rows is not None:
        dB = normed_gradient(dB[:, 0].transpose(1, 2), i.B_rows, options.rms_eps)
        parts.append(dB)
    if i.C_rows is not None:
        dC = normed_gradient(dC[:, 0].transpose(1, 2), i.C_rows, options.rms_eps)
        parts.append(dC)
    drows = torch.cat(parts, dim=-1)
    flat = drows.reshape(-1, drows.shape[-1])
    du_rows = torch.baddbmm(du.transpose(1, 2), drows, w.x_proj.expand(drows.shape[0], -1, -1))
    found: dict[str, Tensor | None] = {
        "x_proj": flat.T @ i.u.transpose(1, 2).reshape(-1, i.u.shape[1]),
        "dt_proj": ddelta_rows.reshape(-1, ddelta.shape[1]).T @ normed(i.delta_rows, options.rms_eps).reshape(-1, rank),
        "A": dA,
        "B": dB if w.B is not None else None,
        "C": dC if w.C is not None else None,
        "D": dD,
        "delta_bias": ddelta_bias,
        "B_bias": None if w.B_bias is None else dB.sum((0, 1)),
        "C_bias": None if w.C_bias is None else dC.sum((0, 1)),
    }
    found["x"], found["conv_weight"], found["conv_bias"], _ = conv.implementation(options.backend).backward(
        (x, w.conv_weight, w.conv_bias, seq_idx, None),
        True,
        options.reverse != second,
        du_rows.transpose(1, 2),
        None,
        (True, True, w.conv_bias is not None, False, False),
        dx,
    )
    return found


def merge(
    sides: list[dict[str, Tensor | None]], first: tuple[Tensor | None, ...], second: tuple[Tensor | None, ...] | None
) -> list[Tensor | None]:
    """Gradients in the order of FIRST and SECOND: a shared tensor gets both directions'."""
    own = dict(zip(SECOND, second or (), strict=False))
    merged = []
    for name, tensor in zip(FIRST, first, strict=True):
        grad = sides[0][name]
        if len(sides) == 2 and own.get(name) is None and grad is not None:
            grad = grad + sides[1][name]  # type: ignore
        merged.append(None if tensor is None or grad is None else like(tensor, grad))
    for name, tensor in own.items():
        grad = sides[1][name] if tensor is not None else None
        merged.append(None if tensor is None or grad is None else like(tensor, grad))
    return merged


def like(tensor: Tensor, grad: Tensor) -> Tensor | None:
    return in_dtype_of(tensor, grad if grad.shape == tensor.shape else grad.reshape(tensor.shape))
