"""PixelBytes: text and small pixel images as one sequence of tokens, each seen with its 3x3 neighbourhood.

The public names are loaded when first used, so that `import pixelbytes` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pixelbytes.dataset import PxByDataset
    from pixelbytes.models import BysMamba, MambaConfig, SimpleAttentionModel, SimpleSeqModel, create, from_pretrained
    from pixelbytes.modules import BiMamba, Mamba, PxByEmbed
    from pixelbytes.tokenizer import PixelBytesTokenizer
    from pixelbytes.train import Trainer

__version__ = "0.1.0"

_HOMES = {
    "PixelBytesTokenizer": "pixelbytes.tokenizer",
    "PxByDataset": "pixelbytes.dataset",
    "Trainer": "pixelbytes.train",
    "MambaConfig": "pixelbytes.models",
    "BysMamba": "pixelbytes.models",
    "SimpleSeqModel": "pixelbytes.models",
    "SimpleAttentionModel": "pixelbytes.models",
    "create": "pixelbytes.models",
    "from_pretrained": "pixelbytes.models",
    "PxByEmbed": "pixelbytes.modules",
    "Mamba": "pixelbytes.modules",
    "BiMamba": "pixelbytes.modules",
}

__all__ = [
    "BiMamba",
    "BysMamba",
    "Mamba",
    "MambaConfig",
    "PixelBytesTokenizer",
    "PxByDataset",
    "PxByEmbed",
    "SimpleAttentionModel",
    "SimpleSeqModel",
    "Trainer",
    "__version__",
    "create",
    "from_pretrained",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'pixelbytes' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
