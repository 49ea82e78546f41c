"""Small rows for the tests of the model side."""

from __future__ import annotations

import numpy as np
import pytest

from pixelbytes.neighborhood import windows
from pixelbytes.tokenizer import PixelBytesTokenizer


@pytest.fixture
def tokenizer():
    return PixelBytesTokenizer()


@pytest.fixture
def rows(tokenizer):
    """24 rows of small sprites with captions, both orders."""
    draw = np.random.default_rng(0)
    made = []
    for index in range(24):
        picture = np.full((4 + index % 2, 5, 3), 255, np.uint8)
        picture[1:3, 1:4] = tokenizer.palette[10 + draw.integers(4)]
        caption = ("red cat", "blue dog", "a fish")[index % 3]
        order = ("image-first", "text-first")[index % 2]
        made.append(windows(tokenizer.encode(picture, caption, order=order), tokenizer))
    return made
