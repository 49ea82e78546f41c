"""BysMamba: embedded 3x3 windows, residual Mamba blocks between two bidirectional ones, a linear head."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pixelbytes.models.common import SequenceModel
from pixelbytes.modules import BiMamba, Mamba, PxByEmbed, RMSNorm
from pixelbytes_kernels import MambaStep


@dataclass
class MambaConfig:
    """Settings of BysMamba.

    Args:
        dim: width of the residual stream.
        d_state, d_conv, expand: of every Mamba (see modules.Mamba).
        depth: number of blocks between the in and out stages.
        vocab_size: number of ids; 113 is upstream's vocabulary.
        bidirectional: in and out stages read both ways, and only the last position can be a target. Without it
            the model is causal and may be trained on every position.
        pxby_embed: embed the 3x3 window; without it only its centre.
        conv, gate: of the 3x3 embedding (see modules.PxByEmbed).
        norm: RMSNorm before each block and before the head. Upstream has none; deep or long training wants it.
    """

    dim: int
    d_state: int = 16
    d_conv: int = 4
    expand: int = 2
    depth: int = 8
    vocab_size: int = 113
    bidirectional: bool = True
    pxby_embed: bool = True
    conv: bool = True
    gate: bool = True
    norm: bool = False


class BysMamba(SequenceModel):
    """`e = embed(x)`; `e = e + stage(e)` for the in stage, `depth` blocks and the out stage; `lm_head(e)`.

    A bidirectional stage is the mean of both directions of one shared Mamba. Differs from upstream where that could not
    be trained: the convolution of the embedding keeps its shape, sums are out of place, and the loss takes the last
    position (or all of them, if causal). Embedding as in the paper's Algorithm 1.
    """

    def __init__(self, config: MambaConfig) -> None:
        super().__init__()
        if config.depth < 0:
            raise ValueError(f"MambaConfig: depth must not be negative, got {config.depth}")
        self.config = config
        self.vocab_size, self.causal = config.vocab_size, not config.bidirectional
        self.pxby_embedding: nn.Module
        if config.pxby_embed:
            self.pxby_embedding = PxByEmbed(config.vocab_size, config.dim, conv=config.conv, gate=config.gate)
        else:
            self.pxby_embedding = nn.Embedding(config.vocab_size, config.dim)
        sizes = (config.dim, config.d_state, config.d_conv, config.expand)
        outer = BiMamba if config.bidirectional else Mamba
        self.in_mamba = outer(*sizes)
        self.layers = nn.ModuleList(Mamba(*sizes) for _ in range(config.depth))
        self.out_mamba = outer(*sizes)
        self.norms = nn.ModuleList(RMSNorm(config.dim) for _ in range(config.depth + 3)) if config.norm else None
        self.lm_head = nn.Linear(config.dim, config.vocab_size, bias=False)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> BysMamba:
        try:
            return cls(MambaConfig(**config))
        except TypeError as error:
            raise ValueError(f"MambaConfig: these settings do not fit: {error}") from error

    def config_dict(self) -> dict[str, Any]:
        return asdict(self.config)

    def _stages(self) -> list[Mamba]:
        return [self.in_mamba, *self.layers, self.out_mamba]  # type: ignore[list-item]

    def _normed(self, index: int, e: Tensor) -> Tensor:
        return e if self.norms is None else self.norms[index](e)

    def _embed(self, x: Tensor) -> Tensor:
        return self.pxby_embedding(x if self.config.pxby_embed else x[:, :, 1, 1].long())

    def hidden(self, x: Tensor) -> Tensor:
        e = self._embed(x)  # (batch, seqlen, dim)
        for index, stage in enumerate(self._stages()):
            e = e + stage(self._normed(index, e))
        return self._normed(-1, e)

    def head(self, h: Tensor) -> Tensor:
        return self.lm_head(h)

    @property
    def incremental(self) -> bool:
        """True for the causal form. The bidirectional one recomputes its window at every step: a new token is the start of the
        downward direction, whose states at every earlier position change with it, and with them all that the later layers see.
        """
        return self.causal

    def init_state(self, batch: int, context: int = 256) -> Any:
        """For the causal form the weights as they are now, packed, with empty states: one call decodes through all layers."""
        if not self.causal:
            return super().init_state(batch, context)
        weights: list[Any] = [None] * len(self._stages()) if self.norms is None else [n.weight for n in self.norms]
        layers = [stage.decoding_layer(batch, weight) for stage, weight in zip(self._stages(), weights, strict=False)]
        return MambaStep(layers, eps=torch.finfo(torch.float32).eps)  # nn.RMSNorm's own default

    @torch.no_grad()
    def step(self, window: Tensor, state: Any) -> tuple[Tensor, Any]:
        if not self.causal:
            return super().step(window, state)
        e = state(self._embed(window[:, None])[:, 0].float().contiguous())  # (batch, dim)
        return self.head(self._normed(-1, e.to(self.lm_head.weight.dtype))).float(), state
