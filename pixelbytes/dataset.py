"""Training windows from rows of 3x3 tokens, and the corpora the rows come from.

`PxByDataset` keeps all rows in one flat array of small integers and cuts windows from it when they are asked for.
`load_embedded` and `load_folder` give a `Corpus`: rows, names, captions and images of the same items.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset

from ._files import read_json
from .neighborhood import windows
from .rows import mirror_row
from .tokenizer import Order, PixelBytesTokenizer, image_array

__all__ = ["IGNORE", "Corpus", "PxByDataset", "load_embedded", "load_folder", "split_indices", "split_rows"]

IGNORE = -100  # target of a position that has none; cross-entropy's ignore_index
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp")
# What tells left from right in a caption; "droits" are rights.
SIDES = re.compile(r"\b(?:(?:left|right)(?:wards?)?|gauches?|droite?|droites)\b", re.IGNORECASE)
T = TypeVar("T")


def _row(row: Any, name: str, vocab_size: int | None) -> NDArray[Any]:
    """One row as a (L, 3, 3) integer array with L >= 1."""
    try:
        array = np.asarray(row)
    except ValueError:  # nested lists of unequal length
        raise ValueError(f"{name} must have shape (L, 3, 3), got nested lists of unequal length") from None
    if array.dtype.kind not in "iu":
        if array.dtype == object:
            raise TypeError(f"{name} must hold integers in shape (L, 3, 3), got mixed values")
        if array.size:
            raise TypeError(f"{name} must hold integers, got {array.dtype}")
    if array.ndim != 3 or array.shape[1:] != (3, 3) or len(array) == 0:
        raise ValueError(f"{name} must have shape (L, 3, 3) with L >= 1, got {array.shape}")
    limit = np.iinfo(np.int32).max if vocab_size is None else vocab_size
    if array.min() < 0 or array.max() >= limit:
        wanted = "0 or more" if vocab_size is None else f"0..{vocab_size - 1}"
        raise ValueError(f"{name} must hold ids {wanted}, got {array.min()}..{array.max()}")
    return array


class PxByDataset(Dataset[tuple[Tensor, Tensor]]):
    """Windows of `seq_length` tokens and what follows them.

    targets="last" (upstream's): one target a window, the centre of the token after it. Windows start at 0, stride,
    2 stride, ... below max(L - seq_length, 1); in a row too short for a window and its target the last token repeats.

    targets="all" (causal models only): each position's target is the centre of the next token. Windows start at 0,
    stride, ... until every token but a row's first has been a target; with stride = seq_length each is one exactly
    once. A window that runs past its row is filled with null windows at the end, whose targets are IGNORE (-100).

    Args:
        rows: sequence of (L, 3, 3) integer arrays or nested lists (upstream's `pixelbyte` column), L >= 1.
        seq_length: tokens in a window, >= 1.
        stride: distance between windows, >= 1.
        targets: "last" or "all".
        vocab_size: when given, ids must lie below it.

    An item is (input (seq_length, 3, 3) of uint8, int16 or int32, the smallest that holds the ids; target int64, a
    scalar for "last" and (seq_length,) for "all"). `batch(indices)` gathers many at once.
    """

    def __init__(
        self,
        rows: Sequence[Any],
        seq_length: int = 256,
        stride: int = 64,
        targets: Literal["last", "all"] = "last",
        *,
        vocab_size: int | None = None,
    ):
        for name, value in (("seq_length", seq_length), ("stride", stride)):
            if isinstance(value, bool) or not isinstance(value, int | np.integer):
                raise TypeError(f"{name} must be an integer, got {type(value).__name__}")
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if targets not in ("last", "all"):
            raise ValueError(f"targets must be 'last' or 'all', got {targets!r}")
        if len(rows) == 0:
            raise ValueError("rows is empty: a data set needs at least one row")
        self.seq_length, self.stride, self.targets = int(seq_length), int(stride), targets
        arrays = [_row(row, f"rows[{i}]", vocab_size) for i, row in enumerate(rows)]
        highest = max(int(array.max()) for array in arrays)
        dtype = next(t for t in (np.uint8, np.int16, np.int32) if highest <= np.iinfo(t).max)
        lengths = np.array([len(array) for array in arrays])
        # With null windows behind the last row, so that a window may be read past the end of its own.
        self._flat = np.zeros((int(lengths.sum()) + self.seq_length, 3, 3), dtype=dtype)
        np.concatenate(arrays, out=self._flat[: int(lengths.sum())], casting="unsafe")
        row_starts = np.cumsum(lengths) - lengths

        if targets == "last":
            counts = -(-np.maximum(lengths - self.seq_length, 1) // self.stride)
        else:
            counts = 1 + -(-np.maximum(lengths - 1 - self.seq_length, 0) // self.stride)
        row = np.repeat(np.arange(len(lengths)), counts)  # (windows,)
        number = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
        self._start = row_starts[row] + number * self.stride  # (windows,) first token of each, in _flat
        self._stop = (row_starts + lengths)[row]  # (windows,) end of its row

    def __len__(self) -> int:
        return len(self._start)

    def batch(self, indices: ArrayLike) -> tuple[Tensor, Tensor]:
        """Windows `indices` (B,) as input (B, seq_length, 3, 3) and target (B,) or (B, seq_length) int64."""
        index = np.asarray(indices)
        if index.ndim != 1 or index.size == 0 or index.dtype.kind not in "iu":
            raise ValueError(f"indices must be (B,) integers with B >= 1, got {index.dtype} of shape {index.shape}")
        if index.min() < -len(self) or index.max() >= len(self):
            raise IndexError(f"indices must be 0..{len(self) - 1}, got {index.min()}..{index.max()}")
        start, last = self._start[index], self._stop[index] - 1
        # Every window and the token after it, from any token on, as one run of memory: rows are copied whole.
        shape = (len(self._flat) - self.seq_length, (self.seq_length + 1) * 9)
        strides = (self._flat.strides[0], self._flat.itemsize)
        spans = np.lib.stride_tricks.as_strided(self._flat, shape, strides, writeable=False)
        span = spans[start].reshape(len(index), self.seq_length + 1, 3, 3)
        short = start + self.seq_length > last  # these run past their row
        if self.targets == "last":
            for i in np.flatnonzero(short):
                span[i, last[i] - start[i] + 1 :] = self._flat[last[i]]
            x, y = np.ascontiguousarray(span[:, :-1]), span[:, -1, 1, 1].astype(np.int64)
        else:
            x = np.ascontiguousarray(span[:, :-1])
            y = span[:, 1:, 1, 1].astype(np.int64)
            for i in np.flatnonzero(short):
                x[i, last[i] - start[i] + 1 :] = 0
                y[i, last[i] - start[i] :] = IGNORE
        return torch.from_numpy(x), torch.from_numpy(y)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        x, y = self.batch([index])
        return x[0], y[0]

    def __getitems__(self, indices: list[int]) -> list[tuple[Tensor, Tensor]]:
        """What a DataLoader asks for a batch: one gather, then views of it."""
        x, y = self.batch(indices)
        return list(zip(x, y, strict=True))


def split_indices(
    n: int, fractions: Sequence[float] = (0.8, 0.1, 0.1), seed: int = 0, groups: ArrayLike | None = None
) -> list[NDArray[np.intp]]:
    """Indices 0..n-1 dealt to parts at random, each part in ascending order.

    Args:
        n: number of items.
        fractions: share of each part; they add up to 1. Every part with a share above 0 gets at least one group.
        seed: of the draw.
        groups: (n,) integers; items of one group stay together. Default: each item is a group.
    """
    shares = np.asarray(fractions, dtype=np.float64)
    if shares.ndim != 1 or len(shares) == 0 or shares.min() < 0 or not abs(shares.sum() - 1) <= 1e-6:
        raise ValueError(f"fractions must be shares >= 0 that add up to 1, got {tuple(fractions)}")
    group = np.arange(n) if groups is None else np.asarray(groups)
    if group.shape != (n,):
        raise ValueError(f"groups must have shape ({n},), got {group.shape}")
    distinct, of_item = np.unique(group, return_inverse=True)
    wanted = int((shares > 0).sum())
    if len(distinct) < wanted:
        raise ValueError(f"{len(distinct)} items are too few for a split into {wanted} parts")
    sizes = np.where(shares > 0, np.maximum(np.floor(shares * len(distinct) + 1e-9), 1), 0).astype(int)
    sizes[sizes.argmax()] += len(distinct) - sizes.sum()  # the largest part takes up what rounding left
    part = np.empty(len(distinct), dtype=int)
    part[np.random.default_rng(seed).permutation(len(distinct))] = np.repeat(np.arange(len(sizes)), sizes)
    return [np.flatnonzero(part[of_item] == p) for p in range(len(sizes))]


def split_rows(
    rows: Sequence[T],
    fractions: Sequence[float] = (0.8, 0.1, 0.1),
    seed: int = 0,
    groups: ArrayLike | None = None,
) -> tuple[list[T], ...]:
    """Rows dealt to train, validation and test, whole rows only; see `split_indices`."""
    return tuple([rows[i] for i in part] for part in split_indices(len(rows), fractions, seed, groups))


class LazyImages(Sequence[Image.Image]):
    """Images made when asked for: `make[i]()` gives image i."""

    def __init__(self, make: Sequence[Callable[[], Image.Image]]):
        self._make = list(make)

    def __len__(self) -> int:
        return len(self._make)

    def __getitem__(self, index: Any) -> Any:
        return LazyImages(self._make[index]) if isinstance(index, slice) else self._make[index]()


@dataclass
class Corpus:
    """Items and the rows made of them.

    rows: (L, 3, 3) arrays; items: (rows,) number of the item each row shows (two rows an item with order "both");
    names, captions, images: one each item, captions as the source has them, images decoded when indexed;
    meta: source, licence, palette, tokenizer kind, order, and how many characters the vocabulary altered.
    """

    rows: list[NDArray[Any]]
    names: list[str]
    captions: list[str]
    images: Sequence[Image.Image]
    meta: dict[str, Any]
    items: NDArray[np.intp] = field(default_factory=lambda: np.empty(0, dtype=np.intp))

    def __len__(self) -> int:
        return len(self.names)

    def subset(self, items: ArrayLike) -> Corpus:
        """The corpus of some of the items, given by their numbers."""
        keep = [int(i) for i in np.asarray(items).ravel()]
        rows_of: dict[int, list[int]] = {i: [] for i in keep}
        for row, item in enumerate(self.items.tolist()):
            if item in rows_of:
                rows_of[item].append(row)
        order = [(new, row) for new, item in enumerate(keep) for row in rows_of[item]]
        return Corpus(
            rows=[self.rows[row] for _, row in order],
            names=[self.names[i] for i in keep],
            captions=[self.captions[i] for i in keep],
            images=LazyImages([lambda i=i: self.images[i] for i in keep]),  # type: ignore[misc]
            meta=self.meta,
            items=np.array([new for new, _ in order], dtype=np.intp),
        )

    def split(self, fractions: Sequence[float] = (0.8, 0.1, 0.1), seed: int = 0) -> tuple[Corpus, ...]:
        """Train, validation and test corpora, split by item."""
        return tuple(self.subset(part) for part in split_indices(len(self), fractions, seed))

    def mirrored(self, tokenizer: PixelBytesTokenizer) -> Corpus:
        """The mirror images of the items, with the same captions; without those whose caption names a side.

        The words are left, right, leftward(s), rightward(s), gauche(s), droit and droite(s). Symmetric items are among
        them, so that they keep their weight in a training set of items and mirror images.
        """
        kept = self.subset([i for i, caption in enumerate(self.captions) if not SIDES.search(caption)])
        rows = [mirror_row(row, tokenizer) for row in kept.rows]
        images = LazyImages([lambda i=i: ImageOps.mirror(kept.images[i]) for i in range(len(kept))])  # type: ignore[misc]
        return replace(kept, rows=rows, images=images)


CorpusOrder = Literal["image-first", "text-first", "both"]


def _corpus(
    grids: Sequence[NDArray[Any]],
    captions: list[str],
    names: list[str],
    images: Sequence[Image.Image],
    tokenizer: PixelBytesTokenizer,
    order: CorpusOrder,
    meta: dict[str, Any],
) -> Corpus:
    if order not in ("image-first", "text-first", "both"):
        raise ValueError(f"order must be 'image-first', 'text-first' or 'both', got {order!r}")
    orders: tuple[Order, ...] = ("image-first", "text-first") if order == "both" else (order,)
    rows: list[NDArray[Any]] = []
    altered = 0
    for grid, caption in zip(grids, captions, strict=True):
        altered += tokenizer.normalise(caption)[1]
        text = tokenizer.encode_text(caption, errors="normalise")
        rows += [windows(tokenizer.encode_ids(grid, text, order=o), tokenizer) for o in orders]
    characters = sum(map(len, captions))
    more = {"tokenizer": tokenizer.kind, "order": order, "altered_characters": altered, "characters": characters}
    return Corpus(rows, names, captions, images, meta | more, np.repeat(np.arange(len(names)), len(orders)))


def _check_limit(limit: int | None) -> None:
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}")


def load_embedded(
    tokenizer: PixelBytesTokenizer, limit: int | None = None, *, order: CorpusOrder = "image-first"
) -> Corpus:
    """The OpenMoji set that comes with the package: sprites of at most 25 x 25 pixels, French and English captions.

    Args:
        tokenizer: "compat" spells the captions in lower-case ASCII (the count is in `meta`), "bytes" keeps them.
        limit: at most so many items, spread evenly over the set; default all.
        order: "image-first" (upstream's rows), "text-first", or "both", two rows an item.
    """
    from .sources.pack import EMBEDDED

    return load_pack(EMBEDDED, tokenizer, limit, order=order)


def load_pack(
    path: str | Path, tokenizer: PixelBytesTokenizer, limit: int | None = None, *, order: CorpusOrder = "image-first"
) -> Corpus:
    """A packed set written by `build(pack=...)`; arguments as for `load_embedded`."""
    from .sources.pack import read_pack

    _check_limit(limit)
    pack = read_pack(path)
    keep = range(len(pack.names))
    if limit is not None and limit < len(keep):
        keep = np.linspace(0, len(pack.names) - 1, limit).astype(int).tolist()
    # The pack's colours in the tokenizer's palette: the same index when the palettes agree.
    id_of = tokenizer.encode_image(pack.palette[None])[0]  # (P,)
    return _corpus(
        [id_of[pack.grids[i]] for i in keep],
        [pack.captions[i] for i in keep],
        [pack.names[i] for i in keep],
        LazyImages([lambda i=i: Image.fromarray(pack.palette[pack.grids[i]]) for i in keep]),  # type: ignore[misc]
        tokenizer,
        order,
        dict(pack.meta),
    )


def read_image(path: str | Path) -> Image.Image:
    """An image file as RGB, alpha laid on white; ValueError naming the file when it cannot be decoded."""
    try:
        with Image.open(path) as image:
            image.load()
    # What Pillow's decoders raise for truncated or damaged files.
    except (OSError, SyntaxError, ValueError, LookupError, struct.error, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: not a readable image: {error}") from error
    return Image.fromarray(image_array(image, str(path)))


def list_images(folder: Path) -> list[Path]:
    """Image files of a folder in the order of their names; ValueError when it is none or has none."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: not a folder")
    found = sorted(p for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES and not p.name.startswith("."))
    if not found:
        raise ValueError(f"{folder}: no images in this folder ({', '.join(IMAGE_SUFFIXES)})")
    stems: dict[str, Path] = {}
    for path in found:
        if path.stem in stems:
            raise ValueError(f"{path}: same name as {stems[path.stem].name}; one image a name")
        stems[path.stem] = path
    return found


def read_caption(image_path: Path) -> str:
    """The caption in NAME.txt beside NAME.png, white space folded to single spaces; ValueError naming the file."""
    path = image_path.with_suffix(".txt")
    try:
        text = " ".join(path.read_text(encoding="utf-8-sig").split())
    except FileNotFoundError:
        raise ValueError(f"{path}: caption missing for {image_path.name}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: caption is not UTF-8: {error}") from error
    if not text:
        raise ValueError(f"{path}: caption is empty")
    return text


def load_folder(
    path: str | Path,
    tokenizer: PixelBytesTokenizer,
    limit: int | None = None,
    *,
    order: CorpusOrder = "image-first",
    max_side: int = 64,
    strict: bool = True,
) -> Corpus:
    """A data folder of NAME.png (or another image format) and NAME.txt, as `pixelbytes build` writes it.

    Args:
        path: the folder; `card.json` in it, if any, becomes the corpus' `meta`.
        tokenizer, order: as for `load_embedded`.
        limit: at most so many items, the first by name.
        max_side: images with a longer side are refused: one pixel is one token. Shrink them with `pixelbytes build`.
        strict: raise ValueError for the first bad file; else leave its item out and list it in meta["skipped"].
    """
    _check_limit(limit)
    folder = Path(path)
    grids: list[NDArray[Any]] = []
    captions: list[str] = []
    names: list[str] = []
    kept: list[Path] = []
    skipped: dict[str, str] = {}
    for file in list_images(folder):
        if limit is not None and len(names) == limit:
            break
        try:
            caption, image = read_caption(file), read_image(file)
            if max(image.size) > max_side:
                raise ValueError(
                    f"{file}: {image.width} x {image.height} pixels, at most {max_side} a side can be tokens; "
                    "run 'pixelbytes build --source folder' on this folder first"
                )
        except ValueError as error:
            if strict:
                raise
            skipped[file.name] = str(error)
            continue
        grids.append(tokenizer.encode_image(image))
        captions.append(caption)
        names.append(file.stem)
        kept.append(file)
    if not names:
        raise ValueError(f"{folder}: no usable item; first error: {next(iter(skipped.values()))}")
    meta: dict[str, Any] = {"source": str(folder), "licence": "unknown"}
    card = folder / "card.json"
    if card.exists():
        content = read_json(card)
        if not isinstance(content, dict):
            raise ValueError(f"{card}: a data card must be a JSON object, got {type(content).__name__}")
        meta |= content
    meta["skipped"] = skipped
    images: Iterable[Callable[[], Image.Image]] = [lambda f=f: read_image(f) for f in kept]  # type: ignore[misc]
    return _corpus(grids, captions, names, LazyImages(list(images)), tokenizer, order, meta)
