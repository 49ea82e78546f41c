"""pxby_embed on NVIDIA GPUs: memory for the CUDA C++ kernels of csrc/cuda/pxby_embed*.cu, and the calls; matrix products are torch's.

Forward: convolution, gate and projection are folded into a table of (id, cell) rows; one kernel gathers nine rows a token and
normalises. Backward: that once more, and the gradient of what went into the LayerNorm; its rows are summed by (id, cell) over
sorted keys, in runs of fixed length and then over the runs, in order. A cell with the same id everywhere, as four of nine have in
a raster's windows, is one column sum. Deterministic. Where a table would cost more than it saves, or D is too large for the
kernels' registers, each token's nine embeddings go through the folded projection.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..._cuda_launch import extension, fp32, multiprocessors, where
from .formulation import folded_is_cheaper
from .ids import check_ids

CELLS = 9
WARPS = 16  # of a multiprocessor, that a backward should keep busy
Weights = Sequence[Tensor | None]


def forward(tokens: Tensor, weights: Weights, eps: float, folded: bool | None = None) -> Tensor:
    """(batch, seqlen, D) in the dtype of the weights. `folded`: None chooses by the sizes."""
    emb, proj_weight = weights[0], weights[4]
    assert emb is not None and proj_weight is not None
    out = emb.new_empty(*tokens.shape[:2], proj_weight.shape[0])
    check_ids(tokens, emb.shape[0])
    if out.numel() == 0:
        return out
    with torch.autocast(tokens.device.type, enabled=False):
        wide = [fp32(w) for w in weights]
        if not is_folded(tokens, emb, proj_weight, folded):
            pre, _, _ = direct(tokens, wide)
            return out.copy_(F.layer_norm(pre, pre.shape[-1:], wide[6], wide[7], eps).view(out.shape))
        table, shift, _ = tables(wide, emb.dtype)
        extension().embed_forward(*where(out), tokens, table, shift, wide[6], wide[7], out, eps)
    return out


def backward(
    tokens: Tensor,
    weights: Weights,
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
        call = backward_folded if is_folded(tokens, emb, proj_weight, folded) else backward_direct
        found = call(tokens, [fp32(w) for w in weights], emb.dtype, eps, dout, any(needs[:6]))
        return [
            None if w is None or not need or grad is None else grad.reshape(w.shape).to(w.dtype)
            for w, need, grad in zip(weights, needs, found, strict=True)
        ]


def is_folded(tokens: Tensor, emb: Tensor, proj_weight: Tensor, folded: bool | None) -> bool:
    if extension().embed_lanes(proj_weight.shape[0]) == 0:
        return False
    if folded is not None:
        return folded
    return folded_is_cheaper(tokens.shape[0] * tokens.shape[1], emb.shape[0], emb.shape[1], proj_weight.shape[0])


# ---- everything before the LayerNorm, from the weights alone ----------------------------------------------------------


def mixing_of(wide: Weights) -> Tensor:
    """(9 E + 1, 9 E): convolution and gate as a matrix, and what the convolution's bias adds."""
    emb, conv_weight, conv_bias, alpha = wide[:4]
    assert emb is not None
    size = CELLS * emb.shape[1]
    mixing = emb.new_empty(size + 1, size)
    extension().embed_mixing(*where(emb), conv_weight, conv_bias, alpha, mixing)
    return mixing


def folded_projection(wide: Weights, mixing: Tensor) -> tuple[Tensor, Tensor]:
    """(9 E, D), rows (channel, cell), and the shift (D)."""
    proj_weight, proj_bias = wide[4:6]
    assert proj_weight is not None
    both = mixing @ proj_weight.T
    return both[:-1], both[-1] if proj_bias is None else both[-1] + proj_bias


