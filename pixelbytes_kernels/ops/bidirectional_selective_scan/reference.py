"""bidirectional_selective_scan, the definition: two scans, one upwards in time and one downwards, summed before the gate."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..selective_scan.reference import selective_scan_ref


def bidirectional_selective_scan_ref(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    *,
    u_rev: Tensor | None = None,
    delta_rev: Tensor | None = None,
    A_rev: Tensor | None = None,
    B_rev: Tensor | None = None,
    C_rev: Tensor | None = None,
    D_rev: Tensor | None = None,
    delta_bias_rev: Tensor | None = None,
    seq_idx: Tensor | None = None,
    scale: float = 1.0,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Arguments, shapes and result as `bidirectional_selective_scan`; plain torch, differentiable any number of times."""

    def own(rev: Tensor | None, shared: Tensor) -> Tensor:
        return shared if rev is None else rev

    y: Any = selective_scan_ref(u, delta, A, B, C, D, None, delta_bias, delta_softplus, seq_idx=seq_idx)
    y = y + selective_scan_ref(
        own(u_rev, u),
        own(delta_rev, delta),
        own(A_rev, A),
        own(B_rev, B),
        own(C_rev, C),
        D if D_rev is None else D_rev,
        None,
        delta_bias if delta_bias_rev is None else delta_bias_rev,
        delta_softplus,
        seq_idx=seq_idx,
        reverse=True,
    )
    y = scale * y
    if z is not None:
        y = y * F.silu(z)
    return y.to(out_dtype or u.dtype)
