"""pxby_embed in Triton: memory, block sizes and launches for `triton_kernels.py`; gpu.py has what is around."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..._triton import Case, Device, cdiv, device_of, launch, next_power_of_2
from . import gpu
from . import triton_kernels as kernels
from .gpu import CELLS, Weights

OP = "pxby_embed"
MAX_FOLDED = 8192  # channels: a program of the folded form holds a whole row


class Blocks(NamedTuple):
    """Tokens and (padded) width of a program, and its warps."""

    tokens: int
    width: int
    num_warps: int


def blocks_of(dim: int) -> Blocks:
    """About 1,024 elements for four warps: 62 to 80 registers a thread on sm_75."""
    width = next_power_of_2(max(dim, 16))
    return Blocks(max(1, 1024 // width), width, 4 if width <= 2048 else 8 if width <= 4096 else 16)


def blocks_per_program(device: Device, tokens: int, blocks: Blocks) -> int:
    """How many blocks a program of the backward sums over: as many as leave eight programs for every multiprocessor."""
    return max(1, tokens // blocks.tokens // (8 * device.multiprocessors))


class Runs(NamedTuple):
    """Sorted entries of a run, rows and columns of a tile of the sums by key."""

    length: int
    rows: int
    columns: int


def runs_of(entries: int, dim: int) -> Runs:
    columns = min(128, next_power_of_2(max(dim, 16)))
    return Runs(64 if entries < 2**17 else 128, min(64, 2048 // columns), columns)


def take_rows_of(dim: int) -> bool:
    return dim <= MAX_FOLDED


def mixing_of(wide: Weights) -> Tensor:
    emb, conv_weight, conv_bias, alpha = wide[:4]
    assert emb is not None
    width = emb.shape[1]
    mixing = emb.new_empty(CELLS * width + 1, CELLS * width)
    blocks = mixing_blocks(width)
    launch(
        OP, kernels.mixing_kernel, ((CELLS * width + 1) * blocks.tiles,), emb,
        **convolution(emb, conv_weight, conv_bias, alpha), mixing=mixing, width=width, tiles=blocks.tiles,
        **variant(conv_weight, conv_bias, alpha), BLOCK=blocks.width, num_warps=blocks.num_warps,
    )  # fmt: skip
    return mixing


class MixingBlocks(NamedTuple):
    """Tiles of a row of the mixing, their width, and the warps for one."""

    tiles: int
    width: int
    num_warps: int


def mixing_blocks(width: int) -> MixingBlocks:
    block = min(1024, next_power_of_2(CELLS * width))
    return MixingBlocks(cdiv(CELLS * width, block), block, max(4, block // 128))


def convolution(
    emb: Tensor, conv_weight: Tensor | None, conv_bias: Tensor | None, alpha: Tensor | None
) -> dict[str, Any]:
    """Arguments of a kernel, with `emb` in the place of those that it does not read."""
    return {
        "conv_weight": emb if conv_weight is None else conv_weight,
        "conv_bias": emb if conv_bias is None else conv_bias,
        "alpha": emb if alpha is None else alpha,
    }


def variant(conv_weight: Tensor | None, conv_bias: Tensor | None, alpha: Tensor | None) -> dict[str, bool]:
    return {"CONV": conv_weight is not None, "BIAS": conv_bias is not None, "GATE": alpha is not None}


def mixing_gradients(wide: Weights, dmixing: Tensor) -> list[Tensor | None]:
    emb, conv_weight, conv_bias, alpha = wide[:4]
    assert emb is not None
    width = emb.shape[1]
    blocks = mixing_blocks(width)
    dconv, dbias = emb.new_empty(width, width, CELLS), emb.new_empty(width)
    dgate = emb.new_empty(width * blocks.tiles, CELLS)
    launch(
        OP, kernels.mixing_backward_kernel, (width * blocks.tiles,), emb, dmixing=dmixing, dshift=dmixing[-1],
        **convolution(emb, conv_weight, conv_bias, alpha), dconv=dconv, dbias=dbias, dgate=dgate, width=width,
        tiles=blocks.tiles, **variant(conv_weight, conv_bias, alpha), BLOCK=blocks.width, num_warps=blocks.num_warps,
    )  # fmt: skip
    return [
        None if conv_weight is None else dconv,
        None if conv_bias is None else dbias,
        None if alpha is None else dgate.sum(0),
    ]


def sizes_of(tokens: Tensor, vocab: int, dim: int) -> dict[str, int]:
    return {"seqlen": tokens.shape[1], "count": tokens.shape[0] * tokens.shape[1], "vocab": vocab, "dim": dim}


def steps_of(tokens: Tensor) -> dict[str, int]:
    return dict(zip(("t_batch", "t_time", "t_row", "t_column"), tokens.stride(), strict=True))


def rows_forward(tokens: Tensor, table: Tensor, shift: Tensor, wide: Weights, eps: float, out: Tensor) -> None:
    sizes = sizes_of(tokens, len(table), out.shape[2])
    blocks = blocks_of(out.shape[2])
    launch(
        OP, kernels.forward_kernel, (cdiv(sizes["count"], blocks.tokens),), out, tokens=tokens, table=table, shift=shift,
        norm_weight=wide[6], norm_bias=wide[7], out=out, **sizes, **steps_of(tokens), eps=eps,
        BM=blocks.tokens, BD=blocks.width, num_warps=blocks.num_warps,
    )  # fmt: skip


def rows_backward(
    tokens: Tensor, table: Tensor, shift: Tensor, wide: Weights, eps: float, dout: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    dim, vocab = dout.shape[2], len(table)
    sizes = sizes_of(tokens, vocab, dim)
    count = sizes["count"]
    blocks = blocks_of(dim)
    each = blocks_per_program(device_of(table), count, blocks)
    programs = cdiv(count, each * blocks.tokens)
    dpre, sums = shift.new_empty(count, dim), shift.new_empty(programs, 3, dim)
    keys = shift.new_empty(CELLS * count, dtype=gpu.key_dtype(CELLS * vocab))
    launch(
        OP, kernels.backward_kernel, (programs,), table, tokens=tokens, table=table, shift=shift,
        norm_weight=wide[6], dout=dout, dpre=dpre, keys=keys, sums=sums, **sizes, blocks=each, **steps_of(tokens),
        **dict(zip(("g_batch", "g_time", "g_column"), dout.stride(), strict=True)), eps=eps,
        BM=blocks.tokens, BD=blocks.width, num_warps=blocks.num_warps,
    )  # fmt: skip
    return dpre, keys, sums.sum(0)


def sums_by_key(rows: Tensor, keys: Tensor, known: int, whole: Tensor | None) -> Tensor:
    rows = rows.contiguous()
    period, dim = rows.shape
    entries = keys.numel()
    ordered, order = torch.sort(keys.view(-1), stable=True)
    starts = torch.searchsorted(ordered, torch.arange(known + 1, dtype=keys.dtype, device=keys.device))
    length, tile_rows, columns = runs_of(entries, dim)
    chunks, tiles = cdiv(entries, length), cdiv(dim, columns)
    parts = rows.new_empty(chunks + known, dim)
    shared = {"ONES": whole is not None, "RUN": length, "BR": tile_rows, "BD": columns}
    launch(
        OP, kernels.segment_kernel, (chunks * tiles,), rows, rows=rows, order=order, keys=ordered, starts=starts,
        parts=parts, entries=entries, period=period, dim=dim, tiles=tiles, known=known, **shared, num_warps=4,
    )  # fmt: skip
    out = rows.new_empty(known, dim)
    launch(
        OP, kernels.combine_kernel, (known * tiles,), rows, parts=parts, starts=starts,
        whole=rows if whole is None else whole, out=out, period=period, dim=dim, tiles=tiles, **shared, num_warps=4,
    )  # fmt: skip
    return out


KERNELS = gpu.Kernels(take_rows_of, mixing_of, mixing_gradients, rows_forward, rows_backward, sums_by_key)
forward = functools.partial(gpu.forward, KERNELS)
backward = functools.partial(gpu.backward, KERNELS)


def aot_cases() -> list[Case]:
    """Every width of a program, up to the widest; ids and weights of either size; the form without a table; every width of a mixing."""

    def weights_of(width: int, dim: int, dtype: torch.dtype) -> list[Tensor]:
        sizes = ((40, width), (width, width, 3, 3), (width,), (1, 1, 3, 3), (dim, 9 * width), (dim,), (dim,), (dim,))
        return [torch.empty(size, dtype=dtype) for size in sizes]

    def case(dim: int, dtype: torch.dtype, ids: torch.dtype, folded: bool) -> Case:
        def run() -> None:
            weights, tokens = weights_of(9, dim, dtype), torch.zeros(2, 64, 3, 3, dtype=ids)
            forward(tokens, weights, 1e-5, folded)
            backward(tokens, weights, 1e-5, torch.empty(2, 64, dim, dtype=dtype), [True] * 8, folded)

        name = f"{str(dtype).removeprefix('torch.')}, {str(ids).removeprefix('torch.')} ids, D {dim}"
        return Case(name if folded else f"{name}, no table", run)

    def mixing_case(width: int) -> Case:
        def run() -> None:
            weights = weights_of(width, 1, torch.float32)
            mixing_gradients(weights, torch.empty_like(mixing_of(weights)))

        return Case(f"E {width}", run)

    plain = (case(2**i, torch.float32, torch.int64, True) for i in range(4, 14))
    other = (case(d, torch.float16, torch.uint8, f) for d, f in ((64, True), (256, True), (64, False)))
    return [*plain, *other, *(mixing_case(width) for width in (28, 56, 113, 227))]
