"""One decoding step of a whole stack of residual Mamba blocks in one call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..._backend import load_extension, resolve
from ..._check import require_shape
from ..causal_conv1d_update import interface as conv_update
from ..selective_state_update import interface as state_update

ON_GPU = tuple(n for n in ("cuda", "triton") if n in conv_update.IMPLEMENTED and n in state_update.IMPLEMENTED)
IMPLEMENTED = ("torch", "cpu", *ON_GPU)


class MambaLayer(NamedTuple):
    """A block `x + mixer(norm(x))` and its memory: norm (dim) or None; in_proj (2 * inner, dim); conv_weight (inner, width); x_proj
    (rank + 2 * dstate, inner); dt_proj (inner, rank); A (inner, dstate); D (inner); out_proj (dim, inner); biases or None.
    conv_state (batch, width - 1, inner), oldest first, and state (batch, inner, dstate), contiguous, are updated in place by every step.
    """

    norm: Tensor | None
    in_proj: Tensor
    in_proj_bias: Tensor | None
    conv_weight: Tensor
    conv_bias: Tensor | None
    x_proj: Tensor
    dt_proj: Tensor
    dt_bias: Tensor | None
    A: Tensor
    D: Tensor | None
    out_proj: Tensor
    out_proj_bias: Tensor | None
    conv_state: Tensor
    state: Tensor


class MambaStep:
    """`step(x)` runs one token through every layer: x (batch, dim), float32, is replaced by the result, which is returned.

    The weights are packed when this is made: later changes to them are not seen. The states are the tensors of the layers.

    Args:
        layers: all of one size, float32, on one device.
        eps: of the RMS norms.
        backend: "cpu" is one C++ call for all layers. The others go layer by layer: matrix products of torch, with `causal_conv1d_update`
            and `selective_state_update` on "cuda" or "triton" for tensors on a GPU, or on "torch"; see `available_backends`.

    Raises:
        ValueError: no layers, or a wrong shape. TypeError: not float32. RuntimeError: `backend` cannot run here.
    """

    def __init__(self, layers: Sequence[MambaLayer], eps: float = 1e-5, backend: str = "auto") -> None:
        op = "mamba_step"
        if not layers:
            raise ValueError(f"{op}: needs at least one layer")
        self.layers = [MambaLayer._make(None if t is None else t.detach() for t in layer) for layer in layers]
        self.eps = eps
        first = layers[0]
        inner, dim = first.conv_weight.shape[0], first.in_proj.shape[1]
        batch, dstate, width, rank = (
            first.state.shape[0],
            first.A.shape[1],
            first.conv_weight.shape[1],
            first.dt_proj.shape[1],
        )
        sizes: dict[str, dict[str, int]] = {
            "norm": {"dim": dim}, "in_proj": {"two_inner": 2 * inner, "dim": dim}, "in_proj_bias": {"two_inner": 2 * inner},
            "conv_weight": {"inner": inner, "width": width}, "conv_bias": {"inner": inner},
            "x_proj": {"rows": rank + 2 * dstate, "inner": inner}, "dt_proj": {"inner": inner, "rank": rank},
            "dt_bias": {"inner": inner}, "A": {"inner": inner, "dstate": dstate}, "D": {"inner": inner},
            "out_proj": {"dim": dim, "inner": inner}, "out_proj_bias": {"dim": dim},
            "conv_state": {"batch": batch, "past": width - 1, "inner": inner},
            "state": {"batch": batch, "inner": inner, "dstate": dstate},
        }  # fmt: skip
        if not 2 <= width <= 4:
            raise ValueError(f"{op}: conv_weight must have a width of 2, 3 or 4, got {width}")
        for i, layer in enumerate(self.layers):
            for name, tensor in layer._asdict().items():
                require_shape(op, f"layer {i} {name}", tensor, **sizes[name])
                if tensor is not None and tensor.dtype != torch.float32:
                    raise TypeError(f"{op}: layer {i} {name} must be float32, got {tensor.dtype}")
            if not (layer.conv_state.is_contiguous() and layer.state.is_contiguous()):
                raise ValueError(f"{op}: layer {i} conv_state and state must be contiguous")
        self.batch, self.dim = batch, dim
        self.backend = resolve(op, backend, first.state, IMPLEMENTED)
        if self.backend == "reference":
            self.backend = "torch"
        self._plan = None
        if self.backend == "cpu":
            cpu, reason = load_extension("_cpu")
            if cpu is None:
                raise RuntimeError(reason)
            self._plan = cpu.StepPlan([tuple(layer) for layer in self.layers], eps)

    def __call__(self, x: Tensor) -> Tensor:
        if self._plan is not None:
            fits = x.is_cpu and self._plan.run(x, torch.get_num_threads())
        else:
            fits = x.dtype == torch.float32 and x.is_contiguous() and x.shape == (self.batch, self.dim)
        if not fits:
            where = " on the CPU" if self._plan is not None else ""
            raise ValueError(
                f"mamba_step: x must be a contiguous float32 tensor of shape ({self.batch}, {self.dim}){where}, got {x.dtype} "
                f"{tuple(x.shape)} with strides {x.stride()} on {x.device}"
            )
        if self._plan is None:
            with torch.no_grad():
                for layer in self.layers:
                    x += layer_step(x, layer, self.eps, self.backend)
        return x


def layer_step(x: Tensor, layer: MambaLayer, eps: float, backend: str) -> Tensor:
    """What one block adds to x, by the two updates and torch's products."""
    e = x if layer.norm is None else x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * layer.norm
    u, z = F.linear(e, layer.in_proj, layer.in_proj_bias).chunk(2, dim=-1)
    conv_state = layer.conv_state.transpose(1, 2)
    u = conv_update.causal_conv1d_update(u, conv_state, layer.conv_weight, layer.conv_bias, "silu", backend=backend)
    rank, dstate = layer.dt_proj.shape[1], layer.A.shape[1]
    dt, B, C = F.linear(u, layer.x_proj).split([rank, dstate, dstate], dim=-1)
    dt = F.linear(dt, layer.dt_proj)
    y = state_update.selective_state_update(
        layer.state, u, dt, layer.A, B, C, layer.D, z, layer.dt_bias, dt_softplus=True, backend=backend
    )
    return F.linear(y, layer.out_proj, layer.out_proj_bias)
