"""Fused kernels for selective state-space models and for the 3x3 neighbourhood embedding, as autograd ops. Public names only."""

from __future__ import annotations

from ._backend import available_backends, set_backend, use_backend
from .ops.bidirectional_selective_scan import bidirectional_selective_scan, bidirectional_selective_scan_ref
from .ops.bimamba_inner import bimamba_inner, bimamba_inner_ref
from .ops.causal_conv1d import causal_conv1d, causal_conv1d_ref
from .ops.causal_conv1d_update import causal_conv1d_update, causal_conv1d_update_ref
from .ops.mamba_inner import mamba_inner, mamba_inner_ref
from .ops.mamba_step import MambaLayer, MambaStep
from .ops.pxby_embed import pxby_embed, pxby_embed_ref
from .ops.selective_scan import selective_scan, selective_scan_ref
from .ops.selective_state_update import selective_state_update, selective_state_update_ref
from .packing import pack, seq_idx_from_cu_seqlens, seq_idx_from_position_ids, unpack

__all__ = [
    "MambaLayer",
    "MambaStep",
    "available_backends",
    "bidirectional_selective_scan",
    "bidirectional_selective_scan_ref",
    "bimamba_inner",
    "bimamba_inner_ref",
    "causal_conv1d",
    "causal_conv1d_ref",
    "causal_conv1d_update",
    "causal_conv1d_update_ref",
    "mamba_inner",
    "mamba_inner_ref",
    "pack",
    "pxby_embed",
    "pxby_embed_ref",
    "selective_scan",
    "selective_scan_ref",
    "selective_state_update",
    "selective_state_update_ref",
    "seq_idx_from_cu_seqlens",
    "seq_idx_from_position_ids",
    "set_backend",
    "unpack",
    "use_backend",
]
