"""Colours: the 55 NES colours of PixelBytes, palette files, and the nearest palette colour by CIELAB distance.

A palette is a (P, 3) uint8 array of distinct sRGB colours, 1 <= P <= 256. Palette files are parsed, never executed.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["MAX_COLOURS", "NES55", "check_palette", "load_palette", "nearest", "rgb_to_lab", "white_index"]

MAX_COLOURS = 256  # palette indices are stored as uint8

# The 64 entries of the NES picture unit, in hardware order (four rows of sixteen); ten of them are the same black.
_NES64 = """
7c7c7c 0000fc 0000bc 4428bc 940084 a80020 a81000 881400 503000 007800 006800 005800 004058 000000 000000 000000
bcbcbc 0078f8 0058f8 6844fc d800cc e40058 f83800 e45c10 ac7c00 00b800 00a800 00a844 008888 000000 000000 000000
f8f8f8 3cbcfc 6888fc 9878f8 f878f8 f85898 f87858 fca044 f8b800 b8f818 58d854 58f898 00e8d8 787878 000000 000000
fcfcfc a4e4fc b8b8f8 d8b8f8 f8b8f8 f8a4c0 f0d0b0 fce0a8 f8d878 d8f878 b8f8b8 b8f8d8 00fcfc f8d8f8 000000 000000
"""
# The order of PixelBytes: black, then each hue from light to dark, then the two greys at the end.
_NES_ORDER = [0x0D, *(row + hue for hue in range(13) for row in (0x30, 0x20, 0x10, 0x00)), 0x3D, 0x2D]


def _from_hex(words: list[str]) -> NDArray[np.uint8]:
    return np.frombuffer(bytes.fromhex("".join(words)), dtype=np.uint8).reshape(-1, 3)


NES55: NDArray[np.uint8] = _from_hex(_NES64.split())[_NES_ORDER]
NES55.setflags(write=False)


def check_palette(palette: ArrayLike, name: str = "palette") -> NDArray[np.uint8]:
    """Return `palette` as a (P, 3) uint8 array; ValueError or TypeError naming `name` when it is not one."""
    array = np.asarray(palette)
    if array.ndim != 2 or array.shape[1] != 3 or not 1 <= len(array) <= MAX_COLOURS:
        raise ValueError(f"{name} must have shape (1..{MAX_COLOURS}, 3), got {array.shape}")
    if array.dtype.kind not in "iu":
        raise TypeError(f"{name} must hold integers, got {array.dtype}")
    if array.min() < 0 or array.max() > 255:
        raise ValueError(f"{name} must hold values 0..255, got {array.min()}..{array.max()}")
    if len(np.unique(array, axis=0)) != len(array):
        raise ValueError(f"{name} holds the same colour twice; each colour needs its own id")
    return array.astype(np.uint8)


def load_palette(path: str | Path) -> NDArray[np.uint8]:
    """Read a palette file by its suffix and return its distinct colours, in the order of their first appearance.

    `.gpl`: GIMP palette (text). `.hex`: one rrggbb a line, `#` allowed before it, lines starting with `;` or `//` are
    comments. `.pal`: 192 bytes, the 64 RGB entries of an NES picture unit; 55 of them are taken in the order of NES55,
    so that an id keeps its hue whichever .pal is used.

    Raises:
        ValueError: unknown suffix, or a file that is not what its suffix says (the message names file and line).
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix == ".pal":
        data = path.read_bytes()
        if len(data) != 192:
            raise ValueError(f"{path}: a .pal palette must be 192 bytes (64 RGB entries), got {len(data)}")
        colours = np.frombuffer(data, dtype=np.uint8).reshape(64, 3)[_NES_ORDER]
    elif suffix in (".gpl", ".hex"):
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not a text file: {error}") from error
        colours = np.array(_parse_gpl(path, lines) if suffix == ".gpl" else _parse_hex(path, lines), dtype=np.uint8)
    else:
        raise ValueError(f"{path}: unknown palette suffix {suffix!r}, wanted .gpl, .hex or .pal")
    if len(colours) == 0:
        raise ValueError(f"{path}: no colours in this palette")
    _, first = np.unique(colours, axis=0, return_index=True)
    return check_palette(colours[np.sort(first)], str(path))