def tables(wide: Weights, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """table (V, 9, D) in `dtype`, shift (D), mixing."""
    emb = wide[0]
    assert emb is not None
    mixing = mixing_of(wide)
    projection, shift = folded_projection(wide, mixing)
    table = (emb @ projection.reshape(emb.shape[1], -1)).to(dtype)
    return table.view(emb.shape[0], CELLS, -1), shift.contiguous(), mixing


def projection_gradients(wide: Weights, mixing: Tensor, dprojection: Tensor, dshift: Tensor) -> list[Tensor | None]:
    """From the gradients of (9 E, D) and (D) to those of conv_weight, conv_bias, alpha, proj_weight and proj_bias."""
    emb, conv_weight, conv_bias, alpha, proj_weight, _ = wide[:6]
    assert emb is not None and proj_weight is not None
    width = emb.shape[1]
    both = torch.cat([dprojection, dshift[None]])
    dproj = both.T @ mixing
    dconv = dbias = dgate = None
    if conv_weight is not None or alpha is not None:
        dmixing = both @ proj_weight
        dconv = None if conv_weight is None else emb.new_empty(width, width, CELLS)
        dbias = None if conv_bias is None else emb.new_empty(width)
        dgate = None if alpha is None else emb.new_empty(width, CELLS)
        extension().embed_mixing_backward(
            *where(emb), conv_weight, conv_bias, alpha, dmixing, dconv, dbias, dgate
        )  # fmt: skip
    return [dconv, dbias, None if dgate is None else dgate.sum(0), dproj, dshift]


# ---- sums by key ------------------------------------------------------------------------------------------------------


def sums_by_key(rows: Tensor, keys: Tensor, known: int, whole: Tensor | None) -> Tensor:
    """(known, D): entry i of `keys` adds row i % len(rows); other keys are left out. In a fixed order, without atomics.

    `whole` (D): the sum of all rows, for a key that each of them has.
    """
    entries, dim = keys.numel(), rows.shape[1]
    ordered, order = torch.sort(keys.view(-1), stable=True)
    starts = torch.searchsorted(ordered, torch.arange(known + 1, dtype=keys.dtype, device=keys.device))
    run = run_length(entries)
    parts = rows.new_empty(-(-entries // run) + known, dim)
    out = rows.new_empty(known, dim)
    extension().embed_sums_by_key(*where(rows), rows, ordered, order, starts, whole, parts, out, run)
    return out


def run_length(entries: int) -> int:
    """Sorted entries that a thread adds up in one go."""
    return 32 if entries < 2**16 else 64 if entries < 2**19 else 128


def key_dtype(known: int) -> torch.dtype:
    """The narrowest that holds 0 to `known`: sorting passes over its bytes."""
    return torch.int16 if known < 2**15 else torch.int32


# ---- the two forms ----------------------------------------------------------------------------------------------------


def backward_folded(
    tokens: Tensor, wide: Weights, dtype: torch.dtype, eps: float, dout: Tensor, needs_table: bool
) -> list[Tensor | None]:
    emb, norm_weight = wide[0], wide[6]
    assert emb is not None and norm_weight is not None
    (vocab, width), dim = emb.shape, dout.shape[2]
    table, shift, mixing = tables(wide, dtype)
    count = tokens.shape[0] * tokens.shape[1]
    groups = min(count, WARPS * 32 // extension().embed_lanes(dim) * multiprocessors(emb))
    groups = -(-count // -(-count // groups))  # the fewest that have as much to do
    groups += -groups % (128 // extension().embed_lanes(dim))  # whole blocks
    dpre, partial, sums = emb.new_empty(count, dim), emb.new_empty(groups, 3, dim), emb.new_empty(3, dim)
    keys = torch.empty(CELLS, count, dtype=key_dtype(CELLS * vocab), device=emb.device)
    dout = dout.to(dtype).contiguous()
    extension().embed_backward(
        *where(emb), tokens, table, shift, norm_weight, dout, dpre, keys, partial, sums, eps
    )  # fmt: skip
    dnorm_weight, dnorm_bias, dshift = sums
    if not needs_table:
        return [None] * 6 + [dnorm_weight, dnorm_bias]
    dtable = sums_by_key(dpre, keys, CELLS * vocab, dshift).view(vocab, -1)  # (V, 9 D)
    projection, _ = folded_projection(wide, mixing)
    demb = dtable @ projection.reshape(width, -1).T
    dprojection = (emb.T @ dtable).view(CELLS * width, dim)
    return [demb, *projection_gradients(wide, mixing, dprojection, dshift), dnorm_weight, dnorm_bias]


def direct(tokens: Tensor, wide: Weights) -> tuple[Tensor, Tensor, Tensor]:
    """What goes into the LayerNorm (N, D), the embeddings (N, 9 E) and the mixing."""
    emb = wide[0]
    assert emb is not None
    ids = tokens.reshape(-1, CELLS).long()
    known = (ids >= 0) & (ids < emb.shape[0])
    x = emb[ids.where(known, 0)].masked_fill(~known[..., None], torch.nan)  # (N, 9, E)
    x = x.transpose(1, 2).reshape(len(x), -1)
    mixing = mixing_of(wide)
    projection, shift = folded_projection(wide, mixing)
    return torch.addmm(shift, x, projection), x, mixing


def backward_direct(
    tokens: Tensor, wide: Weights, dtype: torch.dtype, eps: float, dout: Tensor, needs_table: bool
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
    dx = (dpre @ projection.T).view(-1, width, CELLS).transpose(1, 2).reshape(-1, width)  # (9 N, E)
    ids = tokens.reshape(-1).long()
    keys = ids.where((ids >= 0) & (ids < vocab), vocab).to(key_dtype(vocab))
    demb = sums_by_key(dx, keys, vocab, None)
    return [demb, *projection_gradients(wide, mixing, x.T @ dpre, dpre.sum(0)), dnorm_weight, dnorm_bias]
