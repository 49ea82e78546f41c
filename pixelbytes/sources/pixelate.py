"""From any picture to a sprite: palette indices of at most `max_size` pixels a side."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image

from ..palette import NES55, check_palette, nearest
from ..tokenizer import image_array

__all__ = ["Method", "crop_to_content", "fit", "pixelate"]

Method = Literal["mode", "mean"]
_NEAR_WHITE = 240  # a pixel whose channels all reach this is background
_SAMPLES = 8  # samples a side within one sprite pixel, for "mode"


def crop_to_content(image: Image.Image | ArrayLike, name: str = "image") -> NDArray[np.uint8]:
    """The (H, W, 3) part of `image`, alpha laid on white, that holds everything not nearly white.

    Raises:
        ValueError: naming `name`, when there is no such part (fully transparent or white).
    """
    pixels = image_array(image, name)
    content = pixels.min(axis=2) < _NEAR_WHITE  # (H, W)
    rows, columns = np.flatnonzero(content.any(axis=1)), np.flatnonzero(content.any(axis=0))
    if len(rows) == 0:
        raise ValueError(f"{name}: no content, every pixel is transparent or white")
    return pixels[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def fit(height: int, width: int, max_size: int) -> tuple[int, int]:
    """(height, width) scaled so that the longer side is at most `max_size`; never enlarged, never below 1."""
    if max_size < 1:
        raise ValueError(f"max_size must be at least 1, got {max_size}")
    longer = max(height, width)
    if longer <= max_size:
        return height, width
    # Integers only: round(side * max_size / longer), half up.
    height, width = ((2 * side * max_size + longer) // (2 * longer) for side in (height, width))
    return max(height, 1), max(width, 1)


def pixelate(
    image: Image.Image | ArrayLike,
    max_size: int = 25,
    palette: ArrayLike = NES55,
    *,
    method: Method = "mode",
    name: str = "image",
) -> NDArray[np.uint8]:
    """Crop to the content, shrink in proportion, take the nearest palette colours.

    Args:
        image: PIL image or (H, W, 3|4) uint8 array; alpha is laid on white.
        max_size: longest side of the sprite in pixels; a smaller picture keeps its size.
        palette: (P, 3) uint8.
        method: how many pixels become one. "mode": the palette colour most of its samples have, which keeps outlines
            and flat areas of drawings crisp. "mean": the mean colour, for photographs.
        name: of the picture, for errors.

    Returns:
        (h, w) uint8 palette indices. Nothing in it is random.
    """
    if method not in ("mode", "mean"):
        raise ValueError(f"method must be 'mode' or 'mean', got {method!r}")
    colours = check_palette(palette)
    pixels = crop_to_content(image, name)
    height, width = fit(pixels.shape[0], pixels.shape[1], max_size)
    if (height, width) == pixels.shape[:2]:
        return nearest(pixels, colours).astype(np.uint8)
    picture = Image.fromarray(pixels)
    if method == "mean":
        small = picture.resize((width, height), Image.Resampling.BOX)
        return nearest(np.asarray(small), colours).astype(np.uint8)
    samples = picture.resize((width * _SAMPLES, height * _SAMPLES), Image.Resampling.NEAREST)
    index = nearest(np.asarray(samples), colours)
    cells = index.reshape(height, _SAMPLES, width, _SAMPLES).swapaxes(1, 2).reshape(height * width, -1)
    # Count each colour in each cell at once: one histogram over (cell, colour).
    flat = cells + np.arange(height * width)[:, None] * len(colours)
    counts = np.bincount(flat.ravel(), minlength=height * width * len(colours))
    return counts.reshape(height, width, len(colours)).argmax(axis=-1).astype(np.uint8)
