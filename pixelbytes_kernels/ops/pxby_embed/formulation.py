"""Which of the two ways to compute pxby_embed is cheaper, from sizes alone."""

from __future__ import annotations

TAPS = 49  # pairs of neighbouring cells in a 3x3 window: products of an E x E tap matrix per window


def folded_is_cheaper(tokens: int, vocab: int, width: int, dim: int) -> bool:
    """True: build a table of (cell, id) rows and sum nine of them per token; False: compute the formula per token.

    Counts multiply-adds. The table costs the convolution folded into the projection, then one product with the
    embeddings; a token then costs nine rows. Each weight of the projection is read once by both.
    """
    direct = tokens * (TAPS * width * width + 9 * width * dim)
    folded = TAPS * width * width * dim + vocab * 9 * width * dim + tokens * 9 * dim
    return folded < direct
