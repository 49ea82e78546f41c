"""pxby_embed on the CPU: memory for the C++ kernels of csrc/cpu/pxby_embed.cpp, and the calls."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..._backend import load_extension
from .formulation import folded_is_cheaper


def forward(tokens: Tensor, weights: Sequence[Tensor | None], eps: float, folded: bool | None = None) -> Tensor:
    """(batch, seqlen, D) in the dtype of the weights. `folded`: None chooses by the sizes."""
    emb, proj_weight = weights[0], weights[4]
    assert emb is not None and proj_weight is not None
    out = emb.new_empty((*tokens.shape[:2], proj_weight.shape[0]))
    if out.numel():
        extension().pxby_embed_forward((tokens, *weights), eps, *options(tokens, emb, proj_weight, folded), out)
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
    make = torch.empty_like if dout.numel() else torch.zeros_like
    grads = [
        None if w is None or not need else make(w, memory_format=torch.contiguous_format)
        for w, need in zip(weights, needs, strict=True)
    ]
    if dout.numel():
        chosen = options(tokens, emb, proj_weight, folded)
        dout = dout.to(emb.dtype).contiguous()
        extension().pxby_embed_backward((tokens, *weights), eps, *chosen, dout, tuple(grads))
    return grads


def options(tokens: Tensor, emb: Tensor, proj_weight: Tensor, folded: bool | None) -> tuple[bool, bool, int]:
    """folded, use_double, threads: the same for forward and backward."""
    if folded is None:
        vocab, width = emb.shape
        folded = folded_is_cheaper(tokens.shape[0] * tokens.shape[1], vocab, width, proj_weight.shape[0])
    return folded, emb.dtype == torch.float64, torch.get_num_threads()


def extension():
    cpu, reason = load_extension("_cpu")
    if cpu is None:
        raise RuntimeError(reason)
    return cpu
