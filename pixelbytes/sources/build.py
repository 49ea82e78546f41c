"""From a source to a data set: a folder of NAME.png and NAME.txt with a data card, or one packed file, or both."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from .._files import make_folder, write_json, write_text
from ..palette import NES55, load_palette
from ..tokenizer import normalise_text
from .base import Item, Source
from .pack import Pack, write_pack
from .pixelate import Method, crop_to_content, fit, pixelate

__all__ = ["SOURCES", "BuildReport", "build"]

SOURCES = ("openmoji", "folder")
_SMALLEST = 8  # text_ratio shrinks sprites no further: below, they show nothing
_LARGEST = 255  # a packed sprite's sides are stored in a byte


@dataclass
class BuildReport:
    """What a build made. `text_tokens`: headers and captions (UTF-8) with their ends; `image_tokens`: pixels."""

    source: str
    items: int
    text_tokens: int
    image_tokens: int
    max_size: int
    characters: int
    altered_characters: int
    shortened_captions: int = 0
    skipped: dict[str, str] = field(default_factory=dict)
    written: list[Path] = field(default_factory=list)

    @property
    def text_share(self) -> float:
        """Share of the tokens that are text, 0 to 1."""
        return self.text_tokens / (self.text_tokens + self.image_tokens)

    def __str__(self) -> str:
        total = self.text_tokens + self.image_tokens
        lines = [
            f"{self.source}: {self.items} items, sprites of at most {self.max_size} x {self.max_size} pixels",
            f"tokens: {total}, of them {self.text_share:.1%} text and {1 - self.text_share:.1%} image",
            f"vocabulary 'compat' alters {self.altered_characters} of {self.characters} caption characters "
            f"({self.altered_characters / max(self.characters, 1):.1%}); 'bytes' alters none",
        ]
        if self.shortened_captions:
            lines.append(f"shortened to reach the text ratio: {self.shortened_captions} captions")
        if self.skipped:
            lines.append(f"left out: {len(self.skipped)}")
            lines += [f"  {reason}" for reason in self.skipped.values()]
        lines += [f"written: {path}" for path in self.written]
        return "\n".join(lines)


@dataclass(frozen=True)
class _Made:
    name: str
    grid: NDArray[np.uint8]
    caption: str


def build(
    source: str | Source = "openmoji",
    out: str | Path | None = None,
    *,
    path: str | Path | None = None,
    pack: str | Path | None = None,
    limit: int | None = None,
    max_size: int = 25,
    text_ratio: float | None = None,
    seed: int = 0,
    palette: str | Path | NDArray[np.uint8] | None = None,
    method: Method = "mode",
    licence: str | None = None,
    cldr: str | Path | None = None,
    strict: bool = False,
    overwrite: bool = False,
    progress: bool = True,
) -> BuildReport:
    """Make a data set and print what it holds.

    Args:
        source: "openmoji", "folder", or an object with `keys`, `item` and `card`.
        out: data folder to make: NAME.png, NAME.txt, card.json and README.md. Whole or not at all.
        path: the folder to read (source "folder").
        pack: file to write everything into, a .npz; see `pack.py`. At least one of `out` and `pack` must be given.
        limit: at most so many items, drawn with `seed` and kept in order; default all.
        max_size: longest side of a sprite, 1..255.
        text_ratio: share of text wanted among all tokens, between 0 and 1. With too little text the sprites get
            smaller (down to 8 pixels), with too much the captions shorter. Default: leave both as they are.
        seed: of the draw for `limit`; nothing else is random.
        palette: file (.gpl, .hex, .pal) or (P, 3) uint8 array; default the 55 NES colours.
        method: "mode" for drawings, "mean" for photographs; see `pixelate`.
        licence: of the pictures and texts, for the card (source "folder").
        cldr: unpacked `cldr-annotations-full` to take texts from (source "openmoji").
        strict: stop at the first broken item; default: leave it out and list it in the report.
        overwrite: replace `out` if it is a data folder; any other folder with something in it is never touched.
        progress: show a bar on stderr.

    Raises:
        ValueError: an argument or a file is wrong, or no item is usable. RuntimeError: an extra is missing.
    """
    if out is None and pack is None:
        raise ValueError("out or pack must be given: nothing would be written")
    if not 1 <= max_size <= _LARGEST:
        raise ValueError(f"max_size must be 1..{_LARGEST}, got {max_size}")
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}")
    if text_ratio is not None and not 0 < text_ratio < 1:
        raise ValueError(f"text_ratio must lie between 0 and 1, got {text_ratio}")
    colours = NES55 if palette is None else palette if isinstance(palette, np.ndarray) else load_palette(palette)
    if out is not None:
        _check_target(Path(out), overwrite)
    for target in (out, pack):
        if target is not None:
            _check_writable(Path(target))
    reader = _open_source(source, path, cldr, licence)
    card = reader.card()
    keys = reader.keys()
    if limit is not None and limit < len(keys):
        keys = [keys[i] for i in np.sort(np.random.default_rng(seed).permutation(len(keys))[:limit])]

    skipped: dict[str, str] = {}

    def items(task: str) -> Iterator[tuple[Item, NDArray[np.uint8]]]:
        """Each usable item with the part of its picture that shows something."""
        bar = tqdm([k for k in keys if k not in skipped], desc=task, unit="item", disable=not progress, file=sys.stderr)
        for key in bar:
            try:
                item = reader.item(key)
                content = crop_to_content(item.image, item.name)
            except ValueError as error:
                if strict:
                    raise
                skipped[key] = str(error)
                continue
            yield item, content

    longest: int | None = None  # bytes of a caption, where text_ratio wants them shorter
    if text_ratio is not None:
        sizes, texts = [], []
        for item, content in items("measure"):
            sizes.append(content.shape[:2])
            texts.append(item.caption)
        max_size, longest = _balance(sizes, texts, max_size, text_ratio)
    made, shortened = [], 0
    for item, content in items(str(card["source"])):
        caption = item.caption if longest is None else _shorten(item.caption, longest)
        shortened += caption != item.caption
        made.append(_Made(item.name, pixelate(content, max_size, colours, method=method, name=item.name), caption))
    if not made:
        reason = next(iter(skipped.values()), "the source is empty")
        raise ValueError(f"source {card['source']!r}: no usable item; first error: {reason}")

    text, image = zip(*(_tokens(m.grid.shape, m.caption) for m in made), strict=True)
    report = BuildReport(
        source=str(card["source"]),
        items=len(made),
        text_tokens=sum(text),
        image_tokens=sum(image),
        max_size=max_size,
        characters=sum(len(m.caption) for m in made),
        altered_characters=sum(normalise_text(m.caption)[1] for m in made),
        shortened_captions=shortened,
        skipped=skipped,
    )
    card |= {
        "items": report.items,
        "max_size": max_size,
        "method": method,
        "text_share": round(report.text_share, 4),
        "altered_characters_compat": report.altered_characters,
        "characters": report.characters,
        "skipped": skipped,
    }
    if limit is not None:
        card |= {"limit": limit, "seed": seed}
    if text_ratio is not None:
        card["text_ratio"] = text_ratio
    if out is not None:
        report.written.append(_write_folder(Path(out), made, colours, card))
    if pack is not None:
        packed = Pack(colours, [m.grid for m in made], [m.name for m in made], [m.caption for m in made], card)
        report.written.append(write_pack(pack, packed))
    print(report)
    return report


def _open_source(source: str | Source, path: Any, cldr: Any, licence: str | None) -> Source:
    if not isinstance(source, str):
        return source
    if source not in SOURCES:
        raise ValueError(f"source must be one of {', '.join(SOURCES)}, got {source!r}")
    if source == "folder":
        if path is None:
            raise ValueError("path must be given for source 'folder'")
        if cldr is not None:
            raise ValueError("cldr belongs to source 'openmoji'")
        from .folder import Folder

        return Folder(path, licence or "unknown")
    if path is not None or licence is not None:
        raise ValueError("path and licence belong to source 'folder'; OpenMoji's licence is known")
    from .openmoji import OpenMoji

    return OpenMoji(cldr)


def _tokens(shape: Sequence[int], caption: str) -> tuple[int, int]:
    """(text, image) tokens of one row: header and caption with their ends, pixels with theirs."""
    height, width = shape
    return len(str((height, width))) + 1 + len(caption.encode()) + 1, height * (width + 1)


def _shorten(caption: str, longest: int) -> str:
    """`caption` cut to at most `longest` UTF-8 bytes, after a whole word if there is one."""
    data = caption.encode()
    if len(data) <= longest:
        return caption
    cut = data[: longest + 1].decode(errors="ignore")
    head = cut.rsplit(" ", 1)[0] if " " in cut.strip() else data[:longest].decode(errors="ignore")
    return head.rstrip(" ,;/") or caption[:1]


def _balance(sizes: list[tuple[int, ...]], texts: list[str], max_size: int, ratio: float) -> tuple[int, int | None]:
    """(sprite size, longest caption) for a share of text near `ratio`: the most of both that keeps to it."""

    def share(size: int, longest: int | None) -> float:
        counts = [
            _tokens(fit(height, width, size), text if longest is None else _shorten(text, longest))
            for (height, width), text in zip(sizes, texts, strict=True)
        ]
        text, image = (sum(column) for column in zip(*counts, strict=True))
        return text / (text + image)

    if not sizes:
        return max_size, None
    if share(max_size, None) < ratio:
        # More text is wanted: the largest size at which it makes up the share.
        return _last(lambda size: share(size, None) >= ratio, min(_SMALLEST, max_size), max_size), None
    return max_size, _last(lambda longest: share(max_size, longest) <= ratio, 1, max(len(t.encode()) for t in texts))


def _last(holds: Callable[[int], bool], low: int, high: int) -> int:
    """The largest of low..high for which `holds`, where it holds for all below that; `low` if it holds for none."""
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if holds(middle) else (low, middle - 1)
    return low


def _check_target(out: Path, overwrite: bool) -> None:
    if not out.exists():
        return
    if not out.is_dir():
        raise ValueError(f"{out}: exists and is not a folder")
    if any(out.iterdir()):
        if not (out / "card.json").is_file():
            raise ValueError(f"{out}: holds other files than a data set; choose another folder")
        if not overwrite:
            raise ValueError(f"{out}: holds a data set already; use overwrite to replace it")


def _check_writable(target: Path) -> None:
    """Fail before the work and not after it."""
    parent = make_folder(target.absolute().parent)
    try:
        tempfile.TemporaryFile(dir=parent).close()
    except OSError as error:
        raise OSError(f"cannot write {target}: {error.strerror or error}") from error


def _write_folder(out: Path, made: list[_Made], palette: NDArray[np.uint8], card: dict[str, Any]) -> Path:
    # Beside `out`, so that the last step is a rename on one file system.
    aside = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.resolve().parent))
    try:
        data = aside / "new"
        data.mkdir()
        for item in made:
            Image.fromarray(palette[item.grid]).save(data / f"{item.name}.png", optimize=True)
            write_text(data / f"{item.name}.txt", item.caption + "\n")
        write_json(data / "card.json", card | {"palette": [colour.tobytes().hex() for colour in palette]})
        write_text(data / "README.md", _readme(card))
        if out.exists():
            os.replace(out, aside / "old")
        os.replace(data, out)
    except OSError as error:
        raise OSError(f"cannot write the data folder {out}: {error.strerror or error}") from error
    finally:
        if not out.exists() and (aside / "old").exists():  # the second rename failed: put the old folder back
            os.replace(aside / "old", out)
        shutil.rmtree(aside, ignore_errors=True)
    return out


def _readme(card: dict[str, Any]) -> str:
    facts = [
        ("Licence", f"{card['licence']} {card.get('licence_url', '')}".strip()),
        ("Attribution", card.get("attribution")),
        ("Items", card["items"]),
        ("Sprites", f"at most {card['max_size']} x {card['max_size']} pixels, method {card['method']}"),
        ("Text", f"{card['text_share']:.1%} of the tokens"),
        (
            "Vocabulary `compat`",
            f"alters {card['altered_characters_compat']} of {card['characters']} caption characters; `bytes` none",
        ),
        ("Made from", ", ".join(f"{k} {v}" for k, v in card.get("versions", {}).items())),
        ("Left out", ", ".join(card["skipped"])),
    ]
    lines = [f"- {name}: {value}" for name, value in facts if value]
    text = "NAME.png is a sprite, NAME.txt its caption, card.json these facts for programs. Made by `pixelbytes build`."
    return "\n".join([f"# {card['title']}", "", text, "", *lines]) + "\n"
