"""pxby_embed in Triton: memory, block sizes and launches for `triton_kernels.py`; matrix products are torch's.

Forward: convolution, gate and projection are folded into a table of (id, cell) rows; one kernel gathers nine rows a token and normalises.
Backward: that once more, and the gradient of what went into the LayerNorm; its rows are summed by (id, cell) over sorted keys, in runs of
fixed length and then over the runs, in order. A cell with the same id everywhere, as four of nine have in a raster's windows, is one
column sum. Deterministic. Where a table would cost more than it saves, and for more than 8,192 channels, each token's nine embeddings go
through the folded projection instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..._triton import Case, Device, cdiv, device_of, launch, next_power_of_2
from . import triton_kernels as kernels
from .formulation import folded_is_cheaper
from .ids import check_ids

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


def forward(tokens: Tensor, weights: Sequence[Tensor | None], eps: float, folded: bool | None = None) -> Tensor:
    """(batch, seqlen, D) in the dtype of the weights. `folded`: None chooses by the sizes."""
    emb, proj_weight = weights[0], weights[4]
    assert emb is not None and proj_weight is not None
    out = emb.new_empty(*tokens.shape[:2], proj_weight.shape[0])
    check_ids(tokens, emb.shape[0])
    if out.numel() == 0:
        return out
    with torch.autocast(tokens.device.type, enabled=False):
        wide = [None if w is None else w.float() for w in weights]
        if not is_folded(tokens, emb, proj_weight, folded):
            pre, _, _ = direct(tokens, wide)
            found = F.layer_norm(pre, pre.shape[-1:], wide[6], wide[7], eps)
            return out.copy_(found.view(out.shape))
        table, shift, _ = tables(wide, emb.dtype)
        dim = out.shape[2]
        blocks = blocks_of(dim)
        launch(
            OP, kernels.forward_kernel, (cdiv(out[..., 0].numel(), blocks.tokens),), out,
            tokens=tokens, table=table, shift=shift, norm_weight=contiguous(weights[6]),
            norm_bias=contiguous(weights[7]), out=out, **sizes_of(tokens, emb, dim), eps=eps,
            BM=blocks.tokens, BD=blocks.width, num_warps=blocks.num_warps,
        )  # fmt: skip
    return out


def backward(
    tokens: Tensor,
    weights: Sequence[Tensor | None],
    eps: float,
    dout: Tensor,
    needs: Sequence[bool],
    folded: bool | None = None,
) -> list[Tensor | None]:
    """Gradients of the weights, None where absent or not needed; the inputs are all that the forward has to keep."""
    emb, proj_weight = weights[0], weights[4]
    assert emb is not None and proj_weight is not None
    if dout.numel() == 0:
        return [None if w is None or not n else torch.zeros_like(w) for w, n in zip(weights, needs, strict=True)]
    with torch.autocast(tokens.device.type, enabled=False):
        wide = [None if w is None else w.float() for w in weights]
        call = backward_folded if is_folded(tokens, emb, proj_weight, folded) else backward_direct
        found = call(tokens, wide, emb.dtype, eps, dout, any(needs[:6]))
        return [
            None if w is None or not need or grad is None else grad.reshape(w.shape).to(w.dtype)
            for w, need, grad in zip(weights, needs, found, strict=True)
        ]


def is_folded(tokens: Tensor, emb: Tensor, proj_weight: Tensor, folded: bool | None) -> bool:
    dim = proj_weight.shape[0]
    if folded is None:
        vocab, width = emb.shape
        folded = folded_is_cheaper(tokens.shape[0] * tokens.shape[1], vocab, width, dim)
    return folded and dim <= MAX_FOLDED


def sizes_of(tokens: Tensor, emb: Tensor, dim: int) -> dict[str, int]:
    names = ("t_batch", "t_time", "t_row", "t_column")
    sizes = {"seqlen": tokens.shape[1], "count": tokens.shape[0] * tokens.shape[1], "vocab": emb.shape[0], "dim": dim}
    return sizes | dict(zip(names, tokens.stride(), strict=True))


def contiguous(t: Tensor | None) -> Tensor:
    assert t is not None
    return t.contiguous()


# ---- everything before the LayerNorm, from the weights alone ----------------------------------------------------------


def mixing_of(wide: Sequence[Tensor | None]) -> Tensor:
    """(9 E + 1, 9 E): convolution and gate as a matrix, and what the convolution's bias adds."""
    emb, conv_weight, conv_bias, alpha = wide[:4]
    assert emb is not None
    width = emb.shape[1]
    mixing = emb.new_empty(9 * width + 1, 9 * width)
    blocks = mixing_blocks(width)
    launch(
        OP, kernels.mixing_kernel, ((9 * width + 1) * blocks.tiles,), emb,
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
    block = min(1024, next_power_of_2(9 * width))
    return MixingBlocks(cdiv(9 * width, block), block, max(4, block // 128))


def convolution(
    emb: Tensor, conv_weight: Tensor | None, conv_bias: Tensor | None, alpha: Tensor | None
) -> dict[str, Any]:
    """Arguments of a kernel, with `emb` in the place of those that it does not read."""
    return {
        "conv_weight": emb if conv_weight is None else conv_weight.contiguous(),
        "conv_bias": emb if conv_bias is None else conv_bias.contiguous(),
        "alpha": emb if alpha is None else alpha.contiguous(),
    }


def variant(conv_weight: Tensor | None, conv_bias: Tensor | None, alpha: Tensor | None) -> dict[str, bool]:
    return {"CONV": conv_weight is not None, "BIAS": conv_bias is not None, "GATE": alpha is not None}


def folded_projection(wide: Sequence[Tensor | None], mixing: Tensor) -> tuple[Tensor, Tensor]:
    """(9 E, D), rows (channel, cell), and the shift (D)."""
    proj_weight, proj_bias = wide[4:6]
    assert proj_weight is not None
    both = mixing @ proj_weight.T
    return both[:-1], both[-1] if proj_bias is None else both[-1] + proj_bias


def tables(wide: Sequence[Tensor | None], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """table (V, 9 D) in `dtype`, shift (D), mixing."""
    emb = wide[0]
    assert emb is not None
    mixing = mixing_of(wide)
    projection, shift = folded_projection(wide, mixing)
    return (emb @ projection.view(emb.shape[1], -1)).to(dtype), shift, mixing


def projection_gradients(
    wide: Sequence[Tensor | None], mixing: Tensor, dprojection: Tensor, dshift: Tensor
) -> list[Tensor | None]:
    """From the gradients of (9 E, D) and (D) to those of conv_weight, conv_bias, alpha, proj_weight and proj_bias."""
    conv_weight, alpha, proj_weight = wide[1], wide[3], wide[4]
    assert proj_weight is not None
    both = torch.cat([dprojection, dshift[None]])
    dconv = dbias = dalpha = None
    if conv_weight is not None or alpha is not None:
        dconv, dbias, dalpha = mixing_gradients(wide, both @ proj_weight)
    return [dconv, dbias, dalpha, both.T @ mixing, dshift]


def mixing_gradients(wide: Sequence[Tensor | None], dmixing: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """From the gradient of the mixing to those of conv_weight (E, E, 9), conv_bias (E) and alpha (9); of what is absent, anything."""
    emb, conv_weight, conv_bias, alpha = wide[:4]
    assert emb is not None
    width = emb.shape[1]
    blocks = mixing_blocks(width)
    dconv, dbias = emb.new_empty(width, width, 9), emb.new_empty(width)
    dgate = emb.new_empty(width * blocks.tiles, 9)
    launch(
        OP, kernels.mixing_backward_kernel, (width * blocks.tiles,), emb, dmixing=dmixing, dshift=dmixing[-1],
        **convolution(emb, conv_weight, conv_bias, alpha), dconv=dconv, dbias=dbias, dgate=dgate, width=width,
        tiles=blocks.tiles, **variant(conv_weight, conv_bias, alpha), BLOCK=blocks.width, num_warps=blocks.num_warps,
    )  # fmt: skip
    return dconv, dbias, dgate.sum(0) if alpha is not None else dgate


# ---- sums by key ------------------------------------------------------------------------------------------------------


def sums_by_key(rows: Tensor, keys: Tensor, known: int, whole: Tensor | None) -> Tensor:
    """(known, D): entry i of `keys` adds row i % len(rows); other keys are left out. In a fixed order, without atomics.

    `whole` (D): the sum of all rows, for a key that each of them has.
    """
    rows = rows.contiguous()
    period, dim = rows.shape
    entries = keys.numel()
    ordered, order = torch.sort(keys, stable=True)
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


def key_dtype(known: int) -> torch.dtype:
    """The narrowest that holds 0 to `known`: sorting passes over its bytes."""
    return torch.int16 if known < 2**15 else torch.int32 if known < 2**31 else torch.int64


# ---- the two forms ----------------------------------------------------------------------------------------------------


def backward_folded(
    tokens: Tensor, wide: Sequence[Tensor | None], dtype: torch.dtype, eps: float, dout: Tensor, needs_table: bool
) -> list[Tensor | None]:
    emb, norm_weight = wide[0], wide[6]
    assert emb is not None and norm_weight is not None
    vocab, width = emb.shape
    dim = dout.shape[2]
    table, shift, mixing = tables(wide, dtype)
    sizes = sizes_of(tokens, emb, dim)
    count = sizes["count"]
    blocks = blocks_of(dim)
    each = blocks_per_program(device_of(emb), count, blocks)
    programs = cdiv(count, each * blocks.tokens)
    dpre, sums = emb.new_empty(count, dim), emb.new_empty(programs, 3, dim)
    keys = emb.new_empty(9 * count, dtype=key_dtype(9 * vocab))
    launch(
        OP, kernels.backward_kernel, (programs,), emb, tokens=tokens, table=table, shift=shift,
        norm_weight=norm_weight.contiguous(), dout=dout, dpre=dpre, keys=keys, sums=sums,
        **{k: sizes[k] for k in ("seqlen", "count", "vocab", "dim")}, blocks=each,
        **{k: v for k, v in sizes.items() if k.startswith("t_")},
        **dict(zip(("g_batch", "g_time", "g_column"), dout.stride(), strict=True)), eps=eps,
        BM=blocks.tokens, BD=blocks.width, num_warps=blocks.num_warps,
    )  # fmt: skip
    dnorm_weight, dnorm_bias, dshift = sums.sum(0)
    if not needs_table:
        return [None] * 6 + [dnorm_weight, dnorm_bias]
    dtable = sums_by_key(dpre, keys, 9 * vocab, dshift).view(vocab, -1)  # (V, 9 D)
    projection, _ = folded_projection(wide, mixing)
    demb = dtable @ projection.view(width, -1).T
    dprojection = (emb.T @ dtable).view(9 * width, dim)
    return [demb, *projection_gradients(wide, mixing, dprojection, dshift), dnorm_weight, dnorm_bias]


def direct(tokens: Tensor, wide: Sequence[Tensor | None]) -> tuple[Tensor, Tensor, Tensor]:
    """What goes into the LayerNorm (N, D), the embeddings (N, 9 E) and the mixing."""
    emb = wide[0]
    assert emb is not None
    ids = tokens.reshape(-1, 9).long()
    known = (ids >= 0) & (ids < emb.shape[0])
    x = emb[ids.where(known, 0)].masked_fill(~known[..., None], torch.nan)  # (N, 9, E)
    x = x.transpose(1, 2).reshape(len(x), -1)
    mixing = mixing_of(wide)
    projection, shift = folded_projection(wide, mixing)
    return torch.addmm(shift, x, projection), x, mixing


def backward_direct(
    tokens: Tensor, wide: Sequence[Tensor | None], dtype: torch.dtype, eps: float, dout: Tensor, needs_table: bool
) -> list[Tensor | None]:
    emb, norm_weight, norm_bias = wide[0], wide[6], wide[7]
    assert emb is not None
    vocab, width = emb.shape
    pre, x, mixing = direct(tokens, wide)
    size = list(pre.shape[-1:])
    dout = dout.reshape(pre.shape).float()
    _, mean, scale = torch.native_layer_norm(pre, size, norm_weight, norm_bias, eps)
    dpre, dnorm_weight, dnorm_bias = torch.ops.aten.native_layer_norm_backward(
        dout, pre, size, mean, scale, norm_weight, norm_bias, [needs_table, True, True]
    )
    if not needs_table:
        return [None] * 6 + [dnorm_weight, dnorm_bias]
    projection, _ = folded_projection(wide, mixing)
    dx = (dpre @ projection.T).view(-1, width, 9).transpose(1, 2).reshape(-1, width)  # (9 N, E)
    ids = tokens.reshape(-1).long()
    keys = ids.where((ids >= 0) & (ids < vocab), vocab).to(key_dtype(vocab))
    demb = sums_by_key(dx, keys, vocab, None)
    return [demb, *projection_gradients(wide, mixing, x.T @ dpre, dpre.sum(0)), dnorm_weight, dnorm_bias]


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
