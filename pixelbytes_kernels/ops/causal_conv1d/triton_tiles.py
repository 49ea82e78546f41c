"""Triton kernels of causal_conv1d, tiled: a program owns BD channels x BT times of one batch row and reads each lag from the cache.

For tensors whose neighbours in memory are neighbours in time, where walking would spread each load over as many lines as channels.
Lanes lie along time t in either direction: lag j of time t is t - j, or t + j in the anti-causal form. No shared memory, no atomics: each
program writes its own sums for weight and bias.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_kernels import lagged, program_place, taps, weighted


@triton.jit
def times(first, BT: tl.constexpr):
    return first + tl.arange(0, BT)


@triton.jit
def at_lag(t, lag: tl.constexpr, REVERSE: tl.constexpr):
    """The time that lies `lag` steps before t."""
    if REVERSE:
        return t + lag
    return t - lag


@triton.jit
def values(row, t, stride, mask, seqlen):
    """(BD, BT), zeros outside of the sequence."""
    inside = mask[:, None] & (t >= 0)[None, :] & (t < seqlen)[None, :]
    return tl.load(row[:, None] + t.to(tl.int64)[None, :] * stride, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def sequence(row, t, stride, seqlen, SEQ: tl.constexpr):
    """The sequences (1, BT) that the times belong to; any number where there are none."""
    index = t
    if SEQ:
        inside = tl.minimum(tl.maximum(t, 0), seqlen - 1)
        index = tl.load(row + inside.to(tl.int64) * stride)
    return index[None, :]


@triton.jit
def forward_tile(
    x, weight, bias, seq_idx, out, dim, seqlen, tiles, chunks,
    x_batch, x_dim, x_time, seq_batch, seq_time, out_batch, out_dim, out_time,
    WIDTH: tl.constexpr, SILU: tl.constexpr, BIAS: tl.constexpr, SEQ: tl.constexpr, REVERSE: tl.constexpr,
    BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    b, first, c, mask = program_place(dim, tiles, chunks, BT, BD)
    t = times(first, BT)
    x_row, q_row = x + b * x_batch + c * x_dim, seq_idx + b * seq_batch
    shift = tl.zeros((BD, 1), tl.float32)
    if BIAS:
        shift += tl.load(bias + c, mask=mask, other=0.0).to(tl.float32)[:, None]
    here = sequence(q_row, t, seq_time, seqlen, SEQ)
    y = shift + taps(weight, c, mask, 0, WIDTH)[:, None] * values(x_row, t, x_time, mask, seqlen)
    for j in tl.static_range(1, WIDTH):
        past = at_lag(t, j, REVERSE)
        value = lagged(
            values(x_row, past, x_time, mask, seqlen), sequence(q_row, past, seq_time, seqlen, SEQ), here, SEQ
        )
        y += taps(weight, c, mask, j, WIDTH)[:, None] * value
    if SILU:
        y = y / (1.0 + tl.exp(-y))
    at = (out + b * out_batch + c * out_dim)[:, None] + t.to(tl.int64)[None, :] * out_time
    tl.store(at, y.to(out.dtype.element_ty), mask=mask[:, None] & (t < seqlen)[None, :])


@triton.jit
def gradient(
    k0, k1, k2, k3, shift, x0, x1, x2, x3, q0, q1, q2, q3, g_row, t, g_time, mask, seqlen,
    WIDTH: tl.constexpr, SILU: tl.constexpr, SEQ: tl.constexpr,
):  # fmt: skip
    """The gradient of what stands before the activation at the times t, zero outside of the sequence."""
    g = values(g_row, t, g_time, mask, seqlen)
    if SILU:
        x1, x2, x3 = lagged(x1, q1, q0, SEQ), lagged(x2, q2, q0, SEQ), lagged(x3, q3, q0, SEQ)
        pre = weighted(k0, k1, k2, k3, shift, x0, x1, x2, x3, WIDTH)
        sigmoid = 1.0 / (1.0 + tl.exp(-pre))
        g *= sigmoid * (1.0 + pre * (1.0 - sigmoid))
    return tl.where(((t >= 0) & (t < seqlen))[None, :], g, 0.0)


@triton.jit
def backward_tile(
    x, weight, bias, seq_idx, dout, dx, sums, dim, seqlen, tiles, chunks,
    x_batch, x_dim, x_time, seq_batch, seq_time, dout_batch, dout_dim, dout_time, dx_batch, dx_dim, dx_time,
    WIDTH: tl.constexpr, SILU: tl.constexpr, BIAS: tl.constexpr, SEQ: tl.constexpr, DX: tl.constexpr,
    SUMS: tl.constexpr, REVERSE: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """What stands before the activation is computed again, for these times and the WIDTH - 1 steps after each.

    sums: (batch * chunks, WIDTH + 1, dim) float32, of each tap, then of the bias.
    """
    b, first, c, mask = program_place(dim, tiles, chunks, BT, BD)
    t = times(first, BT)
    x_row, g_row = x + b * x_batch + c * x_dim, dout + b * dout_batch + c * dout_dim
    q_row = seq_idx + b * seq_batch
    k0, k1 = taps(weight, c, mask, 0, WIDTH)[:, None], taps(weight, c, mask, 1, WIDTH)[:, None]
    k2, k3 = taps(weight, c, mask, 2, WIDTH)[:, None], taps(weight, c, mask, 3, WIDTH)[:, None]
    shift = tl.zeros((BD, 1), tl.float32)
    if BIAS:
        shift += tl.load(bias + c, mask=mask, other=0.0).to(tl.float32)[:, None]
    # Inputs from three steps before to three after, whatever the width: what is not used is not loaded.
    x0 = values(x_row, t, x_time, mask, seqlen)
    p1 = values(x_row, at_lag(t, 1, REVERSE), x_time, mask, seqlen)
    p2 = values(x_row, at_lag(t, 2, REVERSE), x_time, mask, seqlen)
    p3 = values(x_row, at_lag(t, 3, REVERSE), x_time, mask, seqlen)
    q0 = sequence(q_row, t, seq_time, seqlen, SEQ)
    r1 = sequence(q_row, at_lag(t, 1, REVERSE), seq_time, seqlen, SEQ)
    r2 = sequence(q_row, at_lag(t, 2, REVERSE), seq_time, seqlen, SEQ)
    r3 = sequence(q_row, at_lag(t, 3, REVERSE), seq_time, seqlen, SEQ)
    g = gradient(k0, k1, k2, k3, shift, x0, p1, p2, p3, q0, r1, r2, r3, g_row, t, dout_time, mask, seqlen,
                 WIDTH, SILU, SEQ)  # fmt: skip
    if SUMS:
        # Times outside have no gradient, but the input before one may be infinite.
        inside = (t < seqlen)[None, :]
        to = sums + (b * chunks + first // BT) * (WIDTH + 1) * dim + c
        tl.store(to + (WIDTH - 1) * dim, tl.sum(tl.where(inside, g * x0, 0.0), axis=1), mask=mask)
        d1 = tl.where(inside, g * lagged(p1, r1, q0, SEQ), 0.0)
        tl.store(to + (WIDTH - 2) * dim, tl.sum(d1, axis=1), mask=mask)
        if WIDTH > 2:
            d2 = tl.where(inside, g * lagged(p2, r2, q0, SEQ), 0.0)
            tl.store(to + (WIDTH - 3) * dim, tl.sum(d2, axis=1), mask=mask)
        if WIDTH > 3:
            d3 = tl.where(inside, g * lagged(p3, r3, q0, SEQ), 0.0)
            tl.store(to, tl.sum(d3, axis=1), mask=mask)
        tl.store(to + WIDTH * dim, tl.sum(g, axis=1), mask=mask)
    if DX:
        t1, t2, t3 = at_lag(t, -1, REVERSE), at_lag(t, -2, REVERSE), at_lag(t, -3, REVERSE)
        n1 = values(x_row, t1, x_time, mask, seqlen)
        s1 = sequence(q_row, t1, seq_time, seqlen, SEQ)
        total = k0 * g
        g = gradient(k0, k1, k2, k3, shift, n1, x0, p1, p2, s1, q0, r1, r2, g_row, t1, dout_time, mask, seqlen,
                     WIDTH, SILU, SEQ)  # fmt: skip
        total += lagged(k1 * g, s1, q0, SEQ)
        if WIDTH > 2:
            n2 = values(x_row, t2, x_time, mask, seqlen)
            s2 = sequence(q_row, t2, seq_time, seqlen, SEQ)
            g = gradient(k0, k1, k2, k3, shift, n2, n1, x0, p1, s2, s1, q0, r1, g_row, t2, dout_time, mask, seqlen,
                         WIDTH, SILU, SEQ)  # fmt: skip
            total += lagged(k2 * g, s2, q0, SEQ)
            if WIDTH > 3:
                n3 = values(x_row, t3, x_time, mask, seqlen)
                s3 = sequence(q_row, t3, seq_time, seqlen, SEQ)
                g = gradient(k0, k1, k2, k3, shift, n3, n2, n1, x0, s3, s2, s1, q0, g_row, t3, dout_time, mask, seqlen,
                             WIDTH, SILU, SEQ)  # fmt: skip
                total += lagged(k3 * g, s3, q0, SEQ)
        at = (dx + b * dx_batch + c * dx_dim)[:, None] + t.to(tl.int64)[None, :] * dx_time
        tl.store(at, total.to(dx.dtype.element_ty), mask=mask[:, None] & (t < seqlen)[None, :])
