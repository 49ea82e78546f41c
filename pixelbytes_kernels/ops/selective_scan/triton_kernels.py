"""Triton kernels of the selective scan: sequential in time, parallel over batch and tiles of channels.

Forward:  a program owns one batch row, BD channels of one group, and one direction. State (NP, BD) in registers.
Backward: the same split. Chunks are walked against the scan; the states of a chunk are formed once more, one of every 4 kept in
          scratch memory, then those of 4 steps in registers, which are swept from the last to the first.
Merge:    adds up what both directions left, and opens the gate.
No shared memory is asked for, no atomics: what sums over channels or batch rows goes to partial sums of the program. Deterministic.

Time goes by in blocks of 4 steps, cut at multiples of 4. What has no state is loaded, computed and stored as tiles (BD, 4) in the order of
time; the recurrence takes their columns in the order of the scan. A step past the end changes nothing.
NP is dstate rounded up to a power of two. All that has states is stored with the state innermost, so that Triton gives a thread 4 states
of a few channels; a second layout of the states would mean conversions in every step. Offsets between batch rows are
64-bit; those within a row too, and in what has no time, where WIDE says that 32 bits might not do.
"""

# mypy: ignore-errors
# The bodies are Triton's language: a loop over static_range is unrolled, and a tuple grows in it.

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
    """delta as the recurrence uses it. A step that does not exist has next to none: its decay is 1, and no NaN where A is infinite."""
    return tl.where(valid, softplus(raw) if SOFTPLUS else raw, 1e-38)


@triton.jit
def offsets(channel, at, sd, st, WIDE: tl.constexpr):
    """Of channels (BD) at times (4), from the start of a batch row."""
    if WIDE:
        return channel.to(tl.int64)[:, None] * sd + at.to(tl.int64)[None, :] * st
    else:
        return channel[:, None] * sd + at[None, :] * st


