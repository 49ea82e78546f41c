"""causal_conv1d in pure PyTorch, keeping its inputs only: the definition, and its gradients by doing it once more."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..._autograd import autograd_inside_op
from .reference import causal_conv1d_ref


def forward(tensors: Sequence[Tensor | None], silu: bool, reverse: bool, final: bool) -> tuple[Tensor, Tensor]:
    x, weight, bias, seq_idx, initial = tensors
    assert x is not None and weight is not None
    out, states = causal_conv1d_ref(
        x,
        weight,
        bias,
        "silu" if silu else None,
        seq_idx=seq_idx,
        initial_states=initial,
        return_final_states=True,
        reverse=reverse,
    )
    return out, states.clone() if final else x.new_empty(0)


def backward(
    tensors: Sequence[Tensor | None],
    silu: bool,
    reverse: bool,
    dout: Tensor,
    dfinal: Tensor | None,
    needs: Sequence[bool],
    dx: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    with autograd_inside_op():
        leaves = [
            t if t is None or i == 3 else t.detach().requires_grad_(bool(needs[i])) for i, t in enumerate(tensors)
        ]
        x, weight, bias, seq_idx, initial = leaves
        assert x is not None and weight is not None
        outputs = causal_conv1d_ref(
            x,
            weight,
            bias,
            "silu" if silu else None,
            seq_idx=seq_idx,
            initial_states=initial,
            return_final_states=True,
            reverse=reverse,
        )
        wanted = [t for i, t in enumerate(leaves) if t is not None and i != 3 and needs[i]]
        pairs = [(o, g) for o, g in zip(outputs, (dout, dfinal), strict=True) if g is not None and o.requires_grad]
        found = iter(torch.autograd.grad([o for o, _ in pairs], wanted, [g for _, g in pairs], allow_unused=True))
    grads = [next(found) if t is not None and i != 3 and needs[i] else None for i, t in enumerate(leaves)]
    if dx is not None and grads[0] is not None:
        grads[0] = dx.copy_(grads[0])
    return grads[0], grads[1], grads[2], grads[4]
