"""Triton kernel of selective_state_update: a program owns a tile of channels of one batch row, with all their states.

Each element of the state is read once and written once. Nothing shared, no atomics. Deterministic.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..selective_scan.triton_kernels import sigmoid, softplus


@triton.jit
def update_kernel(
    state, x, dt, A, B, C, D, z, dt_bias, out, dim, dstate, tiles, per_group, state_batch, state_dim, state_n, x_batch, x_dim,
    dt_batch, dt_dim, A_dim, A_n, B_batch, B_group, B_n, C_batch, C_group, C_n, z_batch, z_dim, out_batch, out_dim,
    SKIP: tl.constexpr, GATE: tl.constexpr, BIAS: tl.constexpr, SOFTPLUS: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    b = pid // tiles
    c = pid % tiles * BD + tl.arange(0, BD)
    n = tl.arange(0, BN).to(tl.int64)
    channel = c < dim
    mask = channel[:, None] & (n < dstate)[None, :]
    u = tl.load(x + b * x_batch + c * x_dim, mask=channel, other=0.0).to(tl.float32)
    step = tl.load(dt + b * dt_batch + c * dt_dim, mask=channel, other=0.0).to(tl.float32)
    if BIAS:
        step += tl.load(dt_bias + c, mask=channel, other=0.0).to(tl.float32)
    if SOFTPLUS:
        step = softplus(step)
    group = (c // per_group)[:, None]
    a = tl.load(A + c[:, None] * A_dim + n[None, :] * A_n, mask=mask, other=0.0).to(tl.float32)
    b_n = tl.load(B + b * B_batch + group * B_group + n[None, :] * B_n, mask=mask, other=0.0).to(tl.float32)
    c_n = tl.load(C + b * C_batch + group * C_group + n[None, :] * C_n, mask=mask, other=0.0).to(tl.float32)
    at = state + b * state_batch + c[:, None] * state_dim + n[None, :] * state_n
    h = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    h = tl.exp(step[:, None] * a) * h + (step * u)[:, None] * b_n
    h = tl.where(mask, h, 0.0)  # an infinite step makes NaN of the padding
    tl.store(at, h.to(state.dtype.element_ty), mask=mask)
    y = tl.sum(h * c_n, axis=1)
    if SKIP:
        y += tl.load(D + c, mask=channel, other=0.0).to(tl.float32) * u
    if GATE:
        gate = tl.load(z + b * z_batch + c * z_dim, mask=channel, other=0.0).to(tl.float32)
        y *= gate * sigmoid(gate)
    tl.store(out + b * out_batch + c * out_dim, y.to(out.dtype.element_ty), mask=channel)
