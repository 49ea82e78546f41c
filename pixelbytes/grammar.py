"""Which tokens may follow, so that what a model writes is a well-formed row."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pixelbytes.tokenizer import PixelBytesTokenizer


class Grammar:
    """Follows one row, id by id, and says which ids may come next.

    A row is a plan of parts, "image" (its header included) and "text" in either order. In an image the header's size
    is kept: pixels, then a row separator at the end of each line, the block end after the last.

    Args:
        tokenizer: the vocabulary.
        plan: parts in order, such as ("text", "image").
        max_side: largest height and width that a header may give.
        max_text: longest text in tokens; then its end is the only choice.
    """

    def __init__(
        self, tokenizer: PixelBytesTokenizer, plan: Sequence[str], *, max_side: int = 25, max_text: int = 200
    ) -> None:
        if unknown := set(plan) - {"image", "text"}:
            raise ValueError(f"plan: parts are 'image' and 'text', got {unknown.pop()!r}")
        self._tokenizer, self._max_side, self._max_text = tokenizer, max_side, max_text
        ids = np.arange(tokenizer.vocab_size)
        self._pixels = tokenizer.is_pixel(ids)
        special = np.isin(ids, [tokenizer.null_id, tokenizer.row_id, tokenizer.end_id])
        self._text = ~self._pixels & ~special
        self._plan = list(plan)
        self._length = 0  # tokens of the text so far
        self._header = ""
        self._size: tuple[int, int] | None = None  # of the image being drawn
        self._line = self._column = 0

    @property
    def done(self) -> bool:
        """True when every part is complete."""
        return not self._plan

    def allowed(self) -> NDArray[np.bool_]:
        """Which ids may come next, (V,)."""
        tokenizer = self._tokenizer
        if self.done:
            return self._only(tokenizer.end_id)
        if self._plan[0] == "text":
            if self._length >= self._max_text:
                return self._only(tokenizer.end_id)
            mask = self._text.copy()
            mask[tokenizer.end_id] = self._length > 0
            return mask
        if self._size is None:
            mask = np.zeros(tokenizer.vocab_size, dtype=bool)
            for character in _after_header(self._header, self._max_side):
                mask[tokenizer.end_id if character == "\n" else int(tokenizer.encode_text(character)[0])] = True
            return mask
        height, width = self._size
        if self._column < width:
            return self._pixels
        return self._only(tokenizer.end_id if self._line == height - 1 else tokenizer.row_id)

    def advance(self, token: int) -> None:
        """Take the id that came next. An id that is not allowed is a ValueError."""
        if not self.allowed()[token]:
            raise ValueError(f"token {token} cannot come here: {self._where()}")
        tokenizer = self._tokenizer
        if self.done:
            return
        if self._plan[0] == "text":
            self._length += 1
            if token == tokenizer.end_id:
                self._plan.pop(0)
                self._length = 0
        elif self._size is None:
            if token == tokenizer.end_id:
                height, width = self._header[1:-1].split(", ")
                self._size, self._line, self._column, self._header = (int(height), int(width)), 0, 0, ""
            else:
                self._header += tokenizer.decode_text([token])
        elif token == tokenizer.end_id:
            self._plan.pop(0)
            self._size = None
        elif token == tokenizer.row_id:
            self._line, self._column = self._line + 1, 0
        else:
            self._column += 1

    def _only(self, token: int) -> NDArray[np.bool_]:
        mask = np.zeros(self._tokenizer.vocab_size, dtype=bool)
        mask[token] = True
        return mask

    def _where(self) -> str:
        if self.done:
            return "the row is complete"
        if self._plan[0] == "text":
            return f"{self._length} tokens into the text"
        return f"in the header {self._header!r}" if self._size is None else f"line {self._line}, column {self._column}"


def _after_header(prefix: str, max_side: int) -> set[str]:
    """Characters that may follow `prefix` on the way to "(H, W)" and a newline, with H and W in 1..max_side."""
    if not prefix:
        return {"("}
    if prefix.endswith(")"):
        return {"\n"}
    if prefix.endswith(","):
        return {" "}
    digits = prefix[1:].split(", ")[-1]
    following = {d for d in "0123456789" if digits + d != "0" and int(digits + d) <= max_side}
    if digits:
        following.add(")" if ", " in prefix else ",")
    return following
