"""Triton kernels of the selective scan: sequential in time, parallel over batch and tiles of channels.

Forward:  a program owns one batch row and BD channels of one group, both directions one after the other. State (NP, BD) in registers.
Backward: the same split. Chunks are walked against the scan; the states of a chunk are formed once more, one of every 4 kept in
          scratch memory, then those of 4 steps in registers, which are swept from the last to the first.
No shared memory is asked for, no atomics: what sums over channels or batch rows goes to partial sums of the program. Deterministic.

Time goes by in blocks of 4 steps, cut at multiples of 4. What has no state is loaded, computed and stored as tiles (BD, 4) in the order of
time; the recurrence takes their columns in the order of the scan. A step past the end changes nothing.
NP is dstate rounded up to a power of two. All that has states is stored with the state innermost, so that Triton gives a thread 4 states
of a few channels; a second layout of the states would mean conversions in every step. Offsets are 64-bit from the first product on.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def log1p_of(e):
    """log(1 + e) for e in [0, 1]: e times a minimax polynomial of log(1 + e) / e, relative error 1.5e-7. NaN stays."""
    p = -0.0032440212089568377
    p = p * e + 0.01985144428908825
    p = p * e - 0.056959498673677444
    p = p * e + 0.10603651404380798
    p = p * e - 0.15305590629577637
    p = p * e + 0.1967593878507614
    p = p * e - 0.24954134225845337
    p = p * e + 0.3332996368408203
    p = p * e - 0.4999990165233612
    p = p * e + 1.0
    return p * e


@triton.jit
def softplus(x):
    """log(1 + exp(x)); above 20 it is x, to the last bit of float32."""
    return tl.maximum(x, 0.0) + log1p_of(tl.exp2(-tl.abs(x) * LOG2E))


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp2(-x * LOG2E))


@triton.jit
def step_size(raw, valid, SOFTPLUS: tl.constexpr):
    """delta as the recurrence uses it. A step that does not exist has next to none: its decay is 1, but also where A is infinite no NaN."""
    return tl.where(valid, softplus(raw) if SOFTPLUS else raw, 1e-38)


@triton.jit
def load_tile(pointer, at, st, mask):
    """(BD, 4) of a tensor at the times `at` (4), as float32; `pointer` (BD) is at time 0."""
    return tl.load(pointer[:, None] + (at.to(tl.int64) * st)[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store_tile(pointer, at, st, tile, mask):
    tl.store(pointer[:, None] + (at.to(tl.int64) * st)[None, :], tile.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def columns(tile, down, BD: tl.constexpr):
    """The 4 columns of a tile (BD, 4) in the order of the scan."""
    even, odd = tl.split(tl.reshape(tile, [BD, 2, 2]))
    c0, c2 = tl.split(even)
    c1, c3 = tl.split(odd)
    back = down != 0
    return tl.where(back, c3, c0), tl.where(back, c2, c1), tl.where(back, c1, c2), tl.where(back, c0, c3)


@triton.jit
def tile_of(c0, c1, c2, c3, down, BD: tl.constexpr):
    """The tile of 4 columns that come in the order of the scan."""
    back = down != 0
    even = tl.join(tl.where(back, c3, c0), tl.where(back, c1, c2))
    odd = tl.join(tl.where(back, c2, c1), tl.where(back, c0, c3))
    return tl.reshape(tl.join(even, odd), [BD, 4])


@triton.jit
def per_channel(pointer, channel, mask):
    """A (dim) argument as float32, zeros where it is None."""
    return (
        tl.zeros_like(channel).to(tl.float32)
        if pointer is None
        else tl.load(pointer + channel, mask=mask, other=0.0).to(tl.float32)
    )


@triton.jit
def decay_of(dt, A, DSTATE: tl.constexpr, NP: tl.constexpr):
    """exp(dt A), (NP, BD). 0 in states that are padding, so that they are 0 whatever dt is."""
    a = tl.exp2(dt[None, :] * A)
    if DSTATE < NP:
        a = tl.where(tl.arange(0, NP)[:, None] < DSTATE, a, 0.0)
    return a


@triton.jit
def input_of(xdt, B, DSTATE: tl.constexpr, NP: tl.constexpr):
    """dt u B, (NP, BD), 0 in states that are padding."""
    b = xdt[None, :] * B
    if DSTATE < NP:
        b = tl.where(tl.arange(0, NP)[:, None] < DSTATE, b, 0.0)
    return b


@triton.jit
def coefficient(pointer, constant, n, valid, CONSTANT: tl.constexpr, DSTATE: tl.constexpr, NP: tl.constexpr):
    """B or C of one step as (NP, 1), or what is constant in time as (NP, BD)."""
    if CONSTANT:
        return constant
    elif DSTATE < NP:
        return tl.load(pointer + n, mask=valid & (n < DSTATE), other=0.0).to(tl.float32)[:, None]
    else:
        return tl.load(pointer + n, mask=valid, other=0.0).to(tl.float32)[:, None]


@triton.jit
def pick(d, first, second):
    """Direction d's own; `second` is None where it shares the first one's, or where there is one direction."""
    return first if second is None else tl.where(d == 0, first, second)


@triton.jit
def entering(h, seq_idx, t, seqlen, seq_st, sign):
    """The state that the step at t starts from, and whether it comes from the step before."""
    same = True
    if seq_idx is not None:
        inside = (t < seqlen) & (t - sign >= 0) & (t - sign < seqlen)
        here = tl.load(seq_idx + t.to(tl.int64) * seq_st, mask=inside, other=0)
        same = here == tl.load(seq_idx + (t - sign).to(tl.int64) * seq_st, mask=inside, other=0)
        h = tl.where(same, h, 0.0)
    return h, same


@triton.jit
def place(dim, channels, tiles, BD: tl.constexpr):
    """What a program owns: batch row, group, channels (BD) and which of them exist; and where its partial sums go: (tile, group)."""
    groups = dim // channels
    pid = tl.program_id(0)
    tile = pid % (groups * tiles)
    b = (pid // (groups * tiles)).to(tl.int64)
    group = tile // tiles
    within = (tile % tiles) * BD + tl.arange(0, BD)
    channel = (group * channels + within).to(tl.int64)
    return b, group.to(tl.int64), channel, within < channels, (tile % tiles) * groups + group


@triton.jit(do_not_specialize=["batch", "dim", "channels", "tiles"])
def scan_forward(
    u0, delta0, A0, B0, C0, D0, bias0, initial, last, states,
    u1, delta1, A1, B1, C1, D1, bias1,
    z, out, partial, seq_idx,
    batch, dim, seqlen, channels, tiles, scale,
    u0_sb, u0_sd, u0_st, delta0_sb, delta0_sd, delta0_st, B0_sb, B0_sg, B0_st, C0_sb, C0_sg, C0_st,
    u1_sb, u1_sd, u1_st, delta1_sb, delta1_sd, delta1_st, B1_sb, B1_sg, B1_st, C1_sb, C1_sg, C1_st,
    z_sb, z_sd, z_st, out_sb, out_sd, out_st, seq_sb, seq_st,
    DIRECTIONS: tl.constexpr, REVERSE: tl.constexpr, SOFTPLUS: tl.constexpr, B_CONSTANT: tl.constexpr, C_CONSTANT: tl.constexpr,
    DSTATE: tl.constexpr, NP: tl.constexpr, BD: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Grid: batch x groups x tiles. `channels` of a group, `tiles` of a group. The first direction's y waits in `partial`, or in `out`."""
    b, group, channel, mask, tile = place(dim, channels, tiles, BD)
    n = tl.arange(0, NP)
    states_mask = (n[:, None] < DSTATE) & mask[None, :]
    dn = channel[None, :] * DSTATE + n[:, None]  # in (dim, dstate)
    row = b * dim * DSTATE + dn
    chunks = tl.cdiv(seqlen, CHUNK)
    blocks = tl.cdiv(seqlen, 4)
    waiting = out if partial is None else partial
    out_at = b * out_sb + channel * out_sd
    z_at = z
    sequence = seq_idx
    if z is not None:
        z_at = z + (b * z_sb + channel * z_sd)
    if seq_idx is not None:
        sequence = seq_idx + b * seq_sb

    for d in range(DIRECTIONS):
        if DIRECTIONS == 2:
            tl.debug_barrier()  # what one lane has stored, another may load
        down = d ^ REVERSE
        sign = 1 - 2 * down
        decay_rate = tl.load(pick(d, A0, A1) + dn, mask=states_mask, other=0.0).to(tl.float32) * LOG2E
        skip = per_channel(D0 if D0 is None else pick(d, D0, D1), channel, mask)[:, None]
        bias = per_channel(bias0 if bias0 is None else pick(d, bias0, bias1), channel, mask)[:, None]
        B = pick(d, B0, B1)
        C = pick(d, C0, C1)
        B_st = pick(d, B0_st, B1_st)
        C_st = pick(d, C0_st, C1_st)
        B_constant = 0.0
        C_constant = 0.0
        if B_CONSTANT:
            B_constant = tl.load(B + dn, mask=states_mask, other=0.0).to(tl.float32)
        else:
            B += b * pick(d, B0_sb, B1_sb) + group * pick(d, B0_sg, B1_sg)
        if C_CONSTANT:
            C_constant = tl.load(C + dn, mask=states_mask, other=0.0).to(tl.float32)
        else:
            C += b * pick(d, C0_sb, C1_sb) + group * pick(d, C0_sg, C1_sg)
        u_st = pick(d, u0_st, u1_st)
        delta_st = pick(d, delta0_st, delta1_st)
        u = pick(d, u0, u1) + (b * pick(d, u0_sb, u1_sb) + channel * pick(d, u0_sd, u1_sd))
        delta = pick(d, delta0, delta1) + (b * pick(d, delta0_sb, delta1_sb) + channel * pick(d, delta0_sd, delta1_sd))
        if initial is not None:
            h = tl.load(initial + row, mask=states_mask & (d == 0), other=0.0).to(tl.float32)
        else:
            h = tl.zeros([NP, BD], tl.float32)

        # u and delta are loaded a block ahead: Triton moves no load over a store.
        at = down * (blocks - 1) * 4 + tl.arange(0, 4)
        there = mask[:, None] & (at < seqlen)[None, :]
        u_next = load_tile(u, at, u_st, there)
        delta_next = load_tile(delta, at, delta_st, there)
        for i in range(blocks):
            block = down * (blocks - 1) + sign * i
            if states is not None:
                # A chunk's entry is before its first block, upwards in time, or its last, downwards.
                if (block % (CHUNK // 4) == down * (CHUNK // 4 - 1)) | (i == 0):
                    k = d * chunks + block // (CHUNK // 4)
                    tl.store(states + k.to(tl.int64) * batch * dim * DSTATE + row, h, mask=states_mask)
            start = block * 4
            at = start + tl.arange(0, 4)
            valid = (at < seqlen)[None, :]
            here = mask[:, None] & valid
            x = u_next
            dt = step_size(delta_next + bias, valid, SOFTPLUS)
            ahead = at + 4 * sign
            there = mask[:, None] & ((ahead < seqlen) & (ahead >= 0))[None, :]
            u_next = load_tile(u, ahead, u_st, there)
            delta_next = load_tile(delta, ahead, delta_st, there)
            dts = columns(dt, down, BD)
            xdts = columns(x * dt, down, BD)
            ys = ()
            for s in tl.static_range(4):
                t = start + s + down * (3 - 2 * s)
                B_now = coefficient(B + t.to(tl.int64) * B_st, B_constant, n, t < seqlen, B_CONSTANT, DSTATE, NP)
                C_now = coefficient(C + t.to(tl.int64) * C_st, C_constant, n, t < seqlen, C_CONSTANT, DSTATE, NP)
                h, same = entering(h, sequence, t, seqlen, seq_st, sign)
                h = decay_of(dts[s], decay_rate, DSTATE, NP) * h + input_of(xdts[s], B_now, DSTATE, NP)
                ys = ys + (tl.sum(h * C_now, axis=0),)
            y = tile_of(ys[0], ys[1], ys[2], ys[3], down, BD) + skip * x
            if DIRECTIONS == 2:
                y += load_tile(waiting + out_at, at, out_st, here & (d == 1))
            if d == DIRECTIONS - 1:
                y = y * scale
                if z is not None:
                    gate = load_tile(z_at, at, z_st, here)
                    y = y * (gate * sigmoid(gate))
                store_tile(out + out_at, at, out_st, y, here)
            else:
                store_tile(waiting + out_at, at, out_st, y, here)
        if last is not None:
            tl.store(last + row, h, mask=states_mask & (d == 0))


@triton.jit(do_not_specialize=["batch", "dim", "channels", "tiles"])
def scan_backward(
    u0, delta0, A0, B0, C0, D0, bias0, du0, ddelta0, dA0, dB0, dC0, dD0, dbias0, dlast, dinitial, states,
    u1, delta1, A1, B1, C1, D1, bias1, du1, ddelta1, dA1, dB1, dC1, dD1, dbias1,
    du_partial, ddelta_partial, z, dout, dz, out, y_partial, seq_idx, scratch,
    batch, dim, seqlen, channels, tiles, scale,
    u0_sb, u0_sd, u0_st, delta0_sb, delta0_sd, delta0_st, B0_sb, B0_sg, B0_st, C0_sb, C0_sg, C0_st,
    u1_sb, u1_sd, u1_st, delta1_sb, delta1_sd, delta1_st, B1_sb, B1_sg, B1_st, C1_sb, C1_sg, C1_st,
    du0_sb, du0_sd, du0_st, ddelta0_sb, ddelta0_sd, ddelta0_st,
    du1_sb, du1_sd, du1_st, ddelta1_sb, ddelta1_sd, ddelta1_st,
    z_sb, z_sd, z_st, dout_sb, dout_sd, dout_st, dz_sb, dz_sd, dz_st, out_sb, out_sd, out_st, seq_sb, seq_st,
    DIRECTIONS: tl.constexpr, REVERSE: tl.constexpr, NEED_Y: tl.constexpr, SOFTPLUS: tl.constexpr,
    SHARED_U: tl.constexpr, SHARED_DELTA: tl.constexpr, B_CONSTANT: tl.constexpr, C_CONSTANT: tl.constexpr,
    DSTATE: tl.constexpr, NP: tl.constexpr, BD: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Grid as the forward. Of what both directions share, du0 and ddelta0 are the gradient, and the first direction's part waits in
    the `_partial` buffers, (batch, seqlen, dim), as does its y. NEED_Y: for dz and `out`."""
    b, group, channel, mask, tile = place(dim, channels, tiles, BD)
    n = tl.arange(0, NP)
    states_mask = (n[:, None] < DSTATE) & mask[None, :]
    dn = channel[None, :] * DSTATE + n[:, None]  # in (dim, dstate)
    row = b * dim * DSTATE + dn
    steps_row = (
        (tile.to(tl.int64) * batch + b) * seqlen * DSTATE
    )  # of the partial sums over channels, (tile, group, batch, seqlen, dstate)
    partial_at = b * seqlen * dim + channel
    scratch += tl.program_id(0).to(tl.int64) * (CHUNK // 4 * NP * BD)
    in_scratch = tl.arange(0, BD)[None, :] * NP + n[:, None]
    chunks = tl.cdiv(seqlen, CHUNK)
    blocks = tl.cdiv(seqlen, 4)
    dout += b * dout_sb + channel * dout_sd
    z_at = z
    dz_at = dz
    out_at = out
    sequence = seq_idx
    if z is not None:
        z_at = z + (b * z_sb + channel * z_sd)
    if dz is not None:
        dz_at = dz + (b * dz_sb + channel * dz_sd)
    if out is not None:
        out_at = out + (b * out_sb + channel * out_sd)
    if seq_idx is not None:
        sequence = seq_idx + b * seq_sb

    for d in range(DIRECTIONS):
        down = d ^ REVERSE
        sign = 1 - 2 * down
        final = d == DIRECTIONS - 1
        decay_rate = tl.load(pick(d, A0, A1) + dn, mask=states_mask, other=0.0).to(tl.float32) * LOG2E
        skip = per_channel(D0 if D0 is None else pick(d, D0, D1), channel, mask)[:, None]
        bias = per_channel(bias0 if bias0 is None else pick(d, bias0, bias1), channel, mask)[:, None]
        B = pick(d, B0, B1)
        C = pick(d, C0, C1)
        B_st = pick(d, B0_st, B1_st)
        C_st = pick(d, C0_st, C1_st)
        B_constant = 0.0
        C_constant = 0.0
        if B_CONSTANT:
            B_constant = tl.load(B + dn, mask=states_mask, other=0.0).to(tl.float32)
        else:
            B += b * pick(d, B0_sb, B1_sb) + group * pick(d, B0_sg, B1_sg)
        if C_CONSTANT:
            C_constant = tl.load(C + dn, mask=states_mask, other=0.0).to(tl.float32)
        else:
            C += b * pick(d, C0_sb, C1_sb) + group * pick(d, C0_sg, C1_sg)
        u_st = pick(d, u0_st, u1_st)
        delta_st = pick(d, delta0_st, delta1_st)
        u = pick(d, u0, u1) + (b * pick(d, u0_sb, u1_sb) + channel * pick(d, u0_sd, u1_sd))
        delta = pick(d, delta0, delta1) + (b * pick(d, delta0_sb, delta1_sb) + channel * pick(d, delta0_sd, delta1_sd))
        if du0 is not None:
            du_at = pick(d, du0, du1) + (b * pick(d, du0_sb, du1_sb) + channel * pick(d, du0_sd, du1_sd))
            du_st = pick(d, du0_st, du1_st)
        if ddelta0 is not None:
            ddelta_at = pick(d, ddelta0, ddelta1) + (
                b * pick(d, ddelta0_sb, ddelta1_sb) + channel * pick(d, ddelta0_sd, ddelta1_sd)
            )
            ddelta_st = pick(d, ddelta0_st, ddelta1_st)
        if dB0 is not None:
            dB = pick(d, dB0, dB1)
        if dC0 is not None:
            dC = pick(d, dC0, dC1)

        sum_A = tl.zeros([NP, BD], tl.float32)
        sum_D = tl.zeros([BD, 4], tl.float32)
        sum_bias = tl.zeros([BD, 4], tl.float32)
        sum_B = tl.zeros([NP, BD], tl.float32) if B_CONSTANT else 0.0
        sum_C = tl.zeros([NP, BD], tl.float32) if C_CONSTANT else 0.0
        if dlast is not None:
            dh = tl.load(dlast + row, mask=states_mask & (d == 0), other=0.0).to(tl.float32)
        else:
            dh = tl.zeros([NP, BD], tl.float32)

        for i in range(chunks):
            k = down * i + (1 - down) * (chunks - 1 - i)  # against the scan
            first = k * (CHUNK // 4)  # block of the chunk
            parts = tl.minimum(blocks - first, CHUNK // 4)
            tl.debug_barrier()  # what one lane has stored, another may load: the scratch memory and the waiting sums
            h = tl.load(
                states + (d * chunks + k).to(tl.int64) * batch * dim * DSTATE + row, mask=states_mask, other=0.0
            )
            for part in range(parts - 1):
                tl.store(scratch + part * (NP * BD) + in_scratch, h)
                start = (first + part + down * (parts - 1 - 2 * part)) * 4
                at = start + tl.arange(0, 4)
                valid = (at < seqlen)[None, :]
                here = mask[:, None] & valid
                x = load_tile(u, at, u_st, here)
                dt = step_size(load_tile(delta, at, delta_st, here) + bias, valid, SOFTPLUS)
                dts = columns(dt, down, BD)
                xdts = columns(x * dt, down, BD)
                for s in tl.static_range(4):
                    t = start + s + down * (3 - 2 * s)
                    B_now = coefficient(B + t.to(tl.int64) * B_st, B_constant, n, t < seqlen, B_CONSTANT, DSTATE, NP)
                    h, same = entering(h, sequence, t, seqlen, seq_st, sign)
                    h = decay_of(dts[s], decay_rate, DSTATE, NP) * h + input_of(xdts[s], B_now, DSTATE, NP)
            tl.store(scratch + (parts - 1) * (NP * BD) + in_scratch, h)
            tl.debug_barrier()

            for back in range(parts):
                part = parts - 1 - back
                start = (first + part + down * (parts - 1 - 2 * part)) * 4
                at = start + tl.arange(0, 4)
                valid = (at < seqlen)[None, :]
                here = mask[:, None] & valid
                h = tl.load(scratch + part * (NP * BD) + in_scratch)
                x = load_tile(u, at, u_st, here)
                raw = load_tile(delta, at, delta_st, here) + bias
                dy = load_tile(dout, at, dout_st, here) * scale
                if z is not None:
                    gate = load_tile(z_at, at, z_st, here)
                    opening = sigmoid(gate)
                    dgate = dy * opening * (1.0 + gate * (1.0 - opening))  # but for y
                    gated = gate * opening
                    dy = dy * gated
                dt = step_size(raw, valid, SOFTPLUS)
                dts = columns(dt, down, BD)
                xdts = columns(x * dt, down, BD)
                dys = columns(dy, down, BD)
                entered = ()
                sames = ()
                for s in tl.static_range(4):
                    t = start + s + down * (3 - 2 * s)
                    B_now = coefficient(B + t.to(tl.int64) * B_st, B_constant, n, t < seqlen, B_CONSTANT, DSTATE, NP)
                    entered = entered + (h,)
                    h, same = entering(h, sequence, t, seqlen, seq_st, sign)
                    sames = sames + (same,)
                    h = decay_of(dts[s], decay_rate, DSTATE, NP) * h + input_of(xdts[s], B_now, DSTATE, NP)
                ys = ()
                dxdts = ()
                drates = ()
                for s in tl.static_range(3, -1, -1):
                    t = start + s + down * (3 - 2 * s)
                    t64 = t.to(tl.int64)
                    C_now = coefficient(C + t64 * C_st, C_constant, n, t < seqlen, C_CONSTANT, DSTATE, NP)
                    B_now = coefficient(B + t64 * B_st, B_constant, n, t < seqlen, B_CONSTANT, DSTATE, NP)
                    if NEED_Y:
                        ys = ys + (tl.sum(h * C_now, axis=0),)
                    dyn = dys[s][None, :]
                    dh += dyn * C_now
                    if C_CONSTANT:
                        sum_C += dyn * h
                    elif dC0 is not None:
                        tl.store(
                            dC + steps_row + t64 * DSTATE + n, tl.sum(dyn * h, axis=1), mask=(t < seqlen) & (n < DSTATE)
                        )
                    if B_CONSTANT:
                        sum_B += xdts[s][None, :] * dh
                    elif dB0 is not None:
                        share = tl.sum(xdts[s][None, :] * dh, axis=1)
                        tl.store(dB + steps_row + t64 * DSTATE + n, share, mask=(t < seqlen) & (n < DSTATE))
                    dxdts = dxdts + (tl.sum(dh * B_now, axis=0),)
                    h = entered[s]
                    if seq_idx is not None:
                        h = tl.where(sames[s], h, 0.0)
                    dh = dh * decay_of(dts[s], decay_rate, DSTATE, NP)
                    drate = dh * h  # of dt A
                    sum_A += drate * dts[s][None, :]
                    drates = drates + (tl.sum(drate * decay_rate, axis=0),)
                    if seq_idx is not None:
                        dh = tl.where(sames[s], dh, 0.0)
                        h = entered[s]

                partial = partial_at[:, None] + (at.to(tl.int64) * dim)[None, :]
                if NEED_Y:
                    y = tile_of(ys[3], ys[2], ys[1], ys[0], down, BD) + skip * x
                    if DIRECTIONS == 2:
                        y += tl.load(y_partial + partial, mask=here & final, other=0.0)
                        tl.store(y_partial + partial, y, mask=here & (d == 0))
                    if dz is not None:
                        store_tile(dz_at, at, dz_st, dgate * y, here & final)
                    if out is not None:
                        store_tile(out_at, at, out_st, y * scale * gated, here & final)
                sum_D += dy * x
                dxdt = tile_of(dxdts[3], dxdts[2], dxdts[1], dxdts[0], down, BD)
                if du0 is not None:
                    dx = dxdt * dt + skip * dy
                    if SHARED_U:
                        dx += tl.load(du_partial + partial, mask=here & final, other=0.0)
                        tl.store(du_partial + partial, dx, mask=here & (d == 0))
                        store_tile(du_at, at, du_st, dx, here & final)
                    else:
                        store_tile(du_at, at, du_st, dx, here)
                ddt = tile_of(drates[3], drates[2], drates[1], drates[0], down, BD) * LN2 + dxdt * x
                if SOFTPLUS:
                    ddt = ddt * sigmoid(raw)
                ddt = tl.where(valid, ddt, 0.0)
                sum_bias += ddt
                if ddelta0 is not None:
                    if SHARED_DELTA:
                        ddt += tl.load(ddelta_partial + partial, mask=here & final, other=0.0)
                        tl.store(ddelta_partial + partial, ddt, mask=here & (d == 0))
                        store_tile(ddelta_at, at, ddelta_st, ddt, here & final)
                    else:
                        store_tile(ddelta_at, at, ddelta_st, ddt, here)

        # Sums over time: (batch, dim, dstate) and (batch, dim).
        if dA0 is not None:
            tl.store(pick(d, dA0, dA1) + row, sum_A, mask=states_mask)
        if B_CONSTANT and dB0 is not None:
            tl.store(dB + row, sum_B, mask=states_mask)
        if C_CONSTANT and dC0 is not None:
            tl.store(dC + row, sum_C, mask=states_mask)
        if dD0 is not None:
            tl.store(pick(d, dD0, dD1) + b * dim + channel, tl.sum(sum_D, axis=1), mask=mask)
        if dbias0 is not None:
            tl.store(pick(d, dbias0, dbias1) + b * dim + channel, tl.sum(sum_bias, axis=1), mask=mask)
        if dinitial is not None:
            tl.store(dinitial + row, dh, mask=states_mask & (d == 0))
