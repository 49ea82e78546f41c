"""pxby_embed on NVIDIA GPUs: memory for the CUDA C++ kernels of csrc/cuda/pxby_embed*.cu, and the calls; gpu.py has what is around."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ..._cuda_launch import extension, multiprocessors, where
from . import gpu
from .gpu import CELLS, Weights

WARPS = 16  # of a multiprocessor, that a backward should keep busy


def take_rows_of(dim: int) -> bool:
    return extension().embed_lanes(dim) > 0


def mixing_of(wide: Weights) -> Tensor:
    emb, conv_weight, conv_bias, alpha = wide[:4]
    assert emb is not None
    size = CELLS * emb.shape[1]
    mixing = emb.new_empty(size + 1, size)
    extension().embed_mixing(*where(emb), conv_weight, conv_bias, alpha, mixing)
    return mixing


def mixing_gradients(wide: Weights, dmixing: Tensor) -> list[Tensor | None]:
    emb, conv_weight, conv_bias, alpha = wide[:4]
    assert emb is not None
    width = emb.shape[1]
    dconv = None if conv_weight is None else emb.new_empty(width, width, CELLS)
    dbias = None if conv_bias is None else emb.new_empty(width)
    dgate = None if alpha is None else emb.new_empty(width, CELLS)
    extension().embed_mixing_backward(*where(emb), conv_weight, conv_bias, alpha, dmixing, dconv, dbias, dgate)
    return [dconv, dbias, None if dgate is None else dgate.sum(0)]


def rows_forward(tokens: Tensor, table: Tensor, shift: Tensor, wide: Weights, eps: float, out: Tensor) -> None:
    table = table.view(len(table), CELLS, -1)
    extension().embed_forward(*where(out), tokens, table, shift, wide[6], wide[7], out, eps)


def rows_backward(
    tokens: Tensor, table: Tensor, shift: Tensor, wide: Weights, eps: float, dout: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    count, dim, vocab = tokens.shape[0] * tokens.shape[1], dout.shape[2], len(table)
    lanes = extension().embed_lanes(dim)
    groups = min(count, WARPS * 32 // lanes * multiprocessors(table))
    groups = -(-count // -(-count // groups))  # the fewest that have as much to do
    groups += -groups % (128 // lanes)  # whole blocks
    dpre, partial, sums = shift.new_empty(count, dim), shift.new_empty(groups, 3, dim), shift.new_empty(3, dim)
    keys = shift.new_empty(CELLS, count, dtype=gpu.key_dtype(CELLS * vocab))
    dout = dout.to(table.dtype).contiguous()
    table = table.view(vocab, CELLS, -1)
    extension().embed_backward(*where(shift), tokens, table, shift, wide[6], dout, dpre, keys, partial, sums, eps)
    return dpre, keys, sums


def sums_by_key(rows: Tensor, keys: Tensor, known: int, whole: Tensor | None) -> Tensor:
    entries, dim = keys.numel(), rows.shape[1]
    ordered, order = torch.sort(keys.view(-1), stable=True)
    starts = torch.searchsorted(ordered, torch.arange(known + 1, dtype=keys.dtype, device=keys.device))
    run = run_length(entries)
    parts = rows.new_empty(-(-entries // run) + known, dim)
    out = rows.new_empty(known, dim)
    extension().embed_sums_by_key(*where(rows), rows, ordered, order, starts, whole, parts, out, run)
    return out


def run_length(entries: int) -> int:
    """Sorted entries that a thread adds up in one go."""
    return 32 if entries < 2**16 else 64 if entries < 2**19 else 128


KERNELS = gpu.Kernels(take_rows_of, mixing_of, mixing_gradients, rows_forward, rows_backward, sums_by_key)
forward = functools.partial(gpu.forward, KERNELS)
backward = functools.partial(gpu.backward, KERNELS)
