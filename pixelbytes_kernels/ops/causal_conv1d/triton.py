"""causal_conv1d in Triton: memory, block sizes and launches for `triton_kernels.py`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..._triton import Case, Device, cdiv, device_of, launch
from . import triton_kernels as kernels

OP = "causal_conv1d"


class Blocks(NamedTuple):
    """Steps and channels of a program, and its warps."""

    steps: int
    channels: int
    num_warps: int


def blocks_of(device: Device, batch: int, dim: int, seqlen: int, itemsize: int) -> Blocks:
    """One channel a thread, two of 16 bits. Runs of steps as long as leaves every multiprocessor eight warps."""
    warps = 1 if dim <= 32 else 2
    channels = 32 * warps * (2 if itemsize == 2 and dim > 32 else 1)
    steps = 128
    while steps > 16 and batch * cdiv(dim, channels) * cdiv(seqlen, steps) * warps < 8 * device.multiprocessors:
        steps //= 2
    return Blocks(steps, channels, warps)


def forward(tensors: Sequence[Tensor | None], silu: bool, reverse: bool, final: bool) -> tuple[Tensor, Tensor]:
    """`tensors` are x, weight, bias, seq_idx, initial_states. Returns out and the final states, empty unless `final`."""
    x, weight, bias, seq_idx, initial = tensors
    assert x is not None and weight is not None
    out = torch.empty_like(x)
    final_states = final_states_of(x, initial, weight.shape[1], reverse) if final else x.new_empty(0)
    if x.numel() == 0:
        return out, final_states
    batch, dim, seqlen = x.shape
    steps, channels, num_warps = blocks_of(device_of(x), batch, dim, seqlen, x.element_size())
    tiles, chunks = cdiv(dim, channels), cdiv(seqlen, steps)
    launch(
        OP, kernels.forward_kernel, (batch * tiles * chunks,), x,
        **inputs_of(x, weight, bias, seq_idx, initial), out=out, dim=dim, seqlen=seqlen, tiles=tiles, chunks=chunks,
        **strides("x", x, "batch", "dim", "time"), **strides("seq", seq_idx, "batch", "time"),
        **strides("initial", initial, "batch", "dim", "step"), **strides("out", out, "batch", "dim", "time"),
        WIDTH=weight.shape[1], SILU=silu, BIAS=bias is not None, SEQ=seq_idx is not None, INITIAL=initial is not None,
        REVERSE=reverse, STEPS=steps, BD=channels, num_warps=num_warps,
    )  # fmt: skip
    return out, final_states


def backward(
    tensors: Sequence[Tensor | None],
    silu: bool,
    reverse: bool,
    dout: Tensor,
    dfinal: Tensor | None,
    needs: Sequence[bool],
    dx: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x (into `dx` if given), weight, bias and initial_states, None where `needs` (one entry a tensor) is false."""
    x, weight, bias, seq_idx, initial = tensors
    assert x is not None and weight is not None
    batch, dim, seqlen = x.shape
    width = weight.shape[1]
    dx = torch.empty_like(x) if dx is None and needs[0] else dx
    dinitial = torch.empty_like(initial) if initial is not None and needs[4] else None
    summed = needs[1] or (bias is not None and needs[2])
    if x.numel() == 0:
        if dinitial is not None:
            dinitial = dinitial.zero_() if dfinal is None else dinitial.copy_(dfinal)
        total = x.new_zeros(width + 1, dim, dtype=torch.float32)
    else:
        steps, channels, num_warps = blocks_of(device_of(x), batch, dim, seqlen, x.element_size())
        tiles, chunks = cdiv(dim, channels), cdiv(seqlen, steps)
        sums = x.new_empty((batch * chunks, width + 1, dim) if summed else (0,), dtype=torch.float32)
        launch(
            OP, kernels.backward_kernel, (batch * tiles * chunks,), x,
            **inputs_of(x, weight, bias, seq_idx, initial), dout=dout, dfinal=x if dfinal is None else dfinal,
            dx=x if dx is None else dx, dinitial=x if dinitial is None else dinitial, sums=sums,
            dim=dim, seqlen=seqlen, tiles=tiles, chunks=chunks,
            **strides("x", x, "batch", "dim", "time"), **strides("seq", seq_idx, "batch", "time"),
            **strides("initial", initial, "batch", "dim", "step"), **strides("dout", dout, "batch", "dim", "time"),
            **strides("dfinal", dfinal, "batch", "dim", "step"), **strides("dx", dx, "batch", "dim", "time"),
            **strides("dinitial", dinitial, "batch", "dim", "step"),
            WIDTH=width, SILU=silu, BIAS=bias is not None, SEQ=seq_idx is not None, INITIAL=initial is not None,
            FINAL=dfinal is not None, DX=dx is not None, PAST=dinitial is not None, SUMS=summed, REVERSE=reverse,
            STEPS=steps, BD=channels, num_warps=num_warps,
        )  # fmt: skip
        total = sums.sum(0) if summed else sums
    dweight = total[:width].T.contiguous().to(weight.dtype) if needs[1] else None
    dbias = total[width].to(bias.dtype) if bias is not None and needs[2] else None
    return dx, dweight, dbias, dinitial


def final_states_of(x: Tensor, initial: Tensor | None, width: int, reverse: bool) -> Tensor:
    """The last width - 1 inputs (batch, dim, width - 1), oldest first: of the initial states where x is shorter."""
    batch, dim, seqlen = x.shape
    kept = min(seqlen, width - 1)
    newest = x[..., :kept].flip(-1) if reverse else x[..., seqlen - kept :]
    states = x.new_empty(batch, dim, width - 1)
    states[..., width - 1 - kept :] = newest
    if kept < width - 1:
        states[..., : width - 1 - kept] = 0 if initial is None else initial[..., kept:]
    return states


def inputs_of(
    x: Tensor, weight: Tensor, bias: Tensor | None, seq_idx: Tensor | None, initial: Tensor | None
) -> dict[str, Tensor]:
    """Arguments of a kernel, with x in the place of those that it does not read."""
    return {
        "x": x,
        "weight": weight.contiguous(),
        "bias": x if bias is None else bias.contiguous(),
        "seq_idx": x if seq_idx is None else seq_idx,
        "initial": x if initial is None else initial,
    }


def strides(name: str, tensor: Tensor | None, *dims: str) -> dict[str, int]:
    """The strides as arguments of a kernel, zeros for a tensor that is not there."""
    found = (0,) * len(dims) if tensor is None else tensor.stride()
    return {f"{name}_{dim}": stride for dim, stride in zip(dims, found, strict=True)}


def aot_cases() -> list[Case]:
    """Every block size, with few options and with all of them."""

    def case(dtype: torch.dtype, dim: int, width: int, options: bool) -> Case:
        x = torch.empty(2, 64, dim, dtype=dtype).transpose(1, 2)
        states = torch.empty(2, dim, width - 1, dtype=dtype) if options else None
        seq_idx = torch.zeros(2, 64, dtype=torch.int64) if options else None
        tensors = (x, torch.empty(dim, width), torch.empty(dim) if options else None, seq_idx, states)

        def run() -> None:
            forward(tensors, True, options, options)
            backward(tensors, True, options, x, states, (True,) * 5)

        name = f"{str(dtype).removeprefix('torch.')}, dim {dim}, width {width}, {'all options' if options else 'plain'}"
        return Case(name, run)

    sizes = ((dim, width) for dim in (20, 160) for width in (2, 4))
    return [case(t, *size, o) for size in sizes for t in (torch.float32, torch.float16) for o in (False, True)]
