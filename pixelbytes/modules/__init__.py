"""Layers: parameters and calls into pixelbytes_kernels, no mathematics of their own."""

from pixelbytes.modules.mamba import BiMamba, Mamba
from pixelbytes.modules.pxby_embed import PxByEmbed

__all__ = ["BiMamba", "Mamba", "PxByEmbed"]
