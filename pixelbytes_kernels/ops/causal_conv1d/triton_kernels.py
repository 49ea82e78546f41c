"""Triton kernels of causal_conv1d, walking: a program owns a run of steps of a tile of channels of one batch row.

It keeps the last inputs in registers, so that each element is read once; the loads of the next four steps are under way while four are
computed. Any strides; coalesced where channels are neighbours in memory. No shared memory, no atomics: each program writes its own sums
for weight and bias. Steps s count in the direction of the convolution: s = t, or seqlen - 1 - t in the anti-causal form, so that lag j
of step s is step s - j. Before step 0 lie the initial states, or zeros.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def place(s, seqlen, REVERSE: tl.constexpr):
    """The time of step s."""
    if REVERSE:
        return (seqlen - 1 - s).to(tl.int64)
    return s.to(tl.int64)


@triton.jit
def step_input(row, s, high, stride, mask, seqlen, REVERSE: tl.constexpr):
    """The values (BD) of step s, zeros outside [0, high)."""
    at = row + place(s, seqlen, REVERSE) * stride
    return tl.load(at, mask=mask & (s >= 0) & (s < high), other=0.0).to(tl.float32)


@triton.jit
def past_input(
    row, past, s, stride, past_stride, mask, seqlen, WIDTH: tl.constexpr, HAS: tl.constexpr, REVERSE: tl.constexpr
):
    """The values of step s, which may lie before step 0."""
    value = step_input(row, s, seqlen, stride, mask, seqlen, REVERSE)
    if HAS:
        i = (s + (WIDTH - 1)).to(tl.int64)
        value += tl.load(past + i * past_stride, mask=mask & (s < 0) & (i >= 0), other=0.0).to(tl.float32)
    return value


@triton.jit
def step_index(row, s, stride, seqlen, REVERSE: tl.constexpr, SEQ: tl.constexpr):
    """The sequence that step s belongs to; initial states belong to the first one."""
    index = s
    if SEQ:
        inside = tl.minimum(tl.maximum(s, 0), seqlen - 1)
        index = tl.load(row + place(inside, seqlen, REVERSE) * stride)
    return index


@triton.jit
def lagged(x, of, here, SEQ: tl.constexpr):
    """x, or zero where its sequence is another one."""
    if SEQ:
        return tl.where(of == here, x, 0.0)
    return x


@triton.jit
def taps(weight, c, mask, LAG: tl.constexpr, WIDTH: tl.constexpr):
    """The weights (BD) of one lag, from a contiguous (dim, WIDTH)."""
    if LAG < WIDTH:
        return tl.load(weight + c * WIDTH + (WIDTH - 1 - LAG), mask=mask, other=0.0).to(tl.float32)
    return tl.zeros_like(c).to(tl.float32)


@triton.jit
def weighted(k0, k1, k2, k3, shift, x0, x1, x2, x3, WIDTH: tl.constexpr):
    """bias + sum over the lags."""
    total = shift + k0 * x0 + k1 * x1
    if WIDTH > 2:
        total += k2 * x2
    if WIDTH > 3:
        total += k3 * x3
    return total


@triton.jit
def program_place(dim, tiles, chunks, STEPS: tl.constexpr, BD: tl.constexpr):
    """Batch row, first step, channels (BD) and their mask: neighbours in the grid are neighbours in memory."""
    pid = tl.program_id(0)
    c = (pid % tiles).to(tl.int64) * BD + tl.arange(0, BD)
    return (pid // tiles // chunks).to(tl.int64), pid // tiles % chunks * STEPS, c, c < dim


@triton.jit
def forward_step(
    k0, k1, k2, k3, shift, x0, x1, x2, x3, q0, q1, q2, q3, row, s, high, stride, mask, seqlen,
    WIDTH: tl.constexpr, SILU: tl.constexpr, SEQ: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """Computes and stores the output of step s from its inputs and lags, and their sequences."""
    x1, x2, x3 = lagged(x1, q1, q0, SEQ), lagged(x2, q2, q0, SEQ), lagged(x3, q3, q0, SEQ)
    y = weighted(k0, k1, k2, k3, shift, x0, x1, x2, x3, WIDTH)
    if SILU:
        y = y / (1.0 + tl.exp(-y))
    at = row + place(s, seqlen, REVERSE) * stride
    tl.store(at, y.to(row.dtype.element_ty), mask=mask & (s < high))


@triton.jit
def forward_kernel(
    x, weight, bias, seq_idx, initial, out, dim, seqlen, tiles, chunks,
    x_batch, x_dim, x_time, seq_batch, seq_time, initial_batch, initial_dim, initial_step, out_batch, out_dim, out_time,
    WIDTH: tl.constexpr, SILU: tl.constexpr, BIAS: tl.constexpr, SEQ: tl.constexpr, INITIAL: tl.constexpr,
    REVERSE: tl.constexpr, STEPS: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    b, first, c, mask = program_place(dim, tiles, chunks, STEPS, BD)
    end = tl.minimum(first + STEPS, seqlen)
    x_row, out_row = x + b * x_batch + c * x_dim, out + b * out_batch + c * out_dim
    q_row, past = seq_idx + b * seq_batch, initial + b * initial_batch + c * initial_dim
    k0, k1 = taps(weight, c, mask, 0, WIDTH), taps(weight, c, mask, 1, WIDTH)
    k2, k3 = taps(weight, c, mask, 2, WIDTH), taps(weight, c, mask, 3, WIDTH)
    shift = tl.zeros_like(k0)
    if BIAS:
        shift = tl.load(bias + c, mask=mask, other=0.0).to(tl.float32)
    p1 = past_input(x_row, past, first - 1, x_time, initial_step, mask, seqlen, WIDTH, INITIAL, REVERSE)
    p2 = past_input(x_row, past, first - 2, x_time, initial_step, mask, seqlen, WIDTH, INITIAL, REVERSE)
    p3 = past_input(x_row, past, first - 3, x_time, initial_step, mask, seqlen, WIDTH, INITIAL, REVERSE)
    r1 = step_index(q_row, first - 1, seq_time, seqlen, REVERSE, SEQ)
    r2 = step_index(q_row, first - 2, seq_time, seqlen, REVERSE, SEQ)
    r3 = step_index(q_row, first - 3, seq_time, seqlen, REVERSE, SEQ)
    n0 = step_input(x_row, first, end, x_time, mask, seqlen, REVERSE)
    n1 = step_input(x_row, first + 1, end, x_time, mask, seqlen, REVERSE)
    n2 = step_input(x_row, first + 2, end, x_time, mask, seqlen, REVERSE)
    n3 = step_input(x_row, first + 3, end, x_time, mask, seqlen, REVERSE)
    for group in range(tl.cdiv(end - first, 4)):
        s = first + 4 * group
        x0, x1, x2, x3 = n0, n1, n2, n3
        n0 = step_input(x_row, s + 4, end, x_time, mask, seqlen, REVERSE)
        n1 = step_input(x_row, s + 5, end, x_time, mask, seqlen, REVERSE)
        n2 = step_input(x_row, s + 6, end, x_time, mask, seqlen, REVERSE)
        n3 = step_input(x_row, s + 7, end, x_time, mask, seqlen, REVERSE)
        q0 = step_index(q_row, s, seq_time, seqlen, REVERSE, SEQ)
        q1 = step_index(q_row, s + 1, seq_time, seqlen, REVERSE, SEQ)
        q2 = step_index(q_row, s + 2, seq_time, seqlen, REVERSE, SEQ)
        q3 = step_index(q_row, s + 3, seq_time, seqlen, REVERSE, SEQ)
        forward_step(k0, k1, k2, k3, shift, x0, p1, p2, p3, q0, r1, r2, r3, out_row, s, end, out_time, mask, seqlen,
                     WIDTH, SILU, SEQ, REVERSE)  # fmt: skip
        forward_step(k0, k1, k2, k3, shift, x1, x0, p1, p2, q1, q0, r1, r2, out_row, s + 1, end, out_time, mask, seqlen,
                     WIDTH, SILU, SEQ, REVERSE)  # fmt: skip
        forward_step(k0, k1, k2, k3, shift, x2, x1, x0, p1, q2, q1, q0, r1, out_row, s + 2, end, out_time, mask, seqlen,
                     WIDTH, SILU, SEQ, REVERSE)  # fmt: skip
        forward_step(k0, k1, k2, k3, shift, x3, x2, x1, x0, q3, q2, q1, q0, out_row, s + 3, end, out_time, mask, seqlen,
                     WIDTH, SILU, SEQ, REVERSE)  # fmt: skip
        p1, p2, p3 = x3, x2, x1
        r1, r2, r3 = q3, q2, q1


@triton.jit
def final_gradient(row, s, stride, like, mask, seqlen, WIDTH: tl.constexpr, HAS: tl.constexpr):
    """What the gradient of the final states gives to the input of step s, which may lie before step 0."""
    if HAS:
        i = (s - (seqlen - (WIDTH - 1))).to(tl.int64)
        return tl.load(row + i * stride, mask=mask & (i >= 0) & (i < WIDTH - 1), other=0.0).to(tl.float32)
    return tl.zeros_like(like)


@triton.jit
def backward_step(
    k0, k1, k2, k3, shift, x0, x1, x2, x3, q0, q1, q2, q3, grad, a1, a2, a3, d0, d1, d2, d3, db,
    final_row, final_step, dx_row, dx_time, past_row, past_step, s, first, end, mask, seqlen,
    WIDTH: tl.constexpr, SILU: tl.constexpr, SEQ: tl.constexpr, FINAL: tl.constexpr, DX: tl.constexpr, PAST: tl.constexpr,
    REVERSE: tl.constexpr,
):  # fmt: skip
    """One step: a1, a2, a3 are what the gradients of the inputs one to three steps back have so far; the oldest is stored."""
    x1, x2, x3 = lagged(x1, q1, q0, SEQ), lagged(x2, q2, q0, SEQ), lagged(x3, q3, q0, SEQ)
    g = grad
    if SILU:
        pre = weighted(k0, k1, k2, k3, shift, x0, x1, x2, x3, WIDTH)
        sigmoid = 1.0 / (1.0 + tl.exp(-pre))
        g *= sigmoid * (1.0 + pre * (1.0 - sigmoid))
    g = tl.where(s < seqlen, g, 0.0)
    # The steps past the end only complete dx; selected, since an infinite input times zero must not be added.
    own = s < end
    d0 += tl.where(own, g * x0, 0.0)
    d1 += tl.where(own, g * x1, 0.0)
    d2 += tl.where(own, g * x2, 0.0)
    d3 += tl.where(own, g * x3, 0.0)
    db += tl.where(own, g, 0.0)
    a0 = k0 * g + final_gradient(final_row, s, final_step, k0, mask, seqlen, WIDTH, FINAL)
    a1 += lagged(k1 * g, q1, q0, SEQ)
    a2 += lagged(k2 * g, q2, q0, SEQ)
    a3 += lagged(k3 * g, q3, q0, SEQ)
    done = a3 if WIDTH == 4 else (a2 if WIDTH == 3 else a1)
    to = s - (WIDTH - 1)
    if DX:
        at = dx_row + place(to, seqlen, REVERSE) * dx_time
        tl.store(at, done.to(dx_row.dtype.element_ty), mask=mask & (to >= first) & (to < end))
    if PAST:
        tl.store(past_row + s.to(tl.int64) * past_step, done.to(past_row.dtype.element_ty), mask=mask & (to < 0))
    return a0, a1, a2, d0, d1, d2, d3, db


@triton.jit
def backward_kernel(
    x, weight, bias, seq_idx, initial, dout, dfinal, dx, dinitial, sums, dim, seqlen, tiles, chunks,
    x_batch, x_dim, x_time, seq_batch, seq_time, initial_batch, initial_dim, initial_step,
    dout_batch, dout_dim, dout_time, dfinal_batch, dfinal_dim, dfinal_step, dx_batch, dx_dim, dx_time,
    dinitial_batch, dinitial_dim, dinitial_step,
    WIDTH: tl.constexpr, SILU: tl.constexpr, BIAS: tl.constexpr, SEQ: tl.constexpr, INITIAL: tl.constexpr,
    FINAL: tl.constexpr, DX: tl.constexpr, PAST: tl.constexpr, SUMS: tl.constexpr, REVERSE: tl.constexpr,
    STEPS: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """What stands before the activation is computed again. dx of a step is complete WIDTH - 1 steps later.

    sums: (batch * chunks, WIDTH + 1, dim) float32, of each tap, then of the bias.
    """
    b, first, c, mask = program_place(dim, tiles, chunks, STEPS, BD)
    end = tl.minimum(first + STEPS, seqlen)
    x_row, g_row = x + b * x_batch + c * x_dim, dout + b * dout_batch + c * dout_dim
    q_row, past = seq_idx + b * seq_batch, initial + b * initial_batch + c * initial_dim
    f_row, dx_row = dfinal + b * dfinal_batch + c * dfinal_dim, dx + b * dx_batch + c * dx_dim
    dpast = dinitial + b * dinitial_batch + c * dinitial_dim
    k0, k1 = taps(weight, c, mask, 0, WIDTH), taps(weight, c, mask, 1, WIDTH)
    k2, k3 = taps(weight, c, mask, 2, WIDTH), taps(weight, c, mask, 3, WIDTH)
    zero = tl.zeros_like(k0)
    shift = zero
    if BIAS:
        shift = tl.load(bias + c, mask=mask, other=0.0).to(tl.float32)
    p1 = past_input(x_row, past, first - 1, x_time, initial_step, mask, seqlen, WIDTH, INITIAL, REVERSE)
    p2 = past_input(x_row, past, first - 2, x_time, initial_step, mask, seqlen, WIDTH, INITIAL, REVERSE)
    p3 = past_input(x_row, past, first - 3, x_time, initial_step, mask, seqlen, WIDTH, INITIAL, REVERSE)
    r1 = step_index(q_row, first - 1, seq_time, seqlen, REVERSE, SEQ)
    r2 = step_index(q_row, first - 2, seq_time, seqlen, REVERSE, SEQ)
    r3 = step_index(q_row, first - 3, seq_time, seqlen, REVERSE, SEQ)
    a1 = final_gradient(f_row, first - 1, dfinal_step, k0, mask, seqlen, WIDTH, FINAL)
    a2 = final_gradient(f_row, first - 2, dfinal_step, k0, mask, seqlen, WIDTH, FINAL)
    a3 = final_gradient(f_row, first - 3, dfinal_step, k0, mask, seqlen, WIDTH, FINAL)
    d0, d1, d2, d3, db = zero, zero, zero, zero, zero
    n0 = step_input(x_row, first, seqlen, x_time, mask, seqlen, REVERSE)
    n1 = step_input(x_row, first + 1, seqlen, x_time, mask, seqlen, REVERSE)
    n2 = step_input(x_row, first + 2, seqlen, x_time, mask, seqlen, REVERSE)
    n3 = step_input(x_row, first + 3, seqlen, x_time, mask, seqlen, REVERSE)
    m0 = step_input(g_row, first, seqlen, dout_time, mask, seqlen, REVERSE)
    m1 = step_input(g_row, first + 1, seqlen, dout_time, mask, seqlen, REVERSE)
    m2 = step_input(g_row, first + 2, seqlen, dout_time, mask, seqlen, REVERSE)
    m3 = step_input(g_row, first + 3, seqlen, dout_time, mask, seqlen, REVERSE)
    for group in range(tl.cdiv(end + (WIDTH - 1) - first, 4)):
        s = first + 4 * group
        x0, x1, x2, x3, g0, g1, g2, g3 = n0, n1, n2, n3, m0, m1, m2, m3
        high = tl.minimum(seqlen, end + (WIDTH - 1))
        n0 = step_input(x_row, s + 4, high, x_time, mask, seqlen, REVERSE)
        n1 = step_input(x_row, s + 5, high, x_time, mask, seqlen, REVERSE)
        n2 = step_input(x_row, s + 6, high, x_time, mask, seqlen, REVERSE)
        n3 = step_input(x_row, s + 7, high, x_time, mask, seqlen, REVERSE)
        m0 = step_input(g_row, s + 4, high, dout_time, mask, seqlen, REVERSE)
        m1 = step_input(g_row, s + 5, high, dout_time, mask, seqlen, REVERSE)
        m2 = step_input(g_row, s + 6, high, dout_time, mask, seqlen, REVERSE)
        m3 = step_input(g_row, s + 7, high, dout_time, mask, seqlen, REVERSE)
        q0 = step_index(q_row, s, seq_time, seqlen, REVERSE, SEQ)
        q1 = step_index(q_row, s + 1, seq_time, seqlen, REVERSE, SEQ)
        q2 = step_index(q_row, s + 2, seq_time, seqlen, REVERSE, SEQ)
        q3 = step_index(q_row, s + 3, seq_time, seqlen, REVERSE, SEQ)
        a1, a2, a3, d0, d1, d2, d3, db = backward_step(
            k0, k1, k2, k3, shift, x0, p1, p2, p3, q0, r1, r2, r3, g0, a1, a2, a3, d0, d1, d2, d3, db,
            f_row, dfinal_step, dx_row, dx_time, dpast, dinitial_step, s, first, end, mask, seqlen,
            WIDTH, SILU, SEQ, FINAL, DX, PAST, REVERSE)  # fmt: skip
        a1, a2, a3, d0, d1, d2, d3, db = backward_step(
            k0, k1, k2, k3, shift, x1, x0, p1, p2, q1, q0, r1, r2, g1, a1, a2, a3, d0, d1, d2, d3, db,
            f_row, dfinal_step, dx_row, dx_time, dpast, dinitial_step, s + 1, first, end, mask, seqlen,
            WIDTH, SILU, SEQ, FINAL, DX, PAST, REVERSE)  # fmt: skip
        a1, a2, a3, d0, d1, d2, d3, db = backward_step(
            k0, k1, k2, k3, shift, x2, x1, x0, p1, q2, q1, q0, r1, g2, a1, a2, a3, d0, d1, d2, d3, db,
            f_row, dfinal_step, dx_row, dx_time, dpast, dinitial_step, s + 2, first, end, mask, seqlen,
            WIDTH, SILU, SEQ, FINAL, DX, PAST, REVERSE)  # fmt: skip
        a1, a2, a3, d0, d1, d2, d3, db = backward_step(
            k0, k1, k2, k3, shift, x3, x2, x1, x0, q3, q2, q1, q0, g3, a1, a2, a3, d0, d1, d2, d3, db,
            f_row, dfinal_step, dx_row, dx_time, dpast, dinitial_step, s + 3, first, end, mask, seqlen,
            WIDTH, SILU, SEQ, FINAL, DX, PAST, REVERSE)  # fmt: skip
        p1, p2, p3 = x3, x2, x1
        r1, r2, r3 = q3, q2, q1
    if SUMS:
        to = sums + (b * chunks + first // STEPS) * (WIDTH + 1) * dim + c
        tl.store(to + (WIDTH - 1) * dim, d0, mask=mask)
        tl.store(to + (WIDTH - 2) * dim, d1, mask=mask)
        if WIDTH > 2:
            tl.store(to + (WIDTH - 3) * dim, d2, mask=mask)
        if WIDTH > 3:
            tl.store(to, d3, mask=mask)
        tl.store(to + WIDTH * dim, db, mask=mask)
