"""Triton kernel of causal_conv1d_update: a program owns a tile of channels of one batch row, a thread one channel.

The last inputs stay in registers; then the state moves on, oldest entry first, so that an entry is read before it is overwritten.
Nothing shared, no atomics. Deterministic.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..causal_conv1d.triton_kernels import taps, weighted


@triton.jit
def entry(row, i, length, stride, mask):
    """Entry i of a row of channels, zeros where i < 0."""
    return tl.load(row + i * stride, mask=mask & (i >= 0) & (i < length), other=0.0).to(tl.float32)


@triton.jit
def update_kernel(
    x, state, weight, bias, out, dim, seqlen, state_len, tiles, x_batch, x_dim, x_time, state_batch, state_dim, state_step,
    out_batch, out_dim, out_time, WIDTH: tl.constexpr, SILU: tl.constexpr, BIAS: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    b = pid // tiles
    c = pid % tiles * BD + tl.arange(0, BD)
    mask = c < dim
    x_row, out_row = x + b * x_batch + c * x_dim, out + b * out_batch + c * out_dim
    state_row = state + b * state_batch + c * state_dim
    k0, k1 = taps(weight, c, mask, 0, WIDTH), taps(weight, c, mask, 1, WIDTH)
    k2, k3 = taps(weight, c, mask, 2, WIDTH), taps(weight, c, mask, 3, WIDTH)
    shift = tl.zeros_like(k0)
    if BIAS:
        shift = tl.load(bias + c, mask=mask, other=0.0).to(tl.float32)
    last = b * 0 + state_len
    p1 = entry(state_row, last - 1, last, state_step, mask)
    p2 = entry(state_row, last - 2, last, state_step, mask)
    p3 = entry(state_row, last - 3, last, state_step, mask)
    for step in range(seqlen):
        t = b * 0 + step  # 64 bits
        x0 = tl.load(x_row + t * x_time, mask=mask, other=0.0).to(tl.float32)
        y = weighted(k0, k1, k2, k3, shift, x0, p1, p2, p3, WIDTH)
        if SILU:
            y = y / (1.0 + tl.exp(-y))
        tl.store(out_row + t * out_time, y.to(out.dtype.element_ty), mask=mask)
        p1, p2, p3 = x0, p1, p2
    for entry_number in range(state_len):
        i = b * 0 + entry_number
        ahead = i + seqlen
        old = entry(state_row, ahead, last, state_step, mask)
        new = tl.load(x_row + (ahead - last) * x_time, mask=mask & (ahead >= last), other=0.0).to(tl.float32)
        value = tl.where(ahead < last, old, new)
        tl.store(state_row + i * state_step, value.to(state.dtype.element_ty), mask=mask)
