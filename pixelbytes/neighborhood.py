"""3x3 windows: each token together with what was written before it, to its left and in the line above.

A sequence of ids is read as lines of a ragged table. A line ends after a row separator (`tokenizer.row_id`) or after a
block end (`tokenizer.end_id`); after a row separator the next line lies below this one, after a block end it stands
alone. With the token at column j of line i, the window is

    [ (i-1, j-1)  (i-1, j)  (i-1, j+1) ]
    [ (i,   j-1)  (i,   j)       0     ]
    [      0           0         0     ]

where a place outside the table is 0. Five cells carry something, four are always 0, and no cell lies after the token,
so that predicting the next centre never sees its answer. The separators belong to their line: the last pixel of a row
has the separator above it at its upper right.

The rule needs nothing but the two separators, so every sequence has windows, also one a model has made up: rows of
unequal length are a ragged table, pixels amid text are cells like others. On rows as the tokenizer writes them (header,
image, caption) it equals upstream's construction from the image's grid.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["Separators", "WindowBuilder", "windows"]


class Separators(Protocol):
    """What the windows need of a tokenizer."""

    @property
    def row_id(self) -> int: ...
    @property
    def end_id(self) -> int: ...
    @property
    def dtype(self) -> np.dtype[Any]: ...
    @property
    def vocab_size(self) -> int: ...


def _check_ids(ids: ArrayLike, tokenizer: Separators) -> NDArray[Any]:
    array = np.asarray(ids)
    if array.ndim != 1:
        raise ValueError(f"ids must have shape (L,), got {array.shape}")
    if array.size == 0:
        return array.astype(tokenizer.dtype)
    if array.dtype.kind not in "iu":
        raise TypeError(f"ids must be integers, got {array.dtype}")
    if array.min() < 0 or array.max() >= tokenizer.vocab_size:
        raise ValueError(f"ids must be 0..{tokenizer.vocab_size - 1}, got {array.min()}..{array.max()}")
    return array.astype(tokenizer.dtype)


def windows(ids: ArrayLike, tokenizer: Separators) -> NDArray[Any]:
    """Windows of a whole sequence at once.

    Args:
        ids: (L,) integers, any ids of the vocabulary in any order; L may be 0.
        tokenizer: gives `row_id`, `end_id`, `vocab_size` and the dtype of the result.

    Returns:
        (L, 3, 3) array of `tokenizer.dtype`.
    """
    flat = _check_ids(ids, tokenizer)
    length = len(flat)
    out = np.zeros((length, 3, 3), dtype=tokenizer.dtype)
    if length == 0:
        return out
    position = np.arange(length)
    closes = (flat == tokenizer.row_id) | (flat == tokenizer.end_id)
    opens = np.concatenate([[True], closes[:-1]])  # first token of a line
    starts = position[opens]  # (lines,)
    line = np.cumsum(opens) - 1  # (L,) line of each token
    start = starts[line]
    # The line above begins where the one before began, unless a block end lies between; then it is empty.
    below = np.zeros(len(starts), dtype=bool)
    below[1:] = flat[starts[1:] - 1] == tokenizer.row_id
    above = np.where(below, np.concatenate([[0], starts[:-1]]), starts)[line]
    column = position - start

    out[:, 1, 1] = flat
    has_left = column > 0
    out[has_left, 1, 0] = flat[position[has_left] - 1]
    for cell, shift in enumerate((-1, 0, 1)):
        source = above + column + shift
        inside = (source < start) & (column + shift >= 0)
        out[inside, 0, cell] = flat[source[inside]]
    return out


class WindowBuilder:
    """The same windows, one token at a time; `append` costs O(1) amortised. For generation.

    >>> builder = WindowBuilder(tokenizer)
    >>> builder.extend(prompt_ids)
    >>> builder.append(next_id)      # (3, 3) window of the new token
    >>> builder.array()              # (L, 3, 3) so far, equal to windows(all_ids, tokenizer)
    """

    def __init__(self, tokenizer: Separators):
        self._tokenizer = tokenizer
        self._out = np.zeros((64, 3, 3), dtype=tokenizer.dtype)
        self._length = 0
        self._start = 0  # where the current line begins
        self._above = 0  # where the line above begins; equal to _start when there is none

    def __len__(self) -> int:
        return self._length

    def append(self, token: int) -> NDArray[Any]:
        """Add one id and return a view of its (3, 3) window."""
        token = int(token)
        if not 0 <= token < self._tokenizer.vocab_size:
            raise ValueError(f"token must be 0..{self._tokenizer.vocab_size - 1}, got {token}")
        now = self._length
        if now == len(self._out):
            self._out = np.concatenate([self._out, np.zeros_like(self._out)])
        out, window = self._out, self._out[now]
        window[1, 1] = token
        if now > self._start:
            window[1, 0] = out[now - 1, 1, 1]
        column = now - self._start
        first = max(self._above, self._above + column - 1)
        for source in range(first, min(self._above + column + 2, self._start)):
            window[0, source - self._above - column + 1] = out[source, 1, 1]
        self._length = now + 1
        if token == self._tokenizer.end_id:
            self._start = self._above = self._length
        elif token == self._tokenizer.row_id:
            self._above, self._start = self._start, self._length
        return window

    def extend(self, ids: Iterable[int]) -> None:
        """Add ids one after another."""
        for token in ids:
            self.append(token)

    def ids(self) -> NDArray[Any]:
        """The ids so far, (L,), as a copy."""
        return self._out[: self._length, 1, 1].copy()

    def array(self) -> NDArray[Any]:
        """Windows so far, (L, 3, 3), as a copy."""
        return self._out[: self._length].copy()
