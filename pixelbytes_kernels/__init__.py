"""Fused kernels for selective state-space models and for the 3x3 neighbourhood embedding, as autograd ops. Public names only."""

from __future__ import annotations

from ._backend import available_backends, set_backend, use_backend
from .ops.bidirectional_selective_scan import bidirectional_selective_scan, bidirectional_selective_scan_ref
from .ops.pxby_embed import pxby_embed, pxby_embed_ref
from .ops.selective_scan import selective_scan, selective_scan_ref

__all__ = [
    "available_backends",
    "bidirectional_selective_scan",
    "bidirectional_selective_scan_ref",
    "pxby_embed",
    "pxby_embed_ref",
    "selective_scan",
    "selective_scan_ref",
    "set_backend",
    "use_backend",
]
