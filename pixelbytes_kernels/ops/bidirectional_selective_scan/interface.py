"""The public function `bidirectional_selective_scan`: checks, chooses a backend, calls."""

from __future__ import annotations

import torch
from torch import Tensor

from ..._backend import resolve
from ..selective_scan.interface import IMPLEMENTED, check_scan
from .reference import bidirectional_selective_scan_ref


def bidirectional_selective_scan(
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
    backend: str = "auto",
) -> Tensor:
    """Two selective scans over the same sequence, upwards and downwards in time, in one call.

        out = scale * (scan(u, ...) + scan_reverse(u_rev, ...)) * silu(z)

    With everything shared this equals `scan(u) + flip(scan(flip(u)))`, with nothing flipped or copied; what is shared is read
    once for both directions.

    Args:
        u, delta, A, B, C, D, z, delta_bias, delta_softplus, seq_idx, out_dtype, backend: as `selective_scan`.
        u_rev, delta_rev, A_rev, B_rev, C_rev, D_rev, delta_bias_rev: the downward direction's own tensors, shapes as their
            namesakes and in the same order of time; None shares the upward one, and gradients of both directions add up in it.
        scale: factor on the sum; 0.5 gives the mean of both directions.

    Returns:
        out: (batch, dim, seqlen), `out_dtype` or u.dtype.

    Raises:
        ValueError, TypeError, RuntimeError: as `selective_scan`.

    Source: the idea of Vision Mamba (arXiv 2401.09417), which flips, scans twice and flips back.
    """
    op = "bidirectional_selective_scan"
    check_scan(op, u, delta, A, B, C, D, z, delta_bias, None, seq_idx)

    def own(rev: Tensor | None, shared: Tensor) -> Tensor:
        return shared if rev is None else rev

    B_down, C_down = own(B_rev, B), own(C_rev, C)
    check_scan(
        op,
        own(u_rev, u),
        own(delta_rev, delta),
        own(A_rev, A),
        B_down,
        C_down,
        D_rev,
        None,
        delta_bias_rev,
        None,
        None,
        "_rev",
    )
    if own(u_rev, u).shape != u.shape or own(A_rev, A).shape != A.shape:
        raise ValueError(f"{op}: u_rev and A_rev must have the shapes of u {tuple(u.shape)} and A {tuple(A.shape)}")
    groups = {t.shape[1] if t.ndim == 4 else 1 for t in (B, C, B_down, C_down) if t.ndim > 2}
    if len(groups) > 1:
        raise ValueError(f"{op}: both directions must have the same number of groups, got {sorted(groups)}")
    name = resolve(op, backend, u, IMPLEMENTED)
    if name == "reference":
        return bidirectional_selective_scan_ref(
            u, delta, A, B, C, D, z, delta_bias, delta_softplus, u_rev=u_rev, delta_rev=delta_rev, A_rev=A_rev, B_rev=B_rev,
            C_rev=C_rev, D_rev=D_rev, delta_bias_rev=delta_bias_rev, seq_idx=seq_idx, scale=scale, out_dtype=out_dtype,
        )  # fmt: skip
    from ..selective_scan.autograd import scan

    first = (u, delta, A, B, C, D, delta_bias, None)
    second = (u_rev, delta_rev, A_rev, B_rev, C_rev, D_rev, delta_bias_rev)
    return scan(name, first, second, z, seq_idx, delta_softplus, scale, False, out_dtype)[0]
