"""pxby_embed in lean PyTorch: `embedding_bag` on a folded table, LayerNorm; no (batch * seqlen, E, 3, 3) tensors.

Convolution, gate and projection are linear, and the convolution never leaves its window. So what goes into the
LayerNorm is shift + the sum over the nine cells p of table[id_p, p], and both are computed from the weights alone.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .formulation import folded_is_cheaper
from .ids import check_ids
from .reference import path_weights, pxby_embed_ref

PIECE = 1024  # tokens


def embed(tokens: Tensor, *weights: Tensor | None, eps: float) -> Tensor:
    """Arguments as `pxby_embed`, checked. Computes in float32, or float64 where the weights are."""
    emb, proj_weight = weights[0], weights[4]
    assert emb is not None and proj_weight is not None
    dtype = emb.dtype
    batch, seqlen = tokens.shape[:2]
    check_ids(tokens, emb.shape[0])
    with torch.autocast(tokens.device.type, enabled=False):
        if dtype.itemsize == 2:
            weights = tuple(None if w is None else w.float() for w in weights)
        if not folded_is_cheaper(batch * seqlen, emb.shape[0], emb.shape[1], proj_weight.shape[0]):
            return pxby_embed_ref(tokens, *weights, eps=eps).to(dtype)  # type: ignore[arg-type]
        # The fold in float64, where there is one: it is small, and its rounding would stay in every gradient.
        wide = weights[0].dtype if tokens.device.type == "mps" else torch.float64  # type: ignore[union-attr]
        table, shift = fold(*(None if w is None else w.to(wide) for w in weights[:6]))  # type: ignore[arg-type]
        cells = torch.arange(9, device=tokens.device)
        # An id outside the vocabulary stays outside the table.
        rows = tokens.reshape(batch * seqlen, 9).long() * 9 + cells
        norm_weight, norm_bias = weights[6:]
        assert norm_weight is not None
        table = table.to(norm_weight.dtype)
        # In pieces on the CPU, where the gradient of a row is one long chain of additions: id 0 fills four cells.
        pieces = rows.split(PIECE) if rows.device.type == "cpu" else [rows]
        pre = torch.cat([F.embedding_bag(piece, table, mode="sum") for piece in pieces])  # (batch * seqlen, D)
        if shift is not None:
            pre = pre + shift.to(norm_weight.dtype)
        out = F.layer_norm(pre, pre.shape[-1:], norm_weight, norm_bias, eps)
    return out.to(dtype).view(batch, seqlen, -1)


def fold(
    emb: Tensor,
    conv_weight: Tensor | None,
    conv_bias: Tensor | None,
    alpha: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """table (V * 9, D) and shift (D)."""
    vocab, width = emb.shape
    proj = proj_weight.view(-1, width, 3, 3)
    keep, mix = path_weights(alpha, conv_weight is not None)
    acting = proj if keep is None else proj * keep  # (D, E, 3, 3), on the embeddings
    shift = proj_bias
    if conv_weight is not None:
        mixed = proj * mix
        acting = acting + F.conv_transpose2d(mixed, conv_weight, padding=1)
        if conv_bias is not None:
            moved = torch.einsum("deij,e->d", mixed, conv_bias)
            shift = moved if shift is None else shift + moved
    table = emb @ acting.permute(1, 2, 3, 0).reshape(width, -1)  # (V, 9 D)
    return table.view(vocab * 9, -1), shift
