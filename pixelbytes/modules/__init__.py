"""Layers: parameters, and calls into pixelbytes_kernels or torch."""

from pixelbytes.modules.mamba import BiMamba, Mamba
from pixelbytes.modules.pxby_embed import PxByEmbed
from pixelbytes.modules.rms_norm import RMSNorm

__all__ = ["BiMamba", "Mamba", "PxByEmbed", "RMSNorm"]
