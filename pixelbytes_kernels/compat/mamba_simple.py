"""Stand-in for mamba_ssm.modules.mamba_simple: the Mamba block, with the bidirectional forms of Vim's fork."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.bimamba_inner import bimamba_inner
from ..ops.causal_conv1d import causal_conv1d
from ..ops.causal_conv1d_update import causal_conv1d_update
from ..ops.selective_scan import selective_scan
from ..ops.selective_state_update import selective_state_update
from ._not_served import NotServed
from .selective_scan_interface import bimamba_inner_fn, mamba_inner_fn


class Mamba(nn.Module):
    """mamba_ssm's Mamba: constructor, parameters, initial values, `forward`, `step` and caches under its names.

    Args:
        d_model, d_state, d_conv, expand, dt_rank: sizes; d_conv 2 to 4; "auto" is ceil(d_model / 16).
        dt_min, dt_max, dt_init, dt_scale, dt_init_floor: delta at the start; dt_init "random" or "constant".
        conv_bias, bias: biases of the convolution and of the two outer projections.
        use_fast_path: the fused mixer; False composes the same result from convolution, projections and scan.
        layer_idx: key of this block's states in `inference_params`.
        bimamba_type: "none"; Vim's "v1" (one convolution, a second scan downwards with its own A); Vim's "v2"
            (convolution, projections, A and D of its own for the downward direction). This argument and those below
            exist in Vim's fork only.
        if_devide_out: with "v2", the mean of both directions in place of their sum.
        init_layer_scale: a learnt scale on the output, `gamma` (d_model), of this initial value.

    Source: signatures and state_dict names as published by state-spaces/mamba (2.2) and hustvl/Vim.
    """

    conv1d: nn.Conv1d
    x_proj: nn.Linear
    dt_proj: nn.Linear
    A_log: nn.Parameter
    D: nn.Parameter
    conv1d_b: nn.Conv1d  # the downward direction's, where it has them
    x_proj_b: nn.Linear
    dt_proj_b: nn.Linear
    A_b_log: nn.Parameter
    D_b: nn.Parameter

    def __init__(
        self,
        d_model,
        d_state=16,
        d_conv=4,
        expand=2,
        dt_rank="auto",
        dt_min=0.001,
        dt_max=0.1,
        dt_init="random",
        dt_scale=1.0,
        dt_init_floor=1e-4,
        conv_bias=True,
        bias=False,
        use_fast_path=True,
        layer_idx=None,
        device=None,
        dtype=None,
        bimamba_type="none",
        if_devide_out=False,
        init_layer_scale=None,
    ) -> None:
        super().__init__()
        if not 2 <= d_conv <= 4:
            raise NotServed(f"Mamba: d_conv={d_conv} is not served; there are 2, 3 and 4")
        if dt_init not in ("random", "constant"):
            raise NotServed(f"Mamba: dt_init={dt_init!r} is not served; there are 'random' and 'constant'")
        if bimamba_type not in ("none", "v1", "v2"):
            raise NotServed(f"Mamba: bimamba_type={bimamba_type!r} is not served; there are 'none', 'v1' and 'v2'")
        self.d_model, self.d_state, self.d_conv, self.expand = d_model, d_state, d_conv, expand
        self.d_inner = int(expand * d_model)
        self.dt_rank = math.ceil(d_model / 16) if dt_rank == "auto" else dt_rank
        self.use_fast_path, self.layer_idx = use_fast_path, layer_idx
        self.bimamba_type, self.if_devide_out, self.init_layer_scale = bimamba_type, if_devide_out, init_layer_scale
        self.activation, self.act = "silu", nn.SiLU()
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        if init_layer_scale is not None:
            self.gamma = nn.Parameter(init_layer_scale * torch.ones(d_model, device=device))
        self.in_proj = nn.Linear(d_model, 2 * self.d_inner, bias=bias, **options)
        self._make_direction("", conv_bias, options)
        with torch.no_grad():
            self._init_delta(dt_min, dt_max, dt_init, dt_scale, dt_init_floor)
        if bimamba_type == "v1":
            self.A_b_log = self._decay(device)
        elif bimamba_type == "v2":
            self._make_direction("_b", conv_bias, options)
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=bias, **options)

    def _make_direction(self, suffix: str, conv_bias: bool, options: dict[str, Any]) -> None:
        """The modules and parameters of one direction. The second's delta starts as torch starts it, as in Vim."""
        inner = self.d_inner
        conv = nn.Conv1d(inner, inner, self.d_conv, groups=inner, padding=self.d_conv - 1, bias=conv_bias, **options)
        self.add_module("conv1d" + suffix, conv)
        self.add_module("x_proj" + suffix, nn.Linear(inner, self.dt_rank + 2 * self.d_state, bias=False, **options))
        self.add_module("dt_proj" + suffix, nn.Linear(self.dt_rank, inner, bias=True, **options))
        self.register_parameter("A_b_log" if suffix else "A_log", self._decay(options["device"]))
        skip = nn.Parameter(torch.ones(inner, device=options["device"]))  # float32 whatever dtype is, like A_log
        skip._no_weight_decay = True  # type: ignore[attr-defined]
        self.register_parameter("D" + suffix, skip)

    def _decay(self, device: Any) -> nn.Parameter:
        A = torch.arange(1, self.d_state + 1, dtype=torch.float32, device=device)
        A_log = nn.Parameter(torch.log(A).repeat(self.d_inner, 1))
        A_log._no_weight_decay = True  # type: ignore[attr-defined]
        return A_log

    def _init_delta(self, dt_min: float, dt_max: float, dt_init: str, dt_scale: float, floor: float) -> None:
        """softplus(bias) is spread evenly, on a log scale, over [dt_min, dt_max]."""
        weight, bias = self.dt_proj.weight, self.dt_proj.bias
        bound = dt_scale * self.dt_rank**-0.5
        if dt_init == "constant":
            weight.fill_(bound)
        else:
            weight.uniform_(-bound, bound)
        dt = torch.empty_like(bias).uniform_(math.log(dt_min), math.log(dt_max)).exp().clamp(min=floor)
        bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus
        bias._no_reinit = True  # type: ignore[attr-defined]

    def forward(self, hidden_states: Tensor, inference_params: Any = None) -> Tensor:
        """hidden_states (batch, seqlen, d_model) -> the same shape.

        With `inference_params` (an object with `seqlen_offset` and `key_value_memory_dict`): at offset 0 the sequence
        fills the block's states, at later offsets one step is decoded.
        """
        if self.bimamba_type != "none" and (inference_params is not None or not self.use_fast_path):
            option = "inference_params" if inference_params is not None else "use_fast_path=False"
            raise NotServed(f"Mamba: {option} is not served with bimamba_type={self.bimamba_type!r}")
        if inference_params is None:
            out = self._mix(hidden_states)
        else:
            states = self._get_states_from_cache(inference_params, hidden_states.shape[0])
            if inference_params.seqlen_offset > 0:
                return self.step(hidden_states, *states)[0]
            out = self._compose(hidden_states, *states)
        return out if self.init_layer_scale is None else out * self.gamma

    def _mix(self, hidden_states: Tensor) -> Tensor:
        if not self.use_fast_path:
            return self._compose(hidden_states)
        xz = self.in_proj(hidden_states).transpose(1, 2)  # (batch, 2 * d_inner, seqlen), channels last in memory
        inner = (
            xz, self.conv1d.weight, self.conv1d.bias, self.x_proj.weight, self.dt_proj.weight, self.out_proj.weight,
            self.out_proj.bias, -torch.exp(self.A_log.float()),
        )  # fmt: skip
        D, delta_bias = self.D.float(), self.dt_proj.bias.float()
        if self.bimamba_type == "none":
            return mamba_inner_fn(*inner, None, None, D, delta_bias=delta_bias, delta_softplus=True)
        A_b = -torch.exp(self.A_b_log.float())
        if self.bimamba_type == "v1":
            return bimamba_inner_fn(*inner, A_b, None, None, D, delta_bias=delta_bias, delta_softplus=True)
        return bimamba_inner(
            *inner, None, None, D, delta_bias, delta_softplus=True, conv1d_weight_rev=self.conv1d_b.weight,
            conv1d_bias_rev=self.conv1d_b.bias, x_proj_weight_rev=self.x_proj_b.weight,
            delta_proj_weight_rev=self.dt_proj_b.weight, A_rev=A_b, D_rev=self.D_b.float(),
            delta_bias_rev=self.dt_proj_b.bias.float(), scale=0.5 if self.if_devide_out else 1.0,
        )  # fmt: skip

    def _compose(self, hidden_states: Tensor, conv_state: Tensor | None = None, ssm_state: Tensor | None = None):
        """The same mixer step by step; fills the states that are given."""
        x, z = self.in_proj(hidden_states).transpose(1, 2).chunk(2, dim=1)  # (batch, d_inner, seqlen) each
        if conv_state is not None:
            with torch.no_grad():
                conv_state.copy_(F.pad(x, (self.d_conv - x.shape[-1], 0)))  # a negative pad cuts the oldest off
        u = causal_conv1d(x, self.conv1d.weight.squeeze(1), self.conv1d.bias, self.activation)
        assert isinstance(u, Tensor)
        dt, B, C = self.x_proj(u.transpose(1, 2)).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        delta = F.linear(dt, self.dt_proj.weight).transpose(1, 2)
        y, last_state = selective_scan(
            u, delta, -torch.exp(self.A_log.float()), B.transpose(1, 2), C.transpose(1, 2), self.D.float(), z,
            self.dt_proj.bias.float(), True, True,
        )  # fmt: skip
        if ssm_state is not None:
            with torch.no_grad():
                ssm_state.copy_(last_state)
        return self.out_proj(y.transpose(1, 2))

    def step(self, hidden_states: Tensor, conv_state: Tensor, ssm_state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One token: hidden_states (batch, 1, d_model) -> (out like it, conv_state, ssm_state), both updated."""
        if hidden_states.shape[1] != 1:
            got = tuple(hidden_states.shape)
            raise NotServed(f"Mamba.step: one token at a time, hidden_states must be (batch, 1, d_model), got {got}")
        if self.bimamba_type != "none":
            raise NotServed(f"Mamba.step is not served with bimamba_type={self.bimamba_type!r}")
        x, z = self.in_proj(hidden_states.squeeze(1)).chunk(2, dim=-1)  # (batch, d_inner) each
        u = causal_conv1d_update(x, conv_state, self.conv1d.weight.squeeze(1), self.conv1d.bias, self.activation)
        dt, B, C = self.x_proj(u).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        dt, A = F.linear(dt, self.dt_proj.weight), -torch.exp(self.A_log.float())
        y = selective_state_update(ssm_state, u, dt, A, B, C, self.D, z, self.dt_proj.bias, True)
        out = self.out_proj(y)
        if self.init_layer_scale is not None:
            out = out * self.gamma
        return out.unsqueeze(1), conv_state, ssm_state

    def allocate_inference_cache(self, batch_size, max_seqlen, dtype=None, **kwargs):
        """Zero states: conv_state (batch_size, d_inner, d_conv), ssm_state (batch_size, d_inner, d_state)."""
        conv, dt = self.conv1d.weight, self.dt_proj.weight
        return (
            torch.zeros(batch_size, self.d_inner, self.d_conv, device=conv.device, dtype=dtype or conv.dtype),
            torch.zeros(batch_size, self.d_inner, self.d_state, device=dt.device, dtype=dtype or dt.dtype),
        )

    def _get_states_from_cache(self, inference_params, batch_size, initialize_states=False) -> tuple[Tensor, Tensor]:
        if self.layer_idx is None:
            raise ValueError("Mamba: layer_idx must be given to the constructor for inference_params to be used")
        cache = inference_params.key_value_memory_dict
        if self.layer_idx not in cache:
            cache[self.layer_idx] = self.allocate_inference_cache(batch_size, inference_params.max_seqlen)
        elif initialize_states:
            for state in cache[self.layer_idx]:
                state.zero_()
        return cache[self.layer_idx]
