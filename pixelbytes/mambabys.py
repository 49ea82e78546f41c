"""The names that the PixelBytes notebook takes with `from pixelbytes.mambabys import *`."""

from __future__ import annotations

from pixelbytes.models import BysMamba, MambaConfig, SimpleAttentionModel, SimpleSeqModel
from pixelbytes.modules import PxByEmbed

__all__ = ["BysMamba", "MambaConfig", "PxByEmbed", "SimpleAttentionModel", "SimpleSeqModel"]
