"""The models, one family a file, with one interface (see common.py)."""

from __future__ import annotations

from typing import Any

from pixelbytes.models.attention import SimpleAttentionModel
from pixelbytes.models.common import SequenceModel, load_weights
from pixelbytes.models.mamba import BysMamba, MambaConfig
from pixelbytes.models.rnn import SimpleSeqModel

FAMILIES: dict[str, type[SequenceModel]] = {
    "mamba": BysMamba,
    "rnn": SimpleSeqModel,
    "attention": SimpleAttentionModel,
}


def create(name: str, **config: Any) -> SequenceModel:
    """Make a model from the name of its family ("mamba", "rnn", "attention") or class, and its own settings."""
    for family, cls in FAMILIES.items():
        if name in (family, cls.__name__):
            return cls.from_config(config)
    raise ValueError(f"model: unknown name {name!r}, choose one of {', '.join(FAMILIES)}")


def from_pretrained(source: str, **options: Any) -> SequenceModel:
    """Load whichever model `save_pretrained` wrote to a folder, or that a repository on the Hugging Face hub holds."""
    return SequenceModel.from_pretrained(source, **options)


__all__ = [
    "FAMILIES",
    "BysMamba",
    "MambaConfig",
    "SequenceModel",
    "SimpleAttentionModel",
    "SimpleSeqModel",
    "create",
    "from_pretrained",
    "load_weights",
]