def _parse_gpl(path: Path, lines: list[str]) -> list[list[int]]:
    if not lines or lines[0].strip() != "GIMP Palette":
        raise ValueError(f"{path}: line 1 must be 'GIMP Palette'")
    colours = []
    for number, line in enumerate(lines[1:], start=2):
        words = line.split()
        if not words or words[0].startswith("#") or words[0].rstrip(":") in ("Name", "Columns"):
            continue
        if len(words) < 3 or not all(w.isdecimal() and int(w) <= 255 for w in words[:3]):
            raise ValueError(f"{path}: line {number}: wanted three numbers 0..255, got {line.strip()!r}")
        colours.append([int(w) for w in words[:3]])
    return colours


def _parse_hex(path: Path, lines: list[str]) -> list[list[int]]:
    colours = []
    for number, line in enumerate(lines, start=1):
        word = line.strip()
        if not word or word.startswith((";", "//")):
            continue
        word = word.removeprefix("#")
        if len(word) != 6 or any(c not in "0123456789abcdefABCDEF" for c in word):
            raise ValueError(f"{path}: line {number}: wanted six hexadecimal digits, got {line.strip()!r}")
        colours.append(list(bytes.fromhex(word)))
    return colours


# sRGB (D65) to XYZ, IEC 61966-2-1; the rows are divided by the white point below.
_XYZ = np.array([[0.412453, 0.357580, 0.180423], [0.212671, 0.715160, 0.072169], [0.019334, 0.119193, 0.950227]])
_WHITE = np.array([0.95047, 1.0, 1.08883])


def rgb_to_lab(rgb: ArrayLike) -> NDArray[np.float64]:
    """Convert sRGB values 0..255, shape (..., 3), to CIELAB (D65, two-degree observer), float64 of the same shape."""
    value = np.asarray(rgb, dtype=np.float64) / 255
    linear = np.where(value > 0.04045, ((value + 0.055) / 1.055) ** 2.4, value / 12.92)
    ratio = linear @ _XYZ.T / _WHITE
    f = np.where(ratio > (6 / 29) ** 3, np.cbrt(ratio), ratio * (841 / 108) + 4 / 29)
    return np.stack([116 * f[..., 1] - 16, 500 * (f[..., 0] - f[..., 1]), 200 * (f[..., 1] - f[..., 2])], axis=-1)


def nearest(rgb: ArrayLike, palette: ArrayLike = NES55) -> NDArray[np.intp]:
    """Index of the palette colour nearest to each pixel by Euclidean distance in CIELAB.

    Args:
        rgb: (..., 3) uint8.
        palette: (P, 3) uint8; see `check_palette`.

    Returns:
        (...) integers in [0, P). Of colours equally far (to 1e-6) the first wins, so that the last bit of a cube root
        does not decide.
    """
    array = np.asarray(rgb)
    if array.ndim < 1 or array.shape[-1] != 3:
        raise ValueError(f"rgb must have shape (..., 3), got {array.shape}")
    if array.dtype != np.uint8:
        raise TypeError(f"rgb must be uint8, got {array.dtype}")
    colours = check_palette(palette)
    packed = array.astype(np.int32) @ np.array([65536, 256, 1], dtype=np.int32)  # (...)
    # A sprite has few distinct colours: measure each once.
    unique, inverse = np.unique(packed.ravel(), return_inverse=True)
    distinct = np.stack([unique >> 16, unique >> 8 & 255, unique & 255], axis=-1)  # (U, 3)
    index = np.empty(len(distinct), dtype=np.intp)
    lab = rgb_to_lab(colours)  # (P, 3)
    step = 1 << 14  # bounds the (U, P, 3) table for photographs
    for start in range(0, len(distinct), step):
        gap = rgb_to_lab(distinct[start : start + step])[:, None] - lab
        index[start : start + step] = np.round((gap * gap).sum(-1), 6).argmin(-1)
    return index[inverse].reshape(packed.shape)


def white_index(palette: ArrayLike = NES55) -> int:
    """Index of the palette colour nearest to pure white: the background of sprites."""
    return int(nearest(np.full((1, 3), 255, dtype=np.uint8), palette)[0])
