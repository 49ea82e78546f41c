"""selective_state_update in Triton: one launch, the state in place."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..._triton import Case, cdiv, launch, next_power_of_2
from . import triton_kernels as kernels

OP = "selective_state_update"


class Blocks(NamedTuple):
    """Channels and (padded) states of a program, and its warps."""

    channels: int
    states: int
    num_warps: int


def blocks_of(dstate: int) -> Blocks:
    """256 elements of the state for each warp: small programs, since a step has few channels."""
    states = next_power_of_2(dstate)
    return Blocks(max(1, 256 // states), states, 1)


def update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
) -> Tensor:
    """out (batch, dim), in x's dtype; `state` is updated in place. B and C are (batch, groups, dstate)."""
    out = torch.empty_like(x)
    if x.numel() == 0:
        return out
    (batch, dim), dstate = x.shape, A.shape[1]
    blocks = blocks_of(dstate)
    tiles = cdiv(dim, blocks.channels)
    launch(
        OP, kernels.update_kernel, (batch * tiles,), x, state=state, x=x, dt=dt, A=A, B=B, C=C,
        D=x if D is None else D.contiguous(), z=x if z is None else z, dt_bias=x if dt_bias is None else dt_bias.contiguous(),
        out=out, dim=dim, dstate=dstate, tiles=tiles, per_group=dim // B.shape[1],
        **dict(zip(("state_batch", "state_dim", "state_n"), state.stride(), strict=True)),
        x_batch=x.stride(0), x_dim=x.stride(1), dt_batch=dt.stride(0), dt_dim=dt.stride(1),
        A_dim=A.stride(0), A_n=A.stride(1),
        **dict(zip(("B_batch", "B_group", "B_n"), B.stride(), strict=True)),
        **dict(zip(("C_batch", "C_group", "C_n"), C.stride(), strict=True)),
        z_batch=0 if z is None else z.stride(0), z_dim=0 if z is None else z.stride(1),
        out_batch=out.stride(0), out_dim=out.stride(1),
        SKIP=D is not None, GATE=z is not None, BIAS=dt_bias is not None, SOFTPLUS=dt_softplus,
        BD=blocks.channels, BN=blocks.states, num_warps=blocks.num_warps,
    )  # fmt: skip
    return out


def aot_cases() -> list[Case]:
    """Every padded number of states."""

    def case(dtype: torch.dtype, dstate: int) -> Case:
        x, wide = torch.empty(2, 160, dtype=dtype), torch.empty(160)
        rows = torch.empty(2, 2, dstate, dtype=dtype)
        state, A = torch.empty(2, 160, dstate), torch.empty(160, dstate)
        name = f"{str(dtype).removeprefix('torch.')}, dstate {dstate}"
        return Case(name, lambda: update(state, x, x, A, rows, rows, wide, x, wide, True))

    return [case(torch.float16, 16), *(case(torch.float32, 2**i) for i in range(9))]
