"""RMSNorm with few passes over the activations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class RMSNorm(nn.RMSNorm):
    """`x / sqrt(mean(x^2) + eps) * weight` over the last dimension: parameters and result of nn.RMSNorm.

    On the CPU torch composes it of a dozen passes and keeps two tensors of x's size for the backward; this keeps x and
    one number a row. In 16 bits, and where torch has a kernel of its own, torch's is used.
    """

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        if x.device.type != "cpu" or weight.dtype != x.dtype or x.dtype.itemsize < 4 or torch.compiler.is_compiling():
            return super().forward(x)
        eps = torch.finfo(x.dtype).eps if self.eps is None else self.eps
        return _Normed.apply(x, weight, eps)


class _Normed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        scale = (torch.linalg.vector_norm(rows, dim=-1).square_().div_(rows.shape[1])).add_(eps).rsqrt_()  # (rows,)
        ctx.save_for_backward(x, weight, scale)
        return (rows * scale[:, None]).mul_(weight).view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale = ctx.saved_tensors
        rows, dout = x.reshape(-1, x.shape[-1]), dout.reshape(-1, x.shape[-1])
        product = rows * dout
        # Of sum(dout * weight * x * scale) along x itself, through scale.
        along = (product @ weight).mul_(scale.pow(3)).div_(-rows.shape[1])  # (rows,)
        dweight = scale @ product
        dx = torch.mul(dout, weight, out=product).mul_(scale[:, None]).addcmul_(rows, along[:, None])
        return dx.view(x.shape), dweight, None
