"""SimpleAttentionModel: a small Transformer over embedded windows."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pixelbytes.models.common import SequenceModel
from pixelbytes.modules import PxByEmbed


class SimpleAttentionModel(SequenceModel):
    """Embedding, linear map to `hidden_dim`, pre-norm Transformer blocks with rotary positions, linear head.

    Differs from upstream: the third argument is the width, as the notebook's author meant it (there it set the number
    of heads); positions are encoded (without them the model cannot tell the order of its input); attention goes through
    scaled_dot_product_attention, which keeps no (seqlen, seqlen) map for the backward pass.

    Args:
        vocab_size: number of ids.
        embedding_dim: width of each of the nine embedded cells; with `pxby`, width of the embedded window.
        hidden_dim: width of the Transformer, a multiple of 2 * num_heads.
        num_heads: attention heads.
        num_layers: blocks.
        bidirectional: no causal mask. Only the last position can then be a target.
        pxby: embed the window by PxByEmbed instead of nine lookups side by side.
        conv, gate: of PxByEmbed.
    """

    def __init__(
        self,
        vocab_size: int,
        embedding_dim: int,
        hidden_dim: int,
        *,
        num_heads: int = 4,
        num_layers: int = 1,
        bidirectional: bool = False,
        pxby: bool = False,
        conv: bool = True,
        gate: bool = True,
    ) -> None:
        super().__init__()
        if min(vocab_size, embedding_dim, hidden_dim, num_heads, num_layers) < 1:
            raise ValueError("SimpleAttentionModel: sizes and counts must be positive")
        if hidden_dim % (2 * num_heads):
            raise ValueError(
                f"SimpleAttentionModel: hidden_dim must be a multiple of 2 * num_heads = {2 * num_heads}, "
                f"got {hidden_dim}"
            )
        self.settings = {
            "vocab_size": vocab_size,
            "embedding_dim": embedding_dim,
            "hidden_dim": hidden_dim,
            "num_heads": num_heads,
            "num_layers": num_layers,
            "bidirectional": bidirectional,
            "pxby": pxby,
            "conv": conv,
            "gate": gate,
        }
        self.vocab_size, self.causal, self.pxby = vocab_size, not bidirectional, pxby
        self.embedding: nn.Module
        if pxby:
            self.embedding, width = PxByEmbed(vocab_size, embedding_dim, conv=conv, gate=gate), embedding_dim
        else:
            self.embedding, width = nn.Embedding(vocab_size, embedding_dim), 9 * embedding_dim
        self.input_proj = nn.Linear(width, hidden_dim)
        self.blocks = nn.ModuleList(_Block(hidden_dim, num_heads, self.causal) for _ in range(num_layers))
        self.norm = nn.LayerNorm(hidden_dim)
        self.fc = nn.Linear(hidden_dim, vocab_size)

    def config_dict(self) -> dict[str, Any]:
        return dict(self.settings)

    def hidden(self, x: Tensor) -> Tensor:
        h = self.input_proj(self.embedding(x) if self.pxby else self.embedding(x.long()).flatten(2))
        for block in self.blocks:
            h = block(h)
        return self.norm(h)

    def head(self, h: Tensor) -> Tensor:
        return self.fc(h)


class _Block(nn.Module):
    """Pre-norm attention and MLP, each added to its input."""

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.attention_norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, h: Tensor) -> Tensor:
        qkv = self.qkv(self.attention_norm(h)).unflatten(-1, (3, self.heads, -1))  # (batch, seqlen, 3, heads, width)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (batch, heads, seqlen, width) each
        mixed = F.scaled_dot_product_attention(_rotate(q), _rotate(k), v, is_causal=self.causal)
        h = h + self.out(mixed.transpose(1, 2).flatten(2))
        return h + self.mlp(self.mlp_norm(h))


def _rotate(x: Tensor) -> Tensor:
    """Rotary positions (Su et al., "RoFormer", section 3.2): only distances between positions enter the scores.

    x (batch, heads, seqlen, width) -> the same, pairs (i, i + width / 2) turned by t / 10000^(2 i / width).
    """
    half = x.shape[-1] // 2
    rate = 10000.0 ** (-torch.arange(half, device=x.device, dtype=torch.float32) / half)
    angle = torch.arange(x.shape[-2], device=x.device, dtype=torch.float32)[:, None] * rate  # (seqlen, half)
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)
