"""pxby_embed on a GPU, around its kernels: what cuda.py and triton.py have in common. Matrix products are torch's.

Forward: convolution, gate and projection are folded into a table of (id, cell) rows; one kernel gathers nine rows a token and normalises.
Backward: that once more, and the gradient of what went into the LayerNorm; its rows are summed by (id, cell) over sorted keys, in runs of
fixed length and then over the runs, in order. A cell with the same id everywhere, as four of nine have in a raster's windows, is one
column sum. Deterministic. Where a table would cost more than it saves, or a row is too wide for the kernels, each token's nine embeddings
go through the folded projection instead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from .formulation import folded_is_cheaper
from .ids import check_ids

CELLS = 9
Weights: TypeAlias = "Sequence[Tensor | None]"


class Kernels(NamedTuple):
    """The launches of a backend. `wide`: the eight weights, contiguous and float32, or None."""

    # (D): whether the kernels hold a row of D channels, as the folded form needs
    take_rows_of: Callable[[int], bool]
    # (wide): (9 E + 1, 9 E), convolution and gate as a matrix, and what the convolution's bias adds
    mixing_of: Callable[[Weights], Tensor]
    # (wide, gradient of the mixing): those of conv_weight (E, E, 9), conv_bias (E) and alpha (9), None where absent
    mixing_gradients: Callable[[Weights, Tensor], list[Tensor | None]]
    # (tokens, table (V, 9 D), shift, wide, eps, out (batch, seqlen, D)): LayerNorm of shift and nine rows a token, into `out`
    rows_forward: Callable[[Tensor, Tensor, Tensor, Weights, float, Tensor], None]
    # (tokens, table, shift, wide, eps, dout): the gradient of what went into the LayerNorm (N, D); keys (9 N), cell by cell, 9 id + cell
    # or 9 V for an id outside the vocabulary; the gradients of norm_weight, norm_bias and shift (3, D)
    rows_backward: Callable[[Tensor, Tensor, Tensor, Weights, float, Tensor], tuple[Tensor, Tensor, Tensor]]
    # (rows, keys, known, whole): (known, D), entry i of `keys` adds row i % len(rows), other keys are left out; in a fixed order.
    # whole (D): the sum of all rows, for a key that each of them has
    sums_by_key: Callable[[Tensor, Tensor, int, Tensor | None], Tensor]


def forward(kernels: Kernels, tokens: Tensor, weights: Weights, eps: float, folded: bool | None = None) -> Tensor:
    """(batch, seqlen, D) in the dtype of the weights. `folded`: None chooses by the sizes."""
    emb, proj_weight = weights[0], weights[4]
    assert emb is not None and proj_weight is not None
    out = emb.new_empty(*tokens.shape[:2], proj_weight.shape[0])
    check_ids(tokens, emb.shape[0])
    if out.numel() == 0:
        return out
    with torch.autocast(tokens.device.type, enabled=False):
        wide = widened(weights)
        if is_folded(kernels, tokens, emb, proj_weight, folded):
            table, shift, _ = tables(kernels, wide, emb.dtype)
            kernels.rows_forward(tokens, table, shift, wide, eps, out)
        else:
            pre, _, _ = direct(kernels, tokens, wide)
            out.copy_(F.layer_norm(pre, pre.shape[-1:], wide[6], wide[7], eps).view(out.shape))
    return out


def backward(
    kernels: Kernels,
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
        call = backward_folded if is_folded(kernels, tokens, emb, proj_weight, folded) else backward_direct
        found = call(kernels, tokens, widened(weights), emb.dtype, eps, dout, any(needs[:6]))
        return [
            None if w is None or not need or grad is None else grad.reshape(w.shape).to(w.dtype)
            for w, need, grad in zip(weights, needs, found, strict=True)
        ]


def widened(weights: Weights) -> list[Tensor | None]:
    return [None if w is None else w.detach().float().contiguous() for w in weights]


def is_folded(kernels: Kernels, tokens: Tensor, emb: Tensor, proj_weight: Tensor, folded: bool | None) -> bool:
    dim = proj_weight.shape[0]
    if folded is None:
        vocab, width = emb.shape
        folded = folded_is_cheaper(tokens.shape[0] * tokens.shape[1], vocab, width, dim)
    return folded and kernels.take_rows_of(dim)


# ---- everything before the LayerNorm, from the weights alone ----------------------------------------------------------


def folded_projection(wide: Weights, mixing: Tensor) -> tuple[Tensor, Tensor]:
    """(9 E, D), rows (channel, cell), and the shift (D)."""
    proj_weight, proj_bias = wide[4:6]
    assert proj_weight is not None
    both = mixing @ proj_weight.T
    return both[:-1], both[-1] if proj_bias is None else both[-1] + proj_bias


def tables(kernels: Kernels, wide: Weights, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """table (V, 9 D) in `dtype`, shift (D), mixing."""
    emb = wide[0]
    assert emb is not None
    mixing = kernels.mixing_of(wide)
    projection, shift = folded_projection(wide, mixing)
    return (emb @ projection.view(emb.shape[1], -1)).to(dtype), shift, mixing


def projection_gradients(
    kernels: Kernels, wide: Weights, mixing: Tensor, dprojection: Tensor, dshift: Tensor
) -> list[Tensor | None]:
    """From the gradients of (9 E, D) and (D) to those of conv_weight, conv_bias, alpha, proj_weight and proj_bias."""
    conv_weight, alpha, proj_weight = wide[1], wide[3], wide[4]
    assert proj_weight is not None
    both = torch.cat([dprojection, dshift[None]])
    mixed: list[Tensor | None] = [None] * 3
    if conv_weight is not None or alpha is not None:
        mixed = kernels.mixing_gradients(wide, both @ proj_weight)
    return [*mixed, both.T @ mixing, dshift]


# ---- the two forms ----------------------------------------------------------------------------------------------------


def key_dtype(known: int) -> torch.dtype:
    """The narrowest that holds 0 to `known`: sorting passes over its bytes."""
    return torch.int16 if known < 2**15 else torch.int32


def backward_folded(
    kernels: Kernels, tokens: Tensor, wide: Weights, dtype: torch.dtype, eps: float, dout: Tensor, needs_table: bool
) -> list[Tensor | None]:
    emb = wide[0]
    assert emb is not None
    (vocab, width), dim = emb.shape, dout.shape[2]
    table, shift, mixing = tables(kernels, wide, dtype)
    dpre, keys, (dnorm_weight, dnorm_bias, dshift) = kernels.rows_backward(tokens, table, shift, wide, eps, dout)
    if not needs_table:
        return [None] * 6 + [dnorm_weight, dnorm_bias]
    dtable = kernels.sums_by_key(dpre, keys, CELLS * vocab, dshift).view(vocab, -1)  # (V, 9 D)
    projection, _ = folded_projection(wide, mixing)
    demb = dtable @ projection.view(width, -1).T
    dprojection = (emb.T @ dtable).view(CELLS * width, dim)
    return [demb, *projection_gradients(kernels, wide, mixing, dprojection, dshift), dnorm_weight, dnorm_bias]


def direct(kernels: Kernels, tokens: Tensor, wide: Weights) -> tuple[Tensor, Tensor, Tensor]:
    """What goes into the LayerNorm (N, D), the embeddings (N, 9 E) and the mixing."""
    emb = wide[0]
    assert emb is not None
    ids = tokens.reshape(-1, CELLS).long()
    known = (ids >= 0) & (ids < emb.shape[0])
    x = emb[ids.where(known, 0)].masked_fill(~known[..., None], torch.nan)  # (N, 9, E)
    x = x.transpose(1, 2).reshape(len(x), -1)
    mixing = kernels.mixing_of(wide)
    projection, shift = folded_projection(wide, mixing)
    return torch.addmm(shift, x, projection), x, mixing


def backward_direct(
    kernels: Kernels, tokens: Tensor, wide: Weights, dtype: torch.dtype, eps: float, dout: Tensor, needs_table: bool
) -> list[Tensor | None]:
    emb, norm_weight, norm_bias = wide[0], wide[6], wide[7]
    assert emb is not None
    vocab, width = emb.shape
    pre, x, mixing = direct(kernels, tokens, wide)
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
    demb = kernels.sums_by_key(dx, keys, vocab, None)
    gradients = projection_gradients(kernels, wide, mixing, x.T @ dpre, dpre.sum(0))
    return [demb, *gradients, dnorm_weight, dnorm_bias]
