"""Rows made ready for models: a null start, the mirror image, and what kind of token each id is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pixelbytes.neighborhood import windows
from pixelbytes.tokenizer import PixelBytesTokenizer

KINDS = ("pixel", "text", "structure")


def start_length(targets: str, seq_length: int) -> int:
    """How many null windows stand before each row.

    One for targets="all", from which a causal model learns how rows begin; a whole window for "last", so that the first
    tokens of a row are targets as well.
    """
    return 1 if targets == "all" else seq_length


def with_start(rows: Sequence[NDArray[Any]], length: int) -> list[NDArray[Any]]:
    """Rows (L, 3, 3) -> (length + L, 3, 3), zeros first."""
    return [np.concatenate([np.zeros((length, 3, 3), dtype=row.dtype), row]) for row in rows]


def mirror_row(row: NDArray[Any], tokenizer: PixelBytesTokenizer) -> NDArray[Any]:
    """A row (L, 3, 3) whose images are turned left to right, its texts as they are; twice gives the row again."""
    ids = row[:, 1, 1]
    pixel = np.concatenate([[False], tokenizer.is_pixel(ids), [False]])
    edges = np.flatnonzero(pixel[1:] != pixel[:-1])  # start and stop of each run of pixels: the lines of the images
    start, stop = np.repeat(edges.reshape(-1, 2), np.diff(edges)[::2], axis=0).T  # (pixels,) each
    source = np.arange(len(ids))
    source[pixel[1:-1]] = start + stop - 1 - source[pixel[1:-1]]
    return windows(ids[source], tokenizer)


def token_kinds(ids: NDArray[Any], tokenizer: PixelBytesTokenizer) -> NDArray[np.int8]:
    """Place in KINDS of each id of a row (L,): pixels, bytes of texts, and structure: headers and all separators."""
    kinds = np.full(len(ids), KINDS.index("structure"), dtype=np.int8)
    for block in tokenizer.split(ids):
        if block.kind == "text" and block.size is None:
            kinds[block.start : block.stop] = KINDS.index("text")
    kinds[tokenizer.is_pixel(ids)] = KINDS.index("pixel")
    kinds[np.isin(ids, [tokenizer.null_id, tokenizer.row_id, tokenizer.end_id])] = KINDS.index("structure")
    return kinds
