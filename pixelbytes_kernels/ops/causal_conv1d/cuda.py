"""causal_conv1d on NVIDIA GPUs: memory for the CUDA C++ kernels of csrc/cuda/causal_conv1d.cu, and the calls."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..._cuda_launch import extension, fp32, multiprocessors, where

WARP = 32


def run_steps(dim: int, batch: int, seqlen: int, item: int, time_contiguous: bool, multiprocessors: int) -> int:
    """Steps that one thread (channels side by side) or one warp (time-contiguous rows) works through; pure.

    Long runs repeat less of the halo; runs are cut until the device's threads are busy. A multiple of 16.
    """
    packet = 16 // item
    steps = 4 * WARP * packet if time_contiguous else 64
    threads = batch * dim * WARP if time_contiguous else batch * max(1, dim // packet)
    least = WARP * packet if time_contiguous else 16
    while steps > least and threads * -(-seqlen // steps) < 1024 * multiprocessors:
        steps //= 2
    return steps


def is_time_contiguous(x: Tensor) -> bool:
    """Which arrangement the kernels use for x; `along_time` in causal_conv1d.cu."""
    return (x.stride(2) == 1 or x.shape[2] == 1) and x.stride(1) != 1


def steps_for(x: Tensor) -> int:
    batch, dim, seqlen = x.shape
    return run_steps(dim, batch, seqlen, x.element_size(), is_time_contiguous(x), multiprocessors(x))


def forward(tensors: Sequence[Tensor | None], silu: bool, reverse: bool, final: bool) -> tuple[Tensor, Tensor]:
    """`tensors` are x, weight, bias, seq_idx, initial_states. Returns out and the final states, empty unless `final`."""
    x, weight, _, _, initial = tensors
    assert x is not None and weight is not None
    out = torch.empty_like(x)
    final_states = x.new_empty((*x.shape[:2], weight.shape[1] - 1) if final else (0,))
    if x.numel() == 0:
        if final:
            final_states = final_states.zero_() if initial is None else final_states.copy_(initial)
        return out, final_states
    final_out = final_states if final else None
    extension().conv_forward(*where(x), as_read(tensors), silu, reverse, steps_for(x), out, final_out)
    return out, final_states


def as_read(tensors: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """The small tensors in the dtypes that the kernels know."""
    x, weight, bias, seq_idx, initial = tensors
    assert x is not None
    if seq_idx is not None and seq_idx.dtype not in (torch.int32, torch.int64):
        seq_idx = seq_idx.to(torch.int32)
    return x, fp32(weight), fp32(bias), seq_idx, None if initial is None else initial.detach().to(x.dtype)


def backward(
    tensors: Sequence[Tensor | None],
    silu: bool,
    reverse: bool,
    dout: Tensor,
    dfinal: Tensor | None,
    needs: Sequence[bool],
    dx: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x (into `dx` if given), weight, bias and initial_states, None where `needs` (one entry a tensor) is false."""
    x, weight, bias, _, initial = tensors
    assert x is not None and weight is not None
    dx = torch.empty_like(x) if dx is None and needs[0] else dx
    dweight = torch.empty_like(weight) if needs[1] else None
    dbias = torch.empty_like(bias) if bias is not None and needs[2] else None
    dinitial = torch.empty_like(initial, dtype=torch.float32) if initial is not None and needs[4] else None
    if x.numel() == 0:
        for grad in (dweight, dbias, dinitial):
            if grad is not None:
                grad.zero_()
        if dinitial is not None and dfinal is not None:
            dinitial.copy_(dfinal)
        return dx, dweight, dbias, None if dinitial is None or initial is None else dinitial.to(initial.dtype)
    (batch, dim, seqlen), width = x.shape, weight.shape[1]
    steps = steps_for(x)
    partial = sums = None
    if dweight is not None or dbias is not None:
        partial = x.new_empty(batch * -(-seqlen // steps), width + 1, dim, dtype=torch.float32)
        sums = x.new_empty(width + 1, dim, dtype=torch.float32)
    dout = laid_out_like(dout, x)
    dfinal = None if dfinal is None else dfinal.to(x.dtype)
    extension().conv_backward(
        *where(x), as_read(tensors), silu, reverse, steps, dout, dfinal, dx, dinitial, partial, sums
    )  # fmt: skip
    if dweight is not None and sums is not None:
        dweight.copy_(sums[:width].t())
    if dbias is not None and sums is not None:
        dbias.copy_(sums[width])
    return dx, dweight, dbias, None if dinitial is None or initial is None else dinitial.to(initial.dtype)


def laid_out_like(grad: Tensor, x: Tensor) -> Tensor:
    """`grad` in x's dtype, copied only where its neighbours in memory are other elements than x's."""
    if (
        grad.dtype == x.dtype
        and (grad.stride(1) == 1) == (x.stride(1) == 1)
        and is_time_contiguous(grad) == is_time_contiguous(x)
    ):
        return grad
    return torch.empty_like(x).copy_(grad)
