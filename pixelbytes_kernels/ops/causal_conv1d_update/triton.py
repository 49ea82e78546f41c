"""causal_conv1d_update in Triton: one launch, the state moves on in place."""

from __future__ import annotations

import torch
from torch import Tensor

from ..._triton import Case, cdiv, launch
from . import triton_kernels as kernels

OP = "causal_conv1d_update"
CHANNELS = 32  # of a program: one a thread, so that no thread reads what another one writes


def update(x: Tensor, conv_state: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    """out like x; `conv_state` is updated in place."""
    out = torch.empty_like(x)
    if x.numel() == 0:
        return out
    batch, dim = x.shape[:2]
    tiles = cdiv(dim, CHANNELS)
    one = x.ndim == 2
    launch(
        OP, kernels.update_kernel, (batch * tiles,), x, x=x, state=conv_state, weight=weight.contiguous(),
        bias=x if bias is None else bias.contiguous(), out=out, dim=dim, seqlen=1 if one else x.shape[2],
        state_len=conv_state.shape[2], tiles=tiles, x_batch=x.stride(0), x_dim=x.stride(1),
        x_time=0 if one else x.stride(2), state_batch=conv_state.stride(0), state_dim=conv_state.stride(1),
        state_step=conv_state.stride(2), out_batch=out.stride(0), out_dim=out.stride(1),
        out_time=0 if one else out.stride(2), WIDTH=weight.shape[1], SILU=silu, BIAS=bias is not None, BD=CHANNELS,
        num_warps=1,
    )  # fmt: skip
    return out


def aot_cases() -> list[Case]:
    def case(dtype: torch.dtype, width: int) -> Case:
        x, state = torch.empty(2, 160, dtype=dtype), torch.empty(2, 160, width - 1, dtype=dtype)
        weight = torch.empty(160, width)
        name = f"{str(dtype).removeprefix('torch.')}, width {width}"
        return Case(name, lambda: update(x, state, weight, torch.empty(160), True))

    return [case(dtype, width) for dtype in (torch.float32, torch.float16) for width in (2, 4)]
