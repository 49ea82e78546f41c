"""causal_conv1d in Triton: memory, block sizes and launches for the kernels that walk through time and those that take tiles."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..._triton import Case, Device, cdiv, device_of, launch
from . import triton_kernels as walk
from . import triton_tiles as tile

OP = "causal_conv1d"


class Blocks(NamedTuple):
    """Steps and channels of a program, and its warps; `tiled`: by the kernels that take tiles."""

    steps: int
    channels: int
    num_warps: int
    tiled: bool


def blocks_of(device: Device, batch: int, dim: int, seqlen: int, itemsize: int, tiled: bool) -> Blocks:
    """Walking: one channel a thread, two of 16 bits; runs of steps as long as leaves every multiprocessor eight warps.
    Tiles: 16 bytes a thread.
    """
    if tiled:
        steps = 64 if seqlen <= 64 else 256
        return Blocks(steps, 2048 // itemsize // steps, 4, True)
    warps = 1 if dim <= 32 else 2
    channels = 32 * warps * (2 if itemsize == 2 and dim > 32 else 1)
    steps = 128
    while steps > 16 and batch * cdiv(dim, channels) * cdiv(seqlen, steps) * warps < 8 * device.multiprocessors:
        steps //= 2
    return Blocks(steps, channels, warps, False)


def forward(tensors: Sequence[Tensor | None], silu: bool, reverse: bool, final: bool) -> tuple[Tensor, Tensor]:
    """`tensors` are x, weight, bias, seq_idx, initial_states. Returns out and the final states, empty unless `final`."""
    x, weight, bias, seq_idx, initial = tensors
    assert x is not None and weight is not None
    out = torch.empty_like(x)
    final_states = final_states_of(x, initial, weight.shape[1], reverse) if final else x.new_empty(0)
    if x.numel() == 0:
        return out, final_states
    batch, dim, seqlen = x.shape
    tiled = along_time(x) and initial is None
    chosen = blocks_of(device_of(x), batch, dim, seqlen, x.element_size(), tiled)
    kernel: Any
    pointers: dict[str, Tensor]
    places: dict[str, int]
    constants: dict[str, int]
    if chosen.tiled:
        kernel, pointers, places, constants = tile.forward_tile, {}, {}, {"BT": chosen.steps}
    else:
        kernel, pointers = walk.forward_kernel, {"initial": x if initial is None else initial}
        places = strides("initial", initial, "batch", "dim", "step")
        constants = {"STEPS": chosen.steps, "INITIAL": initial is not None}
    launch_on(
        chosen, kernel, **inputs_of(x, weight, bias, seq_idx), **pointers, out=out,
        **strides("x", x, "batch", "dim", "time"), **strides("seq", seq_idx, "batch", "time"), **places,
        **strides("out", out, "batch", "dim", "time"), WIDTH=weight.shape[1], SILU=silu, BIAS=bias is not None,
        SEQ=seq_idx is not None, REVERSE=reverse, **constants,
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
        tiled = along_time(x) and initial is None and dfinal is None
        chosen = blocks_of(device_of(x), batch, dim, seqlen, x.element_size(), tiled)
        sums = x.new_empty(
            (batch * cdiv(seqlen, chosen.steps), width + 1, dim) if summed else (0,), dtype=torch.float32
        )
        kernel: Any
        pointers: dict[str, Tensor]
        places: dict[str, int]
        constants: dict[str, int]
        if chosen.tiled:
            kernel, pointers, places, constants = tile.backward_tile, {}, {}, {"BT": chosen.steps}
        else:
            kernel = walk.backward_kernel
            states = {"initial": initial, "dfinal": dfinal, "dinitial": dinitial}
            pointers = {name: x if t is None else t for name, t in states.items()}
            places = {}
            for name, t in states.items():
                places |= strides(name, t, "batch", "dim", "step")
            constants = {"STEPS": chosen.steps, "INITIAL": initial is not None, "FINAL": dfinal is not None,
                         "PAST": dinitial is not None}  # fmt: skip
        launch_on(
            chosen, kernel, **inputs_of(x, weight, bias, seq_idx), **pointers, dout=dout, dx=x if dx is None else dx,
            sums=sums, **strides("x", x, "batch", "dim", "time"), **strides("seq", seq_idx, "batch", "time"), **places,
            **strides("dout", dout, "batch", "dim", "time"), **strides("dx", dx, "batch", "dim", "time"), WIDTH=width,
            SILU=silu, BIAS=bias is not None, SEQ=seq_idx is not None, DX=dx is not None, SUMS=summed, REVERSE=reverse,
            **constants,
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


def along_time(x: Tensor) -> bool:
    """Whether neighbours in memory are neighbours in time."""
    return x.stride(2) == 1 and x.stride(1) != 1


def launch_on(chosen: Blocks, kernel: Any, **arguments: Any) -> None:
    """A program for every batch row, run of steps and tile of channels; `arguments` in any order."""
    x = arguments["x"]
    batch, dim, seqlen = x.shape
    tiles, chunks = cdiv(dim, chosen.channels), cdiv(seqlen, chosen.steps)
    arguments |= {"dim": dim, "seqlen": seqlen, "tiles": tiles, "chunks": chunks, "BD": chosen.channels}
    ordered = {name: arguments[name] for name in kernel.arg_names}
    launch(OP, kernel, (batch * tiles * chunks,), x, **ordered, num_warps=chosen.num_warps)


def inputs_of(x: Tensor, weight: Tensor, bias: Tensor | None, seq_idx: Tensor | None) -> dict[str, Tensor]:
    """Arguments of a kernel, with x in the place of those that it does not read."""
    return {
        "x": x,
        "weight": weight.contiguous(),
        "bias": x if bias is None else bias.contiguous(),
        "seq_idx": x if seq_idx is None else seq_idx,
    }


def strides(name: str, tensor: Tensor | None, *dims: str) -> dict[str, int]:
    """The strides as arguments of a kernel, zeros for a tensor that is not there."""
    found = (0,) * len(dims) if tensor is None else tensor.stride()
    return {f"{name}_{dim}": stride for dim, stride in zip(dims, found, strict=True)}


def aot_cases() -> list[Case]:
    """Every block size in either arrangement, with few options and with all of them."""

    def case(dtype: torch.dtype, dim: int, seqlen: int, width: int, options: bool, tiled: bool) -> Case:
        x = torch.empty(2, dim, seqlen, dtype=dtype)
        x = x if tiled else x.transpose(1, 2).contiguous().transpose(1, 2)
        states = torch.empty(2, dim, width - 1, dtype=dtype) if options and not tiled else None
        seq_idx = torch.zeros(2, seqlen, dtype=torch.int64) if options else None
        tensors = (x, torch.empty(dim, width), torch.empty(dim) if options else None, seq_idx, states)

        def run() -> None:
            forward(tensors, True, options, False)
            backward(tensors, True, options, x, states, (True,) * 5)

        name = f"{str(dtype).removeprefix('torch.')}, dim {dim}, seqlen {seqlen}, width {width}"
        return Case(f"{name}, {'all options' if options else 'plain'}, {'tiles' if tiled else 'walk'}", run)

    walked = [(dim, 64, width, False) for dim in (20, 160) for width in (2, 4)]
    tiled = [(160, 64, 4, True), (160, 640, 2, True), (160, 640, 4, True)]
    return [
        case(dtype, dim, seqlen, width, options, along)
        for dim, seqlen, width, along in walked + tiled
        for dtype in (torch.float32, torch.float16)
        for options in (False, True)
    ]
