"""Autograd of pxby_embed over whichever kernel was chosen.

Eager code goes through `Embed`, a plain autograd.Function. Under torch.compile, export and opcheck the same call is
the registered op `pixelbytes::pxby_embed` with its backward op. Both keep the inputs and nothing else.

A backend is a module with `forward` and `backward`; see `cpu.py` for what they take and return.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, library

from ..._autograd import once_differentiable

WEIGHTS = ("emb", "conv_weight", "conv_bias", "alpha", "proj_weight", "proj_bias", "norm_weight", "norm_bias")
OPTIONAL = ("conv_weight", "conv_bias", "alpha", "proj_bias")


@functools.cache
def implementation(backend: str):
    return importlib.import_module(f".{backend}", __package__)


def embed(backend: str, tokens: Tensor, weights: Sequence[Tensor | None], eps: float) -> Tensor:
    """Runs a checked call; `weights` as WEIGHTS."""
    if torch.compiler.is_compiling():
        return torch.ops.pixelbytes.pxby_embed(tokens, *weights, eps, backend)
    return Embed.apply(backend, eps, tokens, *weights)


class Embed(torch.autograd.Function):
    """Saves the inputs; the table and what goes into the LayerNorm are computed again."""

    @staticmethod
    def forward(ctx: Any, backend: str, eps: float, tokens: Tensor, *weights: Tensor | None) -> Tensor:
        ctx.save_for_backward(tokens, *weights)
        ctx.config = backend, eps
        return implementation(backend).forward(tokens, weights, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        backend, eps = ctx.config
        tokens, *weights = ctx.saved_tensors
        grads = implementation(backend).backward(tokens, weights, eps, dout, ctx.needs_input_grad[3:])
        return (None, None, None, *grads)


# ---- registered ops ----------------------------------------------------------------------------------------

_library = library.Library("pixelbytes", "FRAGMENT")
_arguments = ", ".join(f"Tensor{'?' if name in OPTIONAL else ''} {name}" for name in ("tokens", *WEIGHTS))
_library.define(f"pxby_embed({_arguments}, float eps, str backend) -> Tensor")
_library.define(f"pxby_embed_backward({_arguments}, Tensor dout, bool[] needs, float eps, str backend) -> Tensor[]")
_COUNT = 1 + len(WEIGHTS)


def _forward(tokens: Tensor, *arguments: Any) -> Tensor:
    *weights, eps, backend = arguments
    return implementation(backend).forward(tokens, weights, eps)


def _fake_forward(tokens: Tensor, *arguments: Any) -> Tensor:
    emb, proj_weight = arguments[0], arguments[4]
    return emb.new_empty(tokens.shape[0], tokens.shape[1], proj_weight.shape[0])


def _backward(tokens: Tensor, *arguments: Any) -> list[Tensor]:
    *weights, dout, needs, eps, backend = arguments
    grads = implementation(backend).backward(tokens, weights, eps, dout, needs)
    return [dout.new_empty(0) if grad is None else grad for grad in grads]  # a list of tensors has no place for None


def _fake_backward(tokens: Tensor, *arguments: Any) -> list[Tensor]:
    *weights, dout, needs, _, _ = arguments
    return [
        dout.new_empty(0) if w is None or not need else w.new_empty(w.shape)
        for w, need in zip(weights, needs, strict=True)
    ]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:_COUNT])
    ctx.rest = inputs[_COUNT:]


def _autograd_backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    needs = list(ctx.needs_input_grad[1:_COUNT])
    grads = torch.ops.pixelbytes.pxby_embed_backward(*ctx.saved_tensors, dout, needs, *ctx.rest)
    return (None, *(grad if need else None for grad, need in zip(grads, needs, strict=True)), None, None)


def _refuse(ctx: Any, *_: Any) -> None:
    raise RuntimeError("pxby_embed: second derivatives are not implemented; use backend='reference' for them")


for _device in ("CPU", "CUDA", "XPU"):
    _library.impl("pxby_embed", _forward, _device)
    _library.impl("pxby_embed_backward", _backward, _device)
library.register_fake("pixelbytes::pxby_embed", _fake_forward, lib=_library)
library.register_fake("pixelbytes::pxby_embed_backward", _fake_backward, lib=_library)
library.register_autograd("pixelbytes::pxby_embed", _autograd_backward, setup_context=_setup_context, lib=_library)
library.register_autograd("pixelbytes::pxby_embed_backward", _refuse, lib=_library)
