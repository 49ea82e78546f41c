"""Autograd of the convolution: `Convolution` for eager code, `pixelbytes::causal_conv1d` for torch.compile, export and opcheck.

A backend is a module with `forward` and `backward`; see `cpu.py` for what they take and return.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch
from torch import Tensor, library

from ..._autograd import once_differentiable

TENSORS = ("x", "weight", "bias", "seq_idx", "initial_states")


@functools.cache
def implementation(backend: str):
    return importlib.import_module(f".{'torch_path' if backend == 'torch' else backend}", __package__)


def convolve(
    backend: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    seq_idx: Tensor | None,
    initial_states: Tensor | None,
    silu: bool,
    reverse: bool,
    final: bool,
) -> tuple[Tensor, Tensor]:
    """Runs a checked convolution. The final states are empty unless `final`."""
    tensors = (x, weight, bias, seq_idx, initial_states)
    if torch.compiler.is_compiling():
        return torch.ops.pixelbytes.causal_conv1d(*tensors, silu, reverse, final, backend)
    return Convolution.apply(backend, silu, reverse, final, *tensors)


class Convolution(torch.autograd.Function):
    """Saves its inputs only; what stands before the SiLU is recomputed."""

    @staticmethod
    def forward(
        ctx: Any, backend: str, silu: bool, reverse: bool, final: bool, *tensors: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(*tensors)
        ctx.config = backend, silu, reverse
        ctx.set_materialize_grads(False)
        return implementation(backend).forward(tensors, silu, reverse, final)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor | None, dfinal: Tensor | None) -> tuple[Tensor | None, ...]:
        backend, silu, reverse = ctx.config
        tensors = ctx.saved_tensors
        dout = torch.zeros_like(tensors[0]) if dout is None else dout
        needs = ctx.needs_input_grad[4:]
        dx, dweight, dbias, dinitial = implementation(backend).backward(tensors, silu, reverse, dout, dfinal, needs)
        return None, None, None, None, dx, dweight, dbias, None, dinitial


# ---- registered op ----------------------------------------------------------------------------------------------------

_library = library.Library("pixelbytes", "FRAGMENT")
_SCHEMA = "Tensor x, Tensor weight, Tensor? bias, Tensor? seq_idx, Tensor? initial_states"
_library.define(
    f"causal_conv1d({_SCHEMA}, bool silu, bool reverse, bool final, str backend) -> (Tensor out, Tensor final_states)"
)
_library.define(
    f"causal_conv1d_backward({_SCHEMA}, Tensor dout, Tensor? dfinal, bool[] needs, bool silu, bool reverse, str backend) -> Tensor[]"
)


def _forward(*a: Any) -> tuple[Tensor, Tensor]:
    return implementation(a[8]).forward(a[:5], a[5], a[6], a[7])


def _fake_forward(*a: Any) -> tuple[Tensor, Tensor]:
    x, weight, final = a[0], a[1], a[7]
    return torch.empty_like(x), x.new_empty((x.shape[0], x.shape[1], weight.shape[1] - 1) if final else (0,))


def _backward(*a: Any) -> list[Tensor]:
    dout, dfinal, needs, silu, reverse, backend = a[5:]
    grads = implementation(backend).backward(a[:5], silu, reverse, dout, dfinal, needs)
    return [dout.new_empty(0) if grad is None else grad for grad in grads]


def _fake_backward(*a: Any) -> list[Tensor]:
    dout, needs = a[5], a[7]
    kept = [i for i in range(5) if TENSORS[i] != "seq_idx"]
    return [torch.empty_like(a[i]) if needs[i] and a[i] is not None else dout.new_empty(0) for i in kept]


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.silu, ctx.reverse, ctx.final, ctx.backend = inputs[5:]


def _autograd_backward(ctx: Any, dout: Tensor, dfinal: Tensor) -> tuple[Tensor | None, ...]:
    needs = [ctx.needs_input_grad[i] for i in range(5)]
    call = torch.ops.pixelbytes.causal_conv1d_backward
    grads = call(*ctx.saved_tensors, dout, dfinal if ctx.final else None, needs, ctx.silu, ctx.reverse, ctx.backend)
    dx, dweight, dbias, dinitial = (g if needs[i] else None for g, i in zip(grads, (0, 1, 2, 4), strict=True))
    return dx, dweight, dbias, None, dinitial, None, None, None, None


def _refuse(ctx: Any, *_: Any) -> None:
    raise RuntimeError("causal_conv1d: second derivatives are not implemented; use backend='reference' for them")


for _device in ("CPU", "CUDA", "XPU"):
    _library.impl("causal_conv1d", _forward, _device)
    _library.impl("causal_conv1d_backward", _backward, _device)
library.register_fake("pixelbytes::causal_conv1d", _fake_forward, lib=_library)
library.register_fake("pixelbytes::causal_conv1d_backward", _fake_backward, lib=_library)
library.register_autograd("pixelbytes::causal_conv1d", _autograd_backward, setup_context=_setup_context, lib=_library)
library.register_autograd("pixelbytes::causal_conv1d_backward", _refuse, lib=_library)
