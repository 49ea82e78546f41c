"""Packed rows: several sequences one behind the other, and the `seq_idx` that keeps them apart.

The ops take `seq_idx` (batch, seqlen): wherever its value changes along time, the state restarts from zero and no tap
of the convolution reaches over. A packed row then gives, sequence by sequence, what each sequence gives on its own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._check import require_ints


def pack(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Lays rows of different lengths one behind the other.

    Args:
        rows: tensors (length_i, ...), alike in dtype, device and all sizes but the first; a length may be 0.

    Returns:
        packed (1, sum of lengths, ...) and cu_seqlens (len(rows) + 1), int32: where each row starts, and the end.

    Raises:
        ValueError: no rows, or rows that do not fit together.
    """
    if not rows:
        raise ValueError("pack: rows must hold at least one tensor")
    for i, row in enumerate(rows):
        if row.ndim < 1 or row.shape[1:] != rows[0].shape[1:]:
            wanted = ("length", *rows[0].shape[1:])
            raise ValueError(f"pack: row {i} must have shape ({', '.join(map(str, wanted))}), got {tuple(row.shape)}")
    lengths = torch.tensor([0, *(row.shape[0] for row in rows)], device=rows[0].device)
    return torch.cat(list(rows))[None], lengths.cumsum(0).to(torch.int32)


def unpack(packed: Tensor, cu_seqlens: Tensor) -> list[Tensor]:
    """The inverse of `pack`: views (length_i, ...) of packed (1, total, ...)."""
    starts = check_cu_seqlens("unpack", cu_seqlens).tolist()
    if packed.ndim < 2 or packed.shape[0] != 1 or packed.shape[1] != starts[-1]:
        raise ValueError(f"unpack: packed must have shape (1, {starts[-1]}, ...), got {tuple(packed.shape)}")
    return [packed[0, start:stop] for start, stop in zip(starts, starts[1:], strict=False)]


def seq_idx_from_cu_seqlens(cu_seqlens: Tensor, total: int | None = None) -> Tensor:
    """`seq_idx` of one packed row from the starts of its sequences.

    Args:
        cu_seqlens: (count + 1), integers, 0 first, never falling: sequence i takes the steps cu_seqlens[i] to
            cu_seqlens[i + 1] - 1.
        total: length of the row, at least cu_seqlens[-1] (the default). Steps behind the last sequence are padding, a
            sequence of their own.

    Returns:
        (1, total), int32, the number of the sequence at each step.

    Raises:
        TypeError: not integers. ValueError: a wrong shape, start or order, or a total that is too short.
    """
    op = "seq_idx_from_cu_seqlens"
    check_cu_seqlens(op, cu_seqlens)
    end = int(cu_seqlens[-1])
    total = end if total is None else total
    if total < end:
        raise ValueError(f"{op}: total must be at least cu_seqlens[-1] = {end}, got {total}")
    steps = torch.arange(total, device=cu_seqlens.device)
    return torch.searchsorted(cu_seqlens[1:].to(steps.dtype).contiguous(), steps, right=True).to(torch.int32)[None]


def seq_idx_from_position_ids(position_ids: Tensor) -> Tensor:
    """`seq_idx` from positions that count up by one within each sequence, as collators of packed batches give them.

    Args:
        position_ids: (batch, seqlen), integers. A sequence begins wherever a position is not its left neighbour's plus
            one.

    Returns:
        (batch, seqlen), int32, counted from 0 in every row.

    Raises:
        TypeError: not integers. ValueError: not two-dimensional.
    """
    op = "seq_idx_from_position_ids"
    require_ints(op, position_ids=position_ids)
    if position_ids.ndim != 2:
        raise ValueError(f"{op}: position_ids must have shape (batch, seqlen), got {tuple(position_ids.shape)}")
    wide = position_ids.long()  # int8 and uint8 would wrap around at their ends
    begins = torch.zeros_like(wide)
    begins[:, 1:] = wide[:, 1:] != wide[:, :-1] + 1
    return begins.cumsum(1).to(torch.int32)


def check_cu_seqlens(op: str, cu_seqlens: Tensor) -> Tensor:
    """Raises unless `cu_seqlens` are starts of sequences and the end; returns it."""
    require_ints(op, cu_seqlens=cu_seqlens)
    if cu_seqlens.ndim != 1 or not len(cu_seqlens):
        raise ValueError(f"{op}: cu_seqlens must have shape (count + 1), got {tuple(cu_seqlens.shape)}")
    if int(cu_seqlens[0]) != 0 or bool((cu_seqlens[1:] < cu_seqlens[:-1]).any()):
        raise ValueError(f"{op}: cu_seqlens must start with 0 and never fall, got {cu_seqlens.tolist()}")
    return cu_seqlens
