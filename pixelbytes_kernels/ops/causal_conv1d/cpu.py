"""causal_conv1d on the CPU: memory for the C++ kernels of csrc/cpu/causal_conv1d.cpp, and the calls."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..._autograd import in_dtype_of
from ..._backend import load_extension


def forward(tensors: Sequence[Tensor | None], silu: bool, reverse: bool, final: bool) -> tuple[Tensor, Tensor]:
    """`tensors` are x, weight, bias, seq_idx, initial_states. Returns out and the final states, empty unless `final`."""
    cpu, reason = load_extension("_cpu")
    if cpu is None:
        raise RuntimeError(reason)
    x, weight, initial = tensors[0], tensors[1], tensors[4]
    assert x is not None and weight is not None
    out = torch.empty_like(x)
    final_states = x.new_empty((*x.shape[:2], weight.shape[1] - 1) if final else (0,))
    if x.numel() == 0:
        if final:
            final_states = final_states.zero_() if initial is None else final_states.copy_(initial)
        return out, final_states
    double = x.dtype == torch.float64
    cpu.conv_forward(
        tuple(tensors), silu, reverse, double, torch.get_num_threads(), out, final_states if final else None
    )
    return out, final_states


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
    cpu, _ = load_extension("_cpu")
    assert cpu is not None
    x, weight, bias, _, initial = tensors
    assert x is not None and weight is not None
    double = x.dtype == torch.float64
    wide = torch.float64 if double else torch.float32
    dx = torch.empty_like(x) if dx is None and needs[0] else dx
    dweight = torch.empty_like(weight, dtype=wide, memory_format=torch.contiguous_format) if needs[1] else None
    dbias = torch.empty_like(bias, dtype=wide) if bias is not None and needs[2] else None
    dinitial = torch.empty_like(initial) if initial is not None and needs[4] else None
    if x.numel() == 0:
        for grad in (dweight, dbias, dinitial):
            if grad is not None:
                grad.zero_()
        if dinitial is not None and dfinal is not None:
            dinitial.copy_(dfinal)
    else:
        cpu.conv_backward(
            tuple(tensors), silu, reverse, double, torch.get_num_threads(), dout, dfinal, dx, dweight, dbias, dinitial
        )
    return dx, in_dtype_of(weight, dweight), in_dtype_of(bias, dbias), dinitial