@triton.jit
def load_tile(pointer, channel, at, sd, st, mask, WIDE: tl.constexpr):
    """(BD, 4) of a tensor as float32; `pointer` is at the start of the batch row."""
    return tl.load(pointer + offsets(channel, at, sd, st, WIDE), mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store_tile(pointer, channel, at, sd, st, tile, mask, WIDE: tl.constexpr):
    tl.store(pointer + offsets(channel, at, sd, st, WIDE), tile.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def wide(x, WIDE: tl.constexpr):
    return x.to(tl.int64) if WIDE else x


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
def entering(h, seq_idx, t, seqlen, seq_st, sign, WIDE: tl.constexpr):
    """The state that the step at t starts from, and whether it comes from the step before."""
    same = True
    if seq_idx is not None:
        inside = (t < seqlen) & (t - sign >= 0) & (t - sign < seqlen)
        here = tl.load(seq_idx + wide(t, WIDE) * seq_st, mask=inside, other=0)
        same = here == tl.load(seq_idx + wide(t - sign, WIDE) * seq_st, mask=inside, other=0)
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
    channel = group * channels + within
    return b, group.to(tl.int64), channel, within < channels, (tile % tiles) * groups + group


@triton.jit
def rows_of(
    d, b, group, dn, states_mask, first, first_sb, first_sg, first_st, second, second_sb, second_sg, second_st,
    CONSTANT: tl.constexpr,
):  # fmt: skip
    """B or C of direction d: where the program's rows start, from one time to the next, and what is constant in time."""
    pointer = pick(d, first, second)
    if CONSTANT:
        return pointer, 0, tl.load(pointer + dn, mask=states_mask, other=0.0).to(tl.float32)
    else:
        pointer += b * pick(d, first_sb, second_sb) + group * pick(d, first_sg, second_sg)
        return pointer, pick(d, first_st, second_st), 0.0


@triton.jit
def block_of(block, mask, seqlen):
    """Of a block of 4 steps: its start, its times, which of them exist, and the same for every channel (BD, 4)."""
    start = tl.minimum(block * 4, seqlen)
    at = start + tl.arange(0, 4)
    valid = (at < seqlen)[None, :]
    return start, at, valid, mask[:, None] & valid


@triton.jit
def staged(u, delta, bias, channel, at, valid, here, sd, st, SOFTPLUS: tl.constexpr, WIDE: tl.constexpr):
    """Tiles (BD, 4) of what a block's recurrence takes in: u, delta + bias, and that through the softplus."""
    x = load_tile(u, channel, at, sd, st, here, WIDE)
    raw = load_tile(delta, channel, at, sd, st, here, WIDE) + bias
    return x, raw, step_size(raw, valid, SOFTPLUS)


@triton.jit
def advanced(
    h, t, dt, xdt, decay_rate, n, seqlen, sign, B, B_st, B_constant, seq_idx, seq_st,
    B_CONSTANT: tl.constexpr, DSTATE: tl.constexpr, NP: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The step at t: the state that it starts from, whether that comes from the step before, and the state after it."""
    B_now = coefficient(B + wide(t, WIDE) * B_st, B_constant, n, t < seqlen, B_CONSTANT, DSTATE, NP)
    entered, same = entering(h, seq_idx, t, seqlen, seq_st, sign, WIDE)
    return entered, same, decay_of(dt, decay_rate, DSTATE, NP) * entered + input_of(xdt, B_now, DSTATE, NP)


@triton.jit(do_not_specialize=["batch", "dim", "channels", "tiles", "reverse"])
def scan_forward(
    u0, delta0, A0, B0, C0, D0, bias0, initial, last, states,
    u1, delta1, A1, B1, C1, D1, bias1,
    z, out, partial, seq_idx,
    batch, dim, seqlen, channels, tiles, plane, reverse, scale,
    in_sb, in_sd, in_st, B0_sb, B0_sg, B0_st, C0_sb, C0_sg, C0_st, B1_sb, B1_sg, B1_st, C1_sb, C1_sg, C1_st,
    z_sb, z_sd, z_st, out_sb, out_sd, out_st, seq_sb, seq_st,
    DIRECTIONS: tl.constexpr, SOFTPLUS: tl.constexpr, B_CONSTANT: tl.constexpr, C_CONSTANT: tl.constexpr,
    DSTATE: tl.constexpr, NP: tl.constexpr, BD: tl.constexpr, CHUNK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Grid: batch x groups x tiles, directions; `channels` and `tiles` of a group. Two directions leave y in `partial`, `plane` apart."""
    d = tl.program_id(1)
    b, group, channel, mask, tile = place(dim, channels, tiles, BD)
    n = tl.arange(0, NP)
    states_mask = (n[:, None] < DSTATE) & mask[None, :]
    dn = wide(channel, WIDE)[None, :] * DSTATE + n[:, None]  # in (dim, dstate)
    row = b * dim * DSTATE  # of a tensor (batch, dim, dstate)
    chunks = tl.cdiv(seqlen, CHUNK)
    blocks = tl.cdiv(seqlen, 4)
    out_row = b * out_sb
    z_at = z
    sequence = seq_idx
    if z is not None:
        z_at = z + b * z_sb
    if seq_idx is not None:
        sequence = seq_idx + b * seq_sb

    down = d ^ reverse
    sign = 1 - 2 * down
    decay_rate = tl.load(pick(d, A0, A1) + dn, mask=states_mask, other=0.0).to(tl.float32) * LOG2E
    skip = per_channel(D0 if D0 is None else pick(d, D0, D1), channel, mask)[:, None]
    bias = per_channel(bias0 if bias0 is None else pick(d, bias0, bias1), channel, mask)[:, None]
    B, B_st, B_constant = rows_of(
        d, b, group, dn, states_mask, B0, B0_sb, B0_sg, B0_st, B1, B1_sb, B1_sg, B1_st, B_CONSTANT
    )
    C, C_st, C_constant = rows_of(
        d, b, group, dn, states_mask, C0, C0_sb, C0_sg, C0_st, C1, C1_sb, C1_sg, C1_st, C_CONSTANT
    )
    u = pick(d, u0, u1) + b * in_sb
    delta = pick(d, delta0, delta1) + b * in_sb
    if initial is not None:
        h = tl.load(initial + row + dn, mask=states_mask & (d == 0), other=0.0).to(tl.float32)
    else:
        h = tl.zeros([NP, BD], tl.float32)

    # u and delta are loaded a block ahead: Triton moves no load over a store.
    at = down * (blocks - 1) * 4 + tl.arange(0, 4)
    there = mask[:, None] & (at < seqlen)[None, :]
    u_next = load_tile(u, channel, at, in_sd, in_st, there, WIDE)
    delta_next = load_tile(delta, channel, at, in_sd, in_st, there, WIDE)
    for i in range(blocks):
        block = down * (blocks - 1) + sign * i
        if states is not None:  # noqa: SIM102 (the one is known to the compiler, the other is not)
            # A chunk's entry is before its first block, upwards in time, or its last, downwards.
            if (block % (CHUNK // 4) == down * (CHUNK // 4 - 1)) | (i == 0):
                k = d * chunks + block // (CHUNK // 4)
                tl.store(states + k.to(tl.int64) * batch * dim * DSTATE + row + dn, h, mask=states_mask)
        start, at, valid, here = block_of(block, mask, seqlen)
        x = u_next
        dt = step_size(delta_next + bias, valid, SOFTPLUS)
        ahead = at + 4 * sign
        there = mask[:, None] & ((ahead < seqlen) & (ahead >= 0))[None, :]
        u_next = load_tile(u, channel, ahead, in_sd, in_st, there, WIDE)
        delta_next = load_tile(delta, channel, ahead, in_sd, in_st, there, WIDE)
        dts = columns(dt, down, BD)
        xdts = columns(x * dt, down, BD)
        ys = ()
        for s in tl.static_range(4):
            t = start + s + down * (3 - 2 * s)
            C_now = coefficient(C + wide(t, WIDE) * C_st, C_constant, n, t < seqlen, C_CONSTANT, DSTATE, NP)
            _, _, h = advanced(
                h, t, dts[s], xdts[s], decay_rate, n, seqlen, sign, B, B_st, B_constant, sequence, seq_st,
                B_CONSTANT, DSTATE, NP, WIDE,
            )  # fmt: skip
            ys = ys + (tl.sum(h * C_now, axis=0),)
        y = tile_of(ys[0], ys[1], ys[2], ys[3], down, BD) + skip * x
        if DIRECTIONS == 2:
            store_tile(partial + d * plane + out_row, channel, at, out_sd, out_st, y, here, WIDE)
        else:
            y = y * scale
            if z is not None:
                gate = load_tile(z_at, channel, at, z_sd, z_st, here, WIDE)
                y = y * (gate * sigmoid(gate))
            store_tile(out + out_row, channel, at, out_sd, out_st, y, here, WIDE)
    if last is not None:
        tl.store(last + row + dn, h, mask=states_mask & (d == 0))


@triton.jit(do_not_specialize=["batch", "dim", "channels", "tiles", "reverse"])
def scan_backward(
    u0, delta0, A0, B0, C0, D0, bias0, du0, ddelta0, dA0, dB0, dC0, dD0, dbias0, dlast, dinitial, states,
    u1, delta1, A1, B1, C1, D1, bias1, du1, ddelta1, dA1, dB1, dC1, dD1, dbias1,
    du_partial, ddelta_partial, z, dout, dz, out, y_partial, seq_idx, scratch,
    batch, dim, seqlen, channels, tiles, plane, reverse, scale,
    in_sb, in_sd, in_st, B0_sb, B0_sg, B0_st, C0_sb, C0_sg, C0_st, B1_sb, B1_sg, B1_st, C1_sb, C1_sg, C1_st,
    z_sb, z_sd, z_st, out_sb, out_sd, out_st, seq_sb, seq_st,
    DIRECTIONS: tl.constexpr, NEED_Y: tl.constexpr, SOFTPLUS: tl.constexpr,
    B_CONSTANT: tl.constexpr, C_CONSTANT: tl.constexpr,
    DSTATE: tl.constexpr, NP: tl.constexpr, BD: tl.constexpr, CHUNK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Grid as the forward. What both directions share leaves its gradients in the `_partial` buffers, each direction's `plane` apart, and
    so does y of two directions. NEED_Y: for dz and `out`."""
    d = tl.program_id(1)
    b, group, channel, mask, tile = place(dim, channels, tiles, BD)
    n = tl.arange(0, NP)
    states_mask = (n[:, None] < DSTATE) & mask[None, :]
    dn = wide(channel, WIDE)[None, :] * DSTATE + n[:, None]  # in (dim, dstate)
    # Of the partial sums over channels, (tile, group, batch, seqlen, dstate).
    steps_row = (tile.to(tl.int64) * batch + b) * seqlen * DSTATE
    partial_row = b * out_sb
    scratch += (d * tl.num_programs(0) + tl.program_id(0)).to(tl.int64) * (CHUNK // 4 * NP * BD)
    in_scratch = tl.arange(0, BD)[None, :] * NP + n[:, None]
    chunks = tl.cdiv(seqlen, CHUNK)
    blocks = tl.cdiv(seqlen, 4)
    dout += b * in_sb
    z_at = z
    dz_at = dz
    out_at = out
    sequence = seq_idx
    if z is not None:
        z_at = z + b * z_sb
    if dz is not None:
        dz_at = dz + b * z_sb
    if out is not None:
        out_at = out + b * out_sb
    if seq_idx is not None:
        sequence = seq_idx + b * seq_sb

    down = d ^ reverse
    sign = 1 - 2 * down
    decay_rate = tl.load(pick(d, A0, A1) + dn, mask=states_mask, other=0.0).to(tl.float32) * LOG2E
    skip = per_channel(D0 if D0 is None else pick(d, D0, D1), channel, mask)[:, None]
    bias = per_channel(bias0 if bias0 is None else pick(d, bias0, bias1), channel, mask)[:, None]
    B, B_st, B_constant = rows_of(
        d, b, group, dn, states_mask, B0, B0_sb, B0_sg, B0_st, B1, B1_sb, B1_sg, B1_st, B_CONSTANT
    )
    C, C_st, C_constant = rows_of(
        d, b, group, dn, states_mask, C0, C0_sb, C0_sg, C0_st, C1, C1_sb, C1_sg, C1_st, C_CONSTANT
    )
    u = pick(d, u0, u1) + b * in_sb
    delta = pick(d, delta0, delta1) + b * in_sb
    if du0 is not None:
        du_at = pick(d, du0, du1) + b * out_sb
    if ddelta0 is not None:
        ddelta_at = pick(d, ddelta0, ddelta1) + b * out_sb
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
        dh = tl.load(dlast + b * dim * DSTATE + dn, mask=states_mask & (d == 0), other=0.0).to(tl.float32)
    else:
        dh = tl.zeros([NP, BD], tl.float32)

    for i in range(chunks):
        k = down * i + (1 - down) * (chunks - 1 - i)  # against the scan
        first = k * (CHUNK // 4)  # block of the chunk
        parts = tl.minimum(blocks - first, CHUNK // 4)
        tl.debug_barrier()  # what one lane has stored in scratch memory, another may load
        h = tl.load(
            states + ((d * chunks + k).to(tl.int64) * batch + b) * dim * DSTATE + dn, mask=states_mask, other=0.0
        )
        for part in range(parts - 1):
            tl.store(scratch + part * (NP * BD) + in_scratch, h)
            start, at, valid, here = block_of(first + part + down * (parts - 1 - 2 * part), mask, seqlen)
            x, raw, dt = staged(u, delta, bias, channel, at, valid, here, in_sd, in_st, SOFTPLUS, WIDE)
            dts = columns(dt, down, BD)
            xdts = columns(x * dt, down, BD)
            for s in tl.static_range(4):
                t = start + s + down * (3 - 2 * s)
                _, _, h = advanced(
                    h, t, dts[s], xdts[s], decay_rate, n, seqlen, sign, B, B_st, B_constant, sequence, seq_st,
                    B_CONSTANT, DSTATE, NP, WIDE,
                )  # fmt: skip
        tl.store(scratch + (parts - 1) * (NP * BD) + in_scratch, h)
        tl.debug_barrier()

        for back in range(parts):
            part = parts - 1 - back
            start, at, valid, here = block_of(first + part + down * (parts - 1 - 2 * part), mask, seqlen)
            h = tl.load(scratch + part * (NP * BD) + in_scratch)
            x, raw, dt = staged(u, delta, bias, channel, at, valid, here, in_sd, in_st, SOFTPLUS, WIDE)
            dy = load_tile(dout, channel, at, in_sd, in_st, here, WIDE) * scale
            if z is not None:
                gate = load_tile(z_at, channel, at, z_sd, z_st, here, WIDE)
                opening = sigmoid(gate)
                dgate = dy * opening * (1.0 + gate * (1.0 - opening))  # but for y
                gated = gate * opening
                dy = dy * gated
            dts = columns(dt, down, BD)
            xdts = columns(x * dt, down, BD)
            dys = columns(dy, down, BD)
            partial = partial_row + offsets(channel, at, out_sd, out_st, WIDE)
            entered = ()
            sames = ()
            ys = ()
            for s in tl.static_range(4):
                t = start + s + down * (3 - 2 * s)
                tw = wide(t, WIDE)
                before, same, h = advanced(
                    h, t, dts[s], xdts[s], decay_rate, n, seqlen, sign, B, B_st, B_constant, sequence, seq_st,
                    B_CONSTANT, DSTATE, NP, WIDE,
                )  # fmt: skip
                entered = entered + (before,)
                sames = sames + (same,)
                if NEED_Y:
                    C_now = coefficient(C + tw * C_st, C_constant, n, t < seqlen, C_CONSTANT, DSTATE, NP)
                    ys = ys + (tl.sum(h * C_now, axis=0),)
                if C_CONSTANT:
                    sum_C += dys[s][None, :] * h
                elif dC0 is not None:
                    share = tl.sum(dys[s][None, :] * h, axis=1)
                    tl.store(dC + steps_row + tw * DSTATE + n, share, mask=(t < seqlen) & (n < DSTATE))
            if NEED_Y:
                y = tile_of(ys[0], ys[1], ys[2], ys[3], down, BD) + skip * x
                if DIRECTIONS == 2:
                    tl.store(y_partial + d * plane + partial, y, mask=here)
                else:
                    if dz is not None:
                        store_tile(dz_at, channel, at, z_sd, z_st, dgate * y, here, WIDE)
                    if out is not None:
                        store_tile(out_at, channel, at, out_sd, out_st, y * scale * gated, here, WIDE)
            dxdts = ()
            ddts = ()
            for s in tl.static_range(3, -1, -1):
                t = start + s + down * (3 - 2 * s)
                tw = wide(t, WIDE)
                C_now = coefficient(C + tw * C_st, C_constant, n, t < seqlen, C_CONSTANT, DSTATE, NP)
                B_now = coefficient(B + tw * B_st, B_constant, n, t < seqlen, B_CONSTANT, DSTATE, NP)
                dh += dys[s][None, :] * C_now
                if B_CONSTANT:
                    sum_B += xdts[s][None, :] * dh
                elif dB0 is not None:
                    share = tl.sum(xdts[s][None, :] * dh, axis=1)
                    tl.store(dB + steps_row + tw * DSTATE + n, share, mask=(t < seqlen) & (n < DSTATE))
                dxdts = dxdts + (tl.sum(dh * B_now, axis=0),)
                dh = dh * decay_of(dts[s], decay_rate, DSTATE, NP)
                if s == 0:  # loaded again: one state less in registers
                    before = tl.load(scratch + part * (NP * BD) + in_scratch)
                    if seq_idx is not None:
                        before = tl.where(sames[0], before, 0.0)
                else:
                    before = entered[s]
                drate = dh * before  # of dt A
                sum_A += drate * dts[s][None, :]
                ddts = ddts + (tl.sum(drate * decay_rate, axis=0),)
                if seq_idx is not None:
                    dh = tl.where(sames[s], dh, 0.0)

            sum_D += dy * x
            dxdt = tile_of(dxdts[3], dxdts[2], dxdts[1], dxdts[0], down, BD)
            dx = dxdt * dt + skip * dy
            if du_partial is not None:
                tl.store(du_partial + d * plane + partial, dx, mask=here)
            elif du0 is not None:
                store_tile(du_at, channel, at, out_sd, out_st, dx, here, WIDE)
            ddt = tile_of(ddts[3], ddts[2], ddts[1], ddts[0], down, BD) * LN2 + dxdt * x
            if SOFTPLUS:
                ddt = ddt * sigmoid(raw)
            ddt = tl.where(valid, ddt, 0.0)
            sum_bias += ddt
            if ddelta_partial is not None:
                tl.store(ddelta_partial + d * plane + partial, ddt, mask=here)
            elif ddelta0 is not None:
                store_tile(ddelta_at, channel, at, out_sd, out_st, ddt, here, WIDE)

    # Sums over time: (batch, dim, dstate) and (batch, dim). In 32 bits where that does: these offsets take registers in the loops.
    first_channel = b * dim if WIDE else b.to(tl.int32) * dim
    row = first_channel * DSTATE
    if dA0 is not None:
        tl.store(pick(d, dA0, dA1) + (row + dn), sum_A, mask=states_mask)
    if B_CONSTANT and dB0 is not None:
        tl.store(dB + (row + dn), sum_B, mask=states_mask)
    if C_CONSTANT and dC0 is not None:
        tl.store(dC + (row + dn), sum_C, mask=states_mask)
    if dD0 is not None:
        tl.store(pick(d, dD0, dD1) + (first_channel + channel), tl.sum(sum_D, axis=1), mask=mask)
    if dbias0 is not None:
        tl.store(pick(d, dbias0, dbias1) + (first_channel + channel), tl.sum(sum_bias, axis=1), mask=mask)
    if dinitial is not None:
        tl.store(dinitial + (row + dn), dh, mask=states_mask & (d == 0))


@triton.jit(do_not_specialize=["blocks_d", "blocks_t"])
def scan_merge(
    y, du_partial, ddelta_partial, z, dout, out, dz, du, ddelta, dim, seqlen, blocks_d, blocks_t, plane, scale,
    in_sb, in_sd, in_st, z_sb, z_sd, z_st, out_sb, out_sd, out_st,
    BD: tl.constexpr, BT: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Grid: batch x blocks_d x blocks_t. out = scale (y of both directions) silu(z), its gradient to z, and the sums of du and ddelta."""
    pid = tl.program_id(0)
    b = (pid // (blocks_d * blocks_t)).to(tl.int64)
    channel = (pid // blocks_t % blocks_d) * BD + tl.arange(0, BD)
    at = (pid % blocks_t) * BT + tl.arange(0, BT)
    here = (channel < dim)[:, None] & (at < seqlen)[None, :]
    row = b * out_sb + offsets(channel, at, out_sd, out_st, WIDE)
    if y is not None:
        value = (tl.load(y + row, mask=here) + tl.load(y + plane + row, mask=here)) * scale
        opened = value
        if z is not None:
            gate = load_tile(z + b * z_sb, channel, at, z_sd, z_st, here, WIDE)
            opening = sigmoid(gate)
            opened = value * (gate * opening)
            if dz is not None:
                dy = load_tile(dout + b * in_sb, channel, at, in_sd, in_st, here, WIDE)
                store_tile(
                    dz + b * z_sb,
                    channel,
                    at,
                    z_sd,
                    z_st,
                    dy * value * opening * (1.0 + gate * (1.0 - opening)),
                    here,
                    WIDE,
                )
        if out is not None:
            store_tile(out + b * out_sb, channel, at, out_sd, out_st, opened, here, WIDE)
    if du_partial is not None:
        total = tl.load(du_partial + row, mask=here) + tl.load(du_partial + plane + row, mask=here)
        store_tile(du + b * out_sb, channel, at, out_sd, out_st, total, here, WIDE)
    if ddelta_partial is not None:
        total = tl.load(ddelta_partial + row, mask=here) + tl.load(ddelta_partial + plane + row, mask=here)
        store_tile(ddelta + b * out_sb, channel, at, out_sd, out_st, total, here, WIDE)
