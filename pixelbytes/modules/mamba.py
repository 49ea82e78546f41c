"""Mamba and its bidirectional form, with mamba_ssm's parameter names, so that its checkpoints load."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from pixelbytes_kernels import MambaLayer, bimamba_inner, mamba_inner


class Mamba(nn.Module):
    """The Mamba mixer: in_proj, causal depthwise convolution, selective scan, gate, out_proj.

    Args:
        d_model: width D of input and output.
        d_state: size N of the state of each channel.
        d_conv: width of the convolution, 2 to 4.
        expand: inner width over d_model.
        dt_rank: rank of delta's projection; "auto" is ceil(d_model / 16).
        dt_min, dt_max, dt_init_floor: range of delta at the start.
        conv_bias, bias: biases of the convolution and of the two outer projections.

    Source: Gu and Dao, "Mamba", section 3.4, and the initial values of mamba_ssm's mamba_simple.py.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        dt_rank: int | str = "auto",
        *,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        conv_bias: bool = True,
        bias: bool = False,
    ) -> None:
        super().__init__()
        for name, value in (("d_model", d_model), ("d_state", d_state), ("expand", expand)):
            if value < 1:
                raise ValueError(f"Mamba: {name} must be positive, got {value}")
        if not 2 <= d_conv <= 4:
            raise ValueError(f"Mamba: d_conv must be 2, 3 or 4, got {d_conv}")
        self.d_model, self.d_state, self.d_conv = d_model, d_state, d_conv
        self.d_inner = expand * d_model
        self.dt_rank = math.ceil(d_model / 16) if isinstance(dt_rank, str) else dt_rank
        self.in_proj = nn.Linear(d_model, 2 * self.d_inner, bias=bias)
        self.conv1d = nn.Conv1d(
            self.d_inner, self.d_inner, d_conv, groups=self.d_inner, padding=d_conv - 1, bias=conv_bias
        )
        self.x_proj = nn.Linear(self.d_inner, self.dt_rank + 2 * d_state, bias=False)
        self.dt_proj = nn.Linear(self.dt_rank, self.d_inner)
        nn.init.uniform_(self.dt_proj.weight, -(self.dt_rank**-0.5), self.dt_rank**-0.5)
        # softplus(bias) is spread evenly, on a log scale, over [dt_min, dt_max].
        dt = torch.exp(torch.rand(self.d_inner) * (math.log(dt_max) - math.log(dt_min)) + math.log(dt_min))
        dt = dt.clamp(min=dt_init_floor)
        with torch.no_grad():
            self.dt_proj.bias.copy_(dt + torch.log(-torch.expm1(-dt)))
        self.A_log = nn.Parameter(torch.log(torch.arange(1, d_state + 1, dtype=torch.float32)).repeat(self.d_inner, 1))
        self.D = nn.Parameter(torch.ones(self.d_inner))
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """x (batch, seqlen, d_model) -> the same shape."""
        return mamba_inner(*self._inner_arguments(x))

    def _inner_arguments(self, x: Tensor) -> tuple[Any, ...]:
        xz = self.in_proj(x).transpose(1, 2)  # (batch, 2 * d_inner, seqlen), channels last in memory
        return (
            xz,
            self.conv1d.weight,
            self.conv1d.bias,
            self.x_proj.weight,
            self.dt_proj.weight,
            self.out_proj.weight,
            self.out_proj.bias,
            -torch.exp(self.A_log.float()),  # A (d_inner, d_state)
            None,  # B and C come from x_proj
            None,
            self.D,
            self.dt_proj.bias,
        )

    @torch.no_grad()
    def decoding_layer(self, batch: int, norm: Tensor | None = None) -> MambaLayer:
        """This block, with the weight of the RMSNorm before it, as `MambaStep` takes it: float32, from an empty state."""
        weight = self.in_proj.weight
        memory = (
            weight.new_zeros(batch, self.d_conv - 1, self.d_inner, dtype=torch.float32),
            weight.new_zeros(batch, self.d_inner, self.d_state, dtype=torch.float32),
        )
        tensors = (
            norm,
            weight,
            self.in_proj.bias,
            self.conv1d.weight.squeeze(1),
            self.conv1d.bias,
            self.x_proj.weight,
            self.dt_proj.weight,
            self.dt_proj.bias,
            -torch.exp(self.A_log.float()),
            self.D,
            self.out_proj.weight,
            self.out_proj.bias,
        )
        return MambaLayer._make((*(None if t is None else t.float() for t in tensors), *memory))


class BiMamba(Mamba):
    """Both directions of one shared Mamba: `(mamba(x) + flip(mamba(flip(x)))) * scale`.

    Same parameters as Mamba. Not causal: a new token changes the downward direction everywhere, so it cannot decode step by step.
    """

    def __init__(self, d_model: int, *args: int, scale: float = 0.5, **kwargs: int) -> None:
        super().__init__(d_model, *args, **kwargs)  # type: ignore[arg-type]
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        """x (batch, seqlen, d_model) -> the same shape."""
        return bimamba_inner(*self._inner_arguments(x), scale=self.scale)

    def decoding_layer(self, batch: int, norm: Tensor | None = None) -> MambaLayer:
        raise RuntimeError("BiMamba reads the sequence from both ends: run it on the whole window instead of stepping")
