"""PxByEmbed: the embedding of a token with its 3x3 neighbourhood."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pixelbytes_kernels import pxby_embed


class PxByEmbed(nn.Module):
    """Embed windows of 3x3 ids: lookup, 3x3 convolution, gate per cell, projection, LayerNorm.

    `Y = s * X + (1 - s) * Conv(X)` with `X = emb[tokens]` and `s = sigmoid(alpha)`, then `LayerNorm(Linear(Y))`.
    The state_dict keys are upstream's (`alpha`, `linear_embedding`, `patch_embedding`, `projection`, `norm`), the
    inner width is max(9, dim // 9).

    Args:
        vocab_size: number of ids V.
        dim: output width D.
        k: side of the window; only 3 is supported.
        conv: without it Y = s * X (upstream's "noconv").
        gate: without it there is no `alpha`.

    Source: the PixelBytes paper, Algorithm 1, and the published code, which adds the biases and the LayerNorm.
    """

    def __init__(self, vocab_size: int, dim: int, k: int = 3, conv: bool = True, gate: bool = True) -> None:
        super().__init__()
        if k != 3:
            raise ValueError(f"PxByEmbed: k must be 3, got {k}")
        if vocab_size < 1 or dim < 1:
            raise ValueError(f"PxByEmbed: vocab_size and dim must be positive, got {vocab_size} and {dim}")
        self.d_model, self.k, self.e_model = dim, k, max(9, dim // 9)
        self.linear_embedding = nn.Embedding(vocab_size, self.e_model)
        self.patch_embedding = nn.Conv2d(self.e_model, self.e_model, k, padding=1) if conv else None
        self.alpha = nn.Parameter(torch.rand(1, 1, k, k)) if gate else None
        self.projection = nn.Linear(k * k * self.e_model, dim)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        """x (batch, seqlen, 3, 3), any integer dtype -> (batch, seqlen, dim) in the dtype of the weights."""
        conv = self.patch_embedding
        return pxby_embed(
            x,
            self.linear_embedding.weight,
            None if conv is None else conv.weight,
            None if conv is None else conv.bias,
            self.alpha,
            self.projection.weight,
            self.projection.bias,
            self.norm.weight,
            self.norm.bias,
            eps=self.norm.eps,
        )
