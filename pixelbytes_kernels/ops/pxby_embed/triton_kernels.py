"""Triton kernels of pxby_embed; see `triton.py` for how they follow each other.

Letters: V ids, E channels of an embedding, D width of the output, N tokens. What goes into the LayerNorm is
shift + the sum over the nine cells p of table[id_p, p], with

    folded = mixing @ projection.T      (9 E + 1, D); its last row is the shift by the convolution's bias
    table = emb @ folded[:-1]           (V, 9, D)

mixing (9 E + 1, 9 E) is convolution and gate as a matrix: row (channel, cell) in, column (channel, cell) out.
No atomics: sums go over fixed runs in order. Every kernel owns whole rows of D, or tiles of them.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def path_weights(alpha, p, mask, CONV: tl.constexpr, GATE: tl.constexpr):
    """What multiplies the embedding and its convolution at the cells p."""
    if GATE:
        keep = 1.0 / (1.0 + tl.exp(-tl.load(alpha + p, mask=mask, other=0.0).to(tl.float32)))
    elif CONV:
        keep = tl.zeros_like(p).to(tl.float32) + 0.5
    else:
        keep = tl.zeros_like(p).to(tl.float32) + 1.0
    return keep, 1.0 - keep


@triton.jit
def mixing_kernel(
    conv_weight, conv_bias, alpha, mixing, width, tiles,
    CONV: tl.constexpr, BIAS: tl.constexpr, GATE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program writes a tile of one row of the mixing."""
    row = tl.program_id(0).to(tl.int64) // tiles
    column = tl.program_id(0) % tiles * BLOCK + tl.arange(0, BLOCK)
    mask = column < 9 * width
    p_in = row % 9
    channel, p = column // 9, column % 9
    keep, mix = path_weights(alpha, p, mask, CONV, GATE)
    value = tl.where(column == row, keep, 0.0)
    if CONV:
        dy, dx = p_in // 3 - p // 3 + 1, p_in % 3 - p % 3 + 1
        reached = mask & (row < 9 * width) & (dy >= 0) & (dy < 3) & (dx >= 0) & (dx < 3)
        at = conv_weight + (channel.to(tl.int64) * width + row // 9) * 9 + dy * 3 + dx
        value += mix * tl.load(at, mask=reached, other=0.0).to(tl.float32)
        if BIAS:
            bias = tl.load(conv_bias + channel, mask=mask & (row == 9 * width), other=0.0).to(tl.float32)
            value += mix * bias
    tl.store(mixing + row * (9 * width) + column, value, mask=mask)


@triton.jit
def mixing_backward_kernel(
    dmixing, dshift, conv_weight, conv_bias, alpha, dconv, dbias, dgate, width, tiles,
    CONV: tl.constexpr, BIAS: tl.constexpr, GATE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program owns a tile of one channel out: of its rows of dconv (E, E, 9), and a part of the gate's gradient, dgate (E * tiles, 9).

    The first tile also has dbias (E) and what the gate gets otherwise. dshift: the last row of dmixing.
    """
    out = tl.program_id(0).to(tl.int64) // tiles
    tile = tl.program_id(0) % tiles
    j = tile * BLOCK + tl.arange(0, BLOCK)  # (channel in, tap)
    mask = j < 9 * width
    channel, tap = j // 9, j % 9
    size = 9 * width
    total = tl.zeros((BLOCK,), tl.float32)
    bias, dbias_total = 0.0, 0.0
    weight = total
    if CONV:
        weight = tl.load(conv_weight + out * size + j, mask=mask, other=0.0).to(tl.float32)
        if BIAS:
            bias = tl.load(conv_bias + out, mask=tile == 0, other=0.0).to(tl.float32)
    for p in tl.static_range(9):
        keep, mix = path_weights(alpha, tl.full((1,), p, tl.int32), True, CONV, GATE)
        dkeep = tl.load(dmixing + (out * 9 + p) * (size + 1), mask=tile == 0, other=0.0)
        dmix = 0.0
        if CONV:
            y, x = p // 3 + tap // 3 - 1, p % 3 + tap % 3 - 1
            reached = mask & (y >= 0) & (y < 3) & (x >= 0) & (x < 3)
            at = dmixing + (channel.to(tl.int64) * 9 + y * 3 + x) * size + out * 9 + p
            d = tl.load(at, mask=reached, other=0.0)
            total += mix * d
            dmix += tl.sum(tl.where(reached, weight * d, 0.0))
            if BIAS:
                d = tl.load(dshift + out * 9 + p, mask=tile == 0, other=0.0)
                dbias_total += tl.sum(mix * d)
                dmix += bias * d
        if GATE:
            tl.store(dgate + (out * tiles + tile) * 9 + p + tl.arange(0, 1), keep * mix * (dkeep - dmix))
    if CONV:
        tl.store(dconv + out * size + j, total, mask=mask)
        if BIAS:
            tl.store(dbias + out, dbias_total, mask=tile == 0)


@triton.jit
def gathered(
    tokens, table, shift, n, seqlen, count, vocab, dim, t_batch, t_time, t_row, t_column, column,
    BM: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """What goes into the LayerNorm for the tokens n: (BM, BD), NaN in the row of an id outside the vocabulary, and those rows (BM).

    Such an id reads nothing.
    """
    cell = tokens + n // seqlen * t_batch + n % seqlen * t_time
    inside, width = n < count, (column < dim)[None, :]
    pre = tl.zeros((BM, BD), tl.float32) + tl.load(shift + column, mask=column < dim, other=0.0)[None, :]
    valid = inside
    for p in tl.static_range(9):
        token = tl.load(cell + (p // 3) * t_row + (p % 3) * t_column, mask=inside, other=0).to(tl.int64)
        known = inside & (token >= 0) & (token < vocab)
        valid = valid & known
        row = table + (token * 9 + p) * dim
        pre += tl.load(row[:, None] + column[None, :], mask=known[:, None] & width, other=0.0).to(tl.float32)
    return tl.where((valid | (n >= count))[:, None], pre, float("nan")), valid


@triton.jit
def normalised(pre, column, dim, eps):
    """(pre - mean) / deviation, and 1 / deviation (BM, 1); columns beyond dim do not count."""
    mean = tl.sum(tl.where((column < dim)[None, :], pre, 0.0), axis=1)[:, None] / dim
    centred = tl.where((column < dim)[None, :], pre - mean, 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=1)[:, None] / dim + eps)
    return centred * scale, scale


@triton.jit
def forward_kernel(
    tokens, table, shift, norm_weight, norm_bias, out, seqlen, count, vocab, dim, t_batch, t_time, t_row, t_column, eps,
    BM: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """A program owns BM tokens: nine rows of the table each, LayerNorm, one store."""
    n = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    column = tl.arange(0, BD)
    pre, valid = gathered(
        tokens, table, shift, n, seqlen, count, vocab, dim, t_batch, t_time, t_row, t_column, column, BM, BD
    )
    hat, scale = normalised(pre, column, dim, eps)
    weight = tl.load(norm_weight + column, mask=column < dim, other=0.0).to(tl.float32)
    bias = tl.load(norm_bias + column, mask=column < dim, other=0.0).to(tl.float32)
    value = hat * weight[None, :] + bias[None, :]
    at = out + n[:, None] * dim + column[None, :]
    tl.store(at, value.to(out.dtype.element_ty), mask=(n < count)[:, None] & (column < dim)[None, :])


@triton.jit
def backward_kernel(
    tokens, table, shift, norm_weight, dout, dpre, keys, sums, seqlen, count, vocab, dim, blocks,
    t_batch, t_time, t_row, t_column, g_batch, g_time, g_column, eps, BM: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """A program owns `blocks` times BM tokens: dpre (N, D), the table row of each cell as a key, (9, N), and its sums.

    sums: (programs, 3, D), of the gradients of norm_weight and norm_bias, and of dpre. The key of an unknown id is 9 V.
    """
    column = tl.arange(0, BD)
    weight = tl.load(norm_weight + column, mask=column < dim, other=0.0).to(tl.float32)[None, :]
    dweight = tl.zeros((BM, BD), tl.float32)
    dbias = tl.zeros((BM, BD), tl.float32)
    total = tl.zeros((BM, BD), tl.float32)
    for block in range(blocks):
        n = (tl.program_id(0).to(tl.int64) * blocks + block) * BM + tl.arange(0, BM)
        pre, valid = gathered(
            tokens, table, shift, n, seqlen, count, vocab, dim, t_batch, t_time, t_row, t_column, column, BM, BD
        )
        hat, scale = normalised(pre, column, dim, eps)
        mask = (n < count)[:, None] & (column < dim)[None, :]
        at = dout + (n // seqlen * g_batch + n % seqlen * g_time)[:, None] + (column.to(tl.int64) * g_column)[None, :]
        g = tl.load(at, mask=mask, other=0.0).to(tl.float32)
        scaled = g * weight
        mean = tl.sum(scaled, axis=1)[:, None] / dim
        slope = tl.sum(scaled * hat, axis=1)[:, None] / dim
        d = tl.where(mask, scale * (scaled - mean - hat * slope), 0.0)
        tl.store(dpre + n[:, None] * dim + column[None, :], d, mask=mask)
        dweight += tl.where(mask, g * hat, 0.0)
        dbias += g
        total += d
        cell = tokens + n // seqlen * t_batch + n % seqlen * t_time
        for p in tl.static_range(9):
            token = tl.load(cell + (p // 3) * t_row + (p % 3) * t_column, mask=n < count, other=0).to(tl.int64)
            key = tl.where((token >= 0) & (token < vocab), token * 9 + p, vocab * 9)
            tl.store(keys + (tl.zeros_like(n) + count) * p + n, key.to(keys.dtype.element_ty), mask=n < count)
    to = sums + tl.program_id(0).to(tl.int64) * 3 * dim + column
    tl.store(to, tl.sum(dweight, axis=0), mask=column < dim)
    tl.store(to + dim, tl.sum(dbias, axis=0), mask=column < dim)
    tl.store(to + 2 * dim, tl.sum(total, axis=0), mask=column < dim)


@triton.jit
def segment_kernel(
    rows, order, keys, starts, parts, entries, period, dim, tiles, known, ONES: tl.constexpr, RUN: tl.constexpr,
    BR: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """A program owns the sorted entries [chunk * RUN, chunk * RUN + RUN) and a tile of columns: the sum of the rows of each key in them.

    Entry i stands for the row order[i] % period. Key k in chunk c goes to row c + k of `parts`: the larger of any two
    pairs in sorted order has the larger sum, so no two meet. With ONES, a key that all `period` rows have is left out.
    """
    pid = tl.program_id(0).to(tl.int64)
    chunk = pid // tiles
    column = pid % tiles * BD + tl.arange(0, BD)
    first = chunk * RUN
    last = tl.minimum(first + RUN, entries)
    while first < last:
        key = tl.load(keys + first).to(tl.int64)
        end = last
        wanted = key < known
        if wanted:
            begin, stop = tl.load(starts + key), tl.load(starts + key + 1)
            end = tl.minimum(stop, last)
            if ONES:
                wanted = stop - begin < period
        if wanted:
            total = tl.zeros((BR, BD), tl.float32)
            for block in range(tl.cdiv(end - first, BR)):
                i = first + block * BR + tl.arange(0, BR)
                row = tl.load(order + i, mask=i < end, other=0) % period
                mask = (i < end)[:, None] & (column < dim)[None, :]
                total += tl.load(rows + row[:, None] * dim + column[None, :], mask=mask, other=0.0)
            tl.store(parts + (chunk + key) * dim + column, tl.sum(total, axis=0), mask=column < dim)
        first = end


@triton.jit
def combine_kernel(
    parts, starts, whole, out, period, dim, tiles, ONES: tl.constexpr, RUN: tl.constexpr, BR: tl.constexpr,
    BD: tl.constexpr,
):  # fmt: skip
    """A program owns one key and a tile of columns: its parts in order, zeros if it does not occur; `whole` (D) if every row has it."""
    pid = tl.program_id(0).to(tl.int64)
    key = pid // tiles
    column = pid % tiles * BD + tl.arange(0, BD)
    begin, stop = tl.load(starts + key), tl.load(starts + key + 1)
    first = begin // RUN
    last = tl.where(stop > begin, (stop - 1) // RUN + 1, first)
    if ONES and stop - begin == period:
        last = first
    total = tl.zeros((BR, BD), tl.float32)
    for block in range(tl.cdiv(last - first, BR)):
        c = first + block * BR + tl.arange(0, BR)
        mask = (c < last)[:, None] & (column < dim)[None, :]
        total += tl.load(parts + (c + key)[:, None] * dim + column[None, :], mask=mask, other=0.0)
    value = tl.sum(total, axis=0)
    if ONES:
        every = tl.load(whole + column, mask=(column < dim) & (stop - begin == period), other=0.0)
        value = tl.where(stop - begin == period, every, value)
    tl.store(out + key * dim + column, value, mask=column < dim)
