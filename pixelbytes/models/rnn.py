"""SimpleSeqModel: an LSTM over embedded windows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pixelbytes.models.common import SequenceModel
from pixelbytes.modules import PxByEmbed


class SimpleSeqModel(SequenceModel):
    """Embedding, LSTM, linear head. With the default settings the parameters are upstream's, names included.

    Args:
        vocab_size: number of ids.
        embedding_dim: width of each of the nine embedded cells; with `pxby`, width of the embedded window.
        hidden_dim: width of the LSTM.
        depth: number of LSTM layers.
        bidirectional: the first layer reads both ways, with half the width each (upstream's later form).
            Only the last position can then be a target.
        pxby: embed the window by PxByEmbed instead of nine lookups side by side.
        conv, gate: of PxByEmbed.
    """

    def __init__(
        self,
        vocab_size: int,
        embedding_dim: int,
        hidden_dim: int,
        *,
        depth: int = 1,
        bidirectional: bool = False,
        pxby: bool = False,
        conv: bool = True,
        gate: bool = True,
    ) -> None:
        super().__init__()
        if min(vocab_size, embedding_dim, hidden_dim, depth) < 1:
            raise ValueError("SimpleSeqModel: vocab_size, embedding_dim, hidden_dim and depth must be positive")
        if bidirectional and hidden_dim % 2:
            raise ValueError(f"SimpleSeqModel: hidden_dim must be even when bidirectional, got {hidden_dim}")
        self.settings = {
            "vocab_size": vocab_size,
            "embedding_dim": embedding_dim,
            "hidden_dim": hidden_dim,
            "depth": depth,
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
        self.upper: nn.LSTM | None = None
        if bidirectional:
            self.lstm = nn.LSTM(width, hidden_dim // 2, batch_first=True, bidirectional=True)
            if depth > 1:
                self.upper = nn.LSTM(hidden_dim, hidden_dim, depth - 1, batch_first=True)
        else:
            self.lstm = nn.LSTM(width, hidden_dim, depth, batch_first=True)
        self.fc = nn.Linear(hidden_dim, vocab_size)

    def config_dict(self) -> dict[str, Any]:
        return dict(self.settings)

    def _embed(self, x: Tensor) -> Tensor:
        return self.embedding(x) if self.pxby else self.embedding(x.long()).flatten(2)

    def hidden(self, x: Tensor) -> Tensor:
        h, _ = self.lstm(self._embed(x))
        if self.upper is not None:
            h, _ = self.upper(h)
        return h

    def head(self, h: Tensor) -> Tensor:
        return self.fc(h)

    @property
    def incremental(self) -> bool:
        """True for the causal form. The bidirectional one recomputes its window at every step."""
        return self.causal

    def init_state(self, batch: int, context: int = 256) -> Any:
        return None if self.causal else super().init_state(batch, context)

    @torch.no_grad()
    def step(self, window: Tensor, state: Any) -> tuple[Tensor, Any]:
        if not self.causal:
            return super().step(window, state)
        h, state = self.lstm(self._embed(window[:, None]), state)
        return self.head(h[:, -1]).float(), state
