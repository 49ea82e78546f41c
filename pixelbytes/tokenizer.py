"""Text bytes and palette pixels as one vocabulary, and rows of ids made from them.

A row is up to three blocks one after another, each closed by `end_id`:

    header   the text "(H, W)", the size of the image that follows
    image    H lines of W pixels; `row_id` closes each line but the last, which `end_id` closes
    caption  text

Vocabularies:

    "compat"  upstream's 113 ids in its order: 58 bytes of lower-case ASCII text, then the palette. Null, row and end
              are the bytes 0, tab and newline, so these three cannot stand in a text.
    "bytes"   null, row, end, all 256 bytes, then the palette: any UTF-8 text comes back unchanged.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image

from ._files import read_json, write_json
from .palette import NES55, check_palette, nearest, white_index

__all__ = ["Block", "PixelBytesTokenizer", "image_array", "normalise_text"]

Token = bytes | tuple[int, int, int]
Order = Literal["image-first", "text-first"]

_COMPAT_BYTES = b"\x00\t\n \"'()*,-+.0123456789\xc2\xa0:[];/%!abcdefghijklmnopqrstuvwxyz"
_SPECIALS = (b"<null>", b"<row>", b"<end>")  # longer than one byte, so that they never equal one
# Letters and signs that NFKD leaves outside ASCII although they have a plain spelling.
_SPELLINGS = str.maketrans(
    {"œ": "oe", "æ": "ae", "ß": "ss", "ø": "o", "ł": "l", "đ": "d", "ı": "i"}
    | dict.fromkeys("‘’ʼ′", "'")
    | dict.fromkeys("“”„«»″", '"')
    | dict.fromkeys("‐‑‒–—−", "-")
)
_HEADER = re.compile(r"\((\d{1,4}), (\d{1,4})\)")
_FORMAT = "pixelbytes-tokenizer"


@dataclass(frozen=True)
class Block:
    """A stretch of one modality in a sequence: ids[start:stop], its closing separator included.

    `size` is the (H, W) that a text announces when an image follows it directly, else None. `complete` says whether
    a block end closes it.
    """

    kind: Literal["text", "image"]
    start: int
    stop: int
    complete: bool = True
    size: tuple[int, int] | None = None


def image_array(image: Image.Image | ArrayLike, name: str = "image") -> NDArray[np.uint8]:
    """Any PIL image, or a (H, W, 3) or (H, W, 4) uint8 array, as a (H, W, 3) uint8 array; alpha is laid on white."""
    if isinstance(image, Image.Image):
        if 0 in image.size:
            raise ValueError(f"{name} is empty: {image.width} x {image.height} pixels")
        if image.mode == "RGB":
            return np.asarray(image)
        pixels = np.asarray(image.convert("RGBA"))
    else:
        pixels = np.asarray(image)
    if pixels.ndim != 3 or pixels.shape[2] not in (3, 4) or 0 in pixels.shape:
        raise ValueError(f"{name} must have shape (H, W, 3) or (H, W, 4) with H, W >= 1, got {pixels.shape}")
    if pixels.dtype != np.uint8:
        raise TypeError(f"{name} must be uint8, got {pixels.dtype}")
    if pixels.shape[2] == 4:
        alpha = pixels[..., 3:].astype(np.uint32)
        pixels = ((pixels[..., :3] * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)
    return pixels


def normalise_text(text: str, allowed: bytes = _COMPAT_BYTES[3:]) -> tuple[str, int]:
    """Spell `text` with the characters of `allowed`: lower case, NFKD, ASCII; white space becomes a space.

    Returns:
        The new text and how many characters of `text` did not come through as they were (upper case counts too).
    """
    pieces, altered = [], 0
    for character in text:
        plain = unicodedata.normalize("NFKD", character.lower().translate(_SPELLINGS))
        plain = "".join(" " if c.isspace() else c for c in plain if ord(c) < 128 and (c.isspace() or ord(c) in allowed))
        altered += plain != character
        pieces.append(plain)
    return "".join(pieces), altered


class PixelBytesTokenizer:
    """Bytes and pixels to ids and back.

    Args:
        vocab: "compat" (default) or "bytes"; see the module's text.
        palette: (P, 3) distinct colours; default the 55 NES colours.

    Attributes: `kind`; `palette` (P, 3) uint8; `vocab` {byte string or (r, g, b): id}; `ids_to_tokens`; `vocab_size`;
    `null_id` 0, `row_id`, `end_id`, `first_pixel_id`, `white_id`; `dtype`, the smallest of uint8 and int16 that holds
    every id.
    """

    def __init__(self, vocab: str | None = "compat", palette: ArrayLike | None = None):
        kind = "compat" if vocab is None else vocab
        if kind not in ("compat", "bytes"):
            raise ValueError(f"vocab must be 'compat' or 'bytes', got {vocab!r}")
        self.kind: str = kind
        self.palette = check_palette(NES55 if palette is None else palette)
        tokens: list[Token] = []
        if kind == "compat":
            tokens += [bytes([b]) for b in _COMPAT_BYTES]
        else:
            tokens += [*_SPECIALS, *(bytes([b]) for b in range(256))]
        self.null_id, self.row_id, self.end_id = 0, 1, 2
        self.first_pixel_id = len(tokens)
        tokens += [(int(r), int(g), int(b)) for r, g, b in self.palette]
        self.vocab: dict[Token, int] = {token: index for index, token in enumerate(tokens)}
        self.ids_to_tokens: dict[int, Token] = dict(enumerate(tokens))
        self.vocab_size = len(tokens)
        self.white_id = self.first_pixel_id + white_index(self.palette)
        self.dtype: np.dtype[Any] = np.dtype(np.uint8 if self.vocab_size <= 256 else np.int16)
        # Byte value -> id, -1 where a text may not hold it; id -> byte value, -1 where it is no text.
        self._id_of_byte = np.full(256, -1, dtype=np.int16)
        self._byte_of_id = np.full(self.vocab_size, -1, dtype=np.int16)
        for index in range(3, self.first_pixel_id):
            token = tokens[index]
            assert isinstance(token, bytes)
            self._id_of_byte[token[0]] = index
            self._byte_of_id[index] = token[0]

    def __len__(self) -> int:
        return self.vocab_size

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PixelBytesTokenizer) and self.vocab == other.vocab

    def __hash__(self) -> int:
        return hash((self.kind, self.palette.tobytes()))

    def __repr__(self) -> str:
        return f"PixelBytesTokenizer({self.kind!r}, {len(self.palette)} colours, {self.vocab_size} ids)"

    # -- single tokens, upstream's names

    def get_vocab(self) -> dict[Token, int]:
        """The vocabulary, {byte string or (r, g, b): id}, as a copy."""
        return dict(self.vocab)

    def convert_tokens_to_ids(self, tokens: Token | str | Iterable[Token | str]) -> int | list[int]:
        """Id of one token, or the list of ids of several; ValueError naming an unknown token."""
        if isinstance(tokens, bytes | str) or _is_colour(tokens):
            return self._id(tokens)
        return [self._id(token) for token in tokens]

    def convert_ids_to_tokens(self, ids: int | Iterable[int]) -> Token | list[Token]:
        """Token of one id, or the list of tokens of several; ValueError naming an id out of range."""
        if isinstance(ids, int | np.integer):
            return self.ids_to_tokens[int(self._check([ids])[0])]
        return [self.ids_to_tokens[i] for i in self._check(ids).tolist()]

    def _id(self, token: Any) -> int:
        key: Any = token.encode() if isinstance(token, str) else tuple(map(int, token)) if _is_colour(token) else token
        try:
            return self.vocab[key]
        except (KeyError, TypeError):
            raise ValueError(f"token {token!r} is not in the {self.kind!r} vocabulary") from None

    def _check(self, ids: Any) -> NDArray[np.int64]:
        array = np.asarray(ids if hasattr(ids, "__len__") else list(ids))
        if array.ndim != 1:
            raise ValueError(f"ids must have shape (L,), got {array.shape}")
        if array.size and array.dtype.kind not in "iu":
            raise TypeError(f"ids must be integers, got {array.dtype}")
        if array.size and (array.min() < 0 or array.max() >= self.vocab_size):
            raise ValueError(f"ids must be 0..{self.vocab_size - 1}, got {array.min()}..{array.max()}")
        return array.astype(np.int64)

    def is_pixel(self, ids: ArrayLike) -> NDArray[np.bool_]:
        """Which ids are pixels; any shape."""
        array = np.asarray(ids)
        return (array >= self.first_pixel_id) & (array < self.vocab_size)

    # -- text

    def encode_text(self, text: str, errors: Literal["strict", "normalise"] = "strict") -> NDArray[Any]:
        """UTF-8 bytes of `text` as (L,) ids, without a separator.

        Args:
            text: any string.
            errors: what "compat" does with a character it lacks: "strict" raises, "normalise" spells the text anew
                (see `normalise_text`, and `normalise` for how many characters that alters).

        Raises:
            ValueError: naming the first character that the vocabulary lacks, and its place.
        """
        if errors not in ("strict", "normalise"):
            raise ValueError(f"errors must be 'strict' or 'normalise', got {errors!r}")
        if not isinstance(text, str):
            raise TypeError(f"text must be str, got {type(text).__name__}")
        if errors == "normalise":
            text, _ = self.normalise(text)
        try:
            ids = self._id_of_byte[np.frombuffer(text.encode(), dtype=np.uint8)]
        except UnicodeEncodeError as error:
            raise ValueError(f"text: character {error.start} ({text[error.start]!r}) is no Unicode text") from None
        if ids.size and ids.min() < 0:
            for place, character in enumerate(text):
                if self._id_of_byte[list(character.encode())].min() < 0:
                    raise ValueError(
                        f"text: character {place} ({character!r}) is not in the {self.kind!r} vocabulary; "
                        "use errors='normalise' or vocab='bytes'"
                    )
        return ids.astype(self.dtype)

    def normalise(self, text: str) -> tuple[str, int]:
        """`text` as `encode_text(errors="normalise")` will write it, and how many characters that alters."""
        if self.kind == "compat":
            return normalise_text(text)
        sound = text.encode("utf-8", "replace").decode()
        return sound, sum(a != b for a, b in zip(text, sound, strict=True))

    def decode_text(self, ids: ArrayLike) -> str:
        """The text in (L,) ids; pixels and separators are left out, broken UTF-8 gives U+FFFD."""
        values = self._byte_of_id[self._check(ids)]
        return values[values >= 0].astype(np.uint8).tobytes().decode("utf-8", errors="replace")

    # -- images

    def encode_image(self, image: Image.Image | ArrayLike) -> NDArray[Any]:
        """(H, W) ids of the palette colours nearest to the pixels of a PIL image or (H, W, 3|4) uint8 array."""
        return (nearest(image_array(image), self.palette) + self.first_pixel_id).astype(self.dtype)

    def decode_image(self, grid: ArrayLike) -> NDArray[np.uint8]:
        """(H, W, 3) uint8 colours of a (H, W) grid of pixel ids."""
        array = np.asarray(grid)
        if array.ndim != 2:
            raise ValueError(f"grid must have shape (H, W), got {array.shape}")
        if array.dtype.kind not in "iu":
            raise TypeError(f"grid must hold integers, got {array.dtype}")
        if not self.is_pixel(array).all():
            raise ValueError(f"grid must hold pixel ids {self.first_pixel_id}..{self.vocab_size - 1} only")
        return self.palette[array.astype(np.int64) - self.first_pixel_id]

    # -- rows

    def encode(
        self,
        image: Image.Image | ArrayLike | None = None,
        caption: str | None = None,
        *,
        errors: Literal["strict", "normalise"] = "strict",
        order: Order = "image-first",
    ) -> NDArray[Any]:
        """A row of (L,) centre ids: header and image, and the caption, each if given.

        Args:
            image: as for `encode_image`.
            caption: text; "" gives an empty block.
            errors: as for `encode_text`.
            order: "image-first" (upstream's) or "text-first", caption before the header, from which a causal model can
                learn to draw what a text says.
        """
        if image is None and caption is None:
            raise ValueError("encode: image or caption must be given")
        grid = None if image is None else self.encode_image(image)
        text = None if caption is None else self.encode_text(caption, errors)
        return self.encode_ids(grid, text, order=order)

    def encode_ids(
        self, grid: NDArray[Any] | None, text: NDArray[Any] | None, *, order: Order = "image-first"
    ) -> NDArray[Any]:
        """A row of (L,) centre ids from a (H, W) grid of pixel ids and (T,) text ids, either of them None."""
        if order not in ("image-first", "text-first"):
            raise ValueError(f"order must be 'image-first' or 'text-first', got {order!r}")
        end = np.array([self.end_id], dtype=self.dtype)
        blocks = []
        if grid is not None:
            height, width = grid.shape
            lines = np.full((height, width + 1), self.row_id, dtype=self.dtype)
            lines[:, :-1] = grid
            lines[-1, -1] = self.end_id
            blocks += [self.encode_text(str((height, width))), end, lines.ravel()]
        if text is not None:
            blocks = [*blocks, text, end] if order == "image-first" else [text, end, *blocks]
        return np.concatenate(blocks).astype(self.dtype)

    def split(self, ids: ArrayLike) -> list[Block]:
        """Cut a sequence into blocks of one modality; every id belongs to exactly one.

        A block ends after `end_id` and wherever pixels turn into text or text into pixels, so that a sequence without
        its separators still comes apart. Row separators and nulls go with what stands before them.
        """
        array = self._check(ids)
        if array.size == 0:
            return []
        text, pixel, end = self._byte_of_id[array] >= 0, self.is_pixel(array), array == self.end_id
        kinds = np.where(pixel, 2, np.where(text, 1, 0))
        cuts = [0]
        seen = 0  # modality of the current block, 0 while only separators came
        for place in np.flatnonzero(kinds | end).tolist():
            kind = int(kinds[place])
            if place == cuts[-1]:
                seen = kind
            elif kind and seen and kind != seen:
                cuts.append(place)
                seen = kind
            else:
                seen = seen or kind
            if end[place]:
                cuts.append(place + 1)
                seen = 0
        if cuts[-1] != len(array):
            cuts.append(len(array))
        blocks: list[Block] = []
        for start, stop in zip(cuts, cuts[1:], strict=False):
            kind_name: Literal["text", "image"] = "image" if pixel[start:stop].any() else "text"
            complete = bool(end[stop - 1])
            if kind_name == "image" and blocks and blocks[-1].kind == "text":
                before = blocks[-1]
                match = _HEADER.fullmatch(self.decode_text(array[before.start : before.stop]))
                if match:
                    size = (int(match[1]), int(match[2]))
                    blocks[-1] = Block("text", before.start, before.stop, before.complete, size)
            blocks.append(Block(kind_name, start, stop, complete))
        return blocks

    def decode(self, ids: ArrayLike, *, min_pixels: int = 1) -> list[tuple[str, Any]]:
        """What a sequence shows, also one that a model has made up: a list of (kind, value).

        kind "header": the (H, W) announced before an image; "image": (H, W, 3) uint8; "text": str.
        The image's lines are cut at its row separators; short lines are filled with the palette's white, so that the
        size comes from the pixels and not from the header. Images of fewer than `min_pixels` pixels are left out, and
        so are empty texts.
        """
        array = self._check(ids)
        found: list[tuple[str, Any]] = []
        for block in self.split(array):
            part = array[block.start : block.stop]
            if block.kind == "image":
                if int(self.is_pixel(part).sum()) >= min_pixels:
                    found.append(("image", self.decode_image(self._ragged_grid(part))))
            elif block.size is not None:
                found.append(("header", block.size))
            elif text := self.decode_text(part):
                found.append(("text", text))
        return found

    def _ragged_grid(self, part: NDArray[np.int64]) -> NDArray[np.int64]:
        """(H, W) grid from the ids of an image block: one line per separated run, W the longest."""
        line = np.cumsum(np.concatenate([[0], part[:-1] == self.row_id]))  # line of each id
        pixel = self.is_pixel(part)
        line, values = line[pixel], part[pixel]
        line -= line[0]  # separators before the first pixel make no lines
        counts = np.bincount(line)  # pixels per line
        column = np.arange(len(values)) - np.repeat(np.cumsum(counts) - counts, counts)
        grid = np.full((len(counts), int(counts.max())), self.white_id, dtype=np.int64)
        grid[line, column] = values
        return grid

    # -- files

    def to_dict(self) -> dict[str, Any]:
        """JSON form: kind, palette, and every token in the order of ids, bytes escaped, colours as #rrggbb."""
        tokens = [
            token.decode("latin-1").encode("unicode_escape").decode() if isinstance(token, bytes) else _hex(token)
            for token in self.vocab
        ]
        palette = [_hex(colour) for colour in self.palette.tolist()]
        return {"format": _FORMAT, "version": 1, "vocab": self.kind, "palette": palette, "tokens": tokens}

    @classmethod
    def from_dict(cls, data: Any, name: str = "tokenizer") -> PixelBytesTokenizer:
        """Inverse of `to_dict`; ValueError naming `name` when the tokens are not what kind and palette give."""
        if not isinstance(data, dict) or data.get("format") != _FORMAT or data.get("version") != 1:
            raise ValueError(f"{name}: not a PixelBytes tokenizer (format {_FORMAT!r}, version 1)")
        try:
            palette = [list(bytes.fromhex(str(colour).removeprefix("#"))) for colour in data["palette"]]
            tokenizer = cls(data["vocab"], np.array(palette))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{name}: {error}") from error
        if data.get("tokens") != tokenizer.to_dict()["tokens"]:
            raise ValueError(f"{name}: the tokens differ from the {tokenizer.kind!r} vocabulary with this palette")
        return tokenizer

    def save(self, path: str | Path) -> Path:
        """Write JSON to `path`, or to `path`/tokenizer.json when `path` is a folder; whole or not at all."""
        return write_json(_tokenizer_file(path), self.to_dict())

    @classmethod
    def load(cls, path: str | Path) -> PixelBytesTokenizer:
        """Read what `save` wrote; ValueError naming the file when it is something else."""
        path = _tokenizer_file(path)
        return cls.from_dict(read_json(path), str(path))


def _is_colour(token: Any) -> bool:
    return isinstance(token, Sequence) and len(token) == 3 and all(isinstance(v, int | np.integer) for v in token)


def _hex(colour: Sequence[int]) -> str:
    return "#" + bytes(colour).hex()


def _tokenizer_file(path: str | Path) -> Path:
    path = Path(path)
    return path / "tokenizer.json" if path.is_dir() else path
