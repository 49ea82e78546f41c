from __future__ import annotations

import io
import json
import os

import numpy as np
import pytest
from PIL import Image

from pixelbytes.dataset import load_folder, load_pack
from pixelbytes.palette import NES55
from pixelbytes.sources import Item, build
from pixelbytes.sources.openmoji import caption, read_cldr, read_texts, write_texts
from pixelbytes.sources.pack import Pack, read_pack, write_pack
from pixelbytes.sources.pixelate import crop_to_content, fit, pixelate
from pixelbytes.tokenizer import PixelBytesTokenizer

BLACK, WHITE = 0, 1  # indices in NES55
RED = NES55.tolist().index([0xF8, 0x38, 0x00])


def drawing(height: int, width: int, margin: int = 0) -> Image.Image:
    """A red box with a black frame of an eighth of its height, on a transparent margin."""
    frame = max(height // 8, 1)
    pixels = np.zeros((height + 2 * margin, width + 2 * margin, 4), dtype=np.uint8)
    box = pixels[margin : margin + height, margin : margin + width]
    box[:] = [0, 0, 0, 255]
    box[frame:-frame, frame:-frame, 0] = 255
    return Image.fromarray(pixels)


def make_folder(path, names: str = "abcdef") -> None:
    path.mkdir(exist_ok=True)
    for i, name in enumerate(names):
        drawing(40 + 8 * i, 64, margin=5).save(path / f"{name}.png")
        (path / f"{name}.txt").write_text(f"boîte {name}; un deux trois / box {name}", encoding="utf-8")


@pytest.mark.parametrize(
    ("size", "wanted"),
    [
        ((100, 50), (25, 13)),  # upstream made landscape pictures twice too tall
        ((50, 100), (13, 25)),
        ((300, 300), (25, 25)),
        ((400, 3), (25, 1)),
        ((7, 9), (7, 9)),  # never enlarged
        ((25, 25), (25, 25)),
        ((26, 25), (25, 24)),
    ],
)
def test_fit_keeps_the_proportions(size, wanted) -> None:
    assert fit(*size, 25) == wanted


def test_crop_to_content() -> None:
    assert crop_to_content(drawing(16, 24, margin=9)).shape == (16, 24, 3)
    whole = np.zeros((5, 6, 3), dtype=np.uint8)
    assert crop_to_content(whole).shape == (5, 6, 3)
    one = np.full((5, 6, 3), 255, dtype=np.uint8)
    one[4, 5] = 0
    assert crop_to_content(one).tolist() == [[[0, 0, 0]]]


@pytest.mark.parametrize(("mode", "colour"), [("RGBA", 0), ("RGB", "white")])
def test_pictures_without_content_are_named(mode, colour) -> None:
    with pytest.raises(ValueError, match="ghost: no content"):
        pixelate(Image.new(mode, (9, 9), colour), name="ghost")


def test_pixelate_keeps_outlines_and_flat_colours() -> None:
    """A frame one sprite pixel wide stays black and closed, the inside stays one colour."""
    grid = pixelate(drawing(192, 192, margin=17), 8)
    assert grid.shape == (8, 8) and grid.dtype == np.uint8
    expected = np.full((8, 8), BLACK)
    expected[1:-1, 1:-1] = grid[3, 3]
    assert np.array_equal(grid, expected) and grid[3, 3] == RED
    assert np.array_equal(pixelate(drawing(192, 192), 8), grid)


def test_pixelate_mean_and_small_pictures() -> None:
    stripes = np.zeros((40, 40, 3), dtype=np.uint8)
    stripes[::2] = 200
    mean = pixelate(stripes, 20, method="mean")
    assert (mean == 54).all()  # 787878, nearest to the mean 646464
    small = NES55[np.random.default_rng(0).integers(2, 55, (4, 6))]
    small[0, 0] = small[-1, -1] = 0  # so that nothing is cropped
    assert np.array_equal(NES55[pixelate(small, 25)], small)
    with pytest.raises(ValueError, match="method must be"):
        pixelate(small, method="median")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="max_size must be at least 1"):
        pixelate(small, 0)


def test_folder_build(tmp_path, capsys) -> None:
    make_folder(tmp_path / "in")
    report = build("folder", tmp_path / "out", path=tmp_path / "in", licence="CC0", max_size=16, progress=False)
    assert report.items == 6 and not report.skipped
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out"]
    assert len(list((tmp_path / "out").iterdir())) == 14
    card = json.loads((tmp_path / "out" / "card.json").read_text())
    assert card["licence"] == "CC0" and card["items"] == 6 and card["max_size"] == 16
    assert len(card["palette"]) == 55 and str(tmp_path) not in json.dumps(card)
    assert "Licence: CC0" in (tmp_path / "out" / "README.md").read_text()

    tokenizer = PixelBytesTokenizer("bytes")
    corpus = load_folder(tmp_path / "out", tokenizer)
    assert corpus.names == list("abcdef") and corpus.captions[0] == "boîte a; un deux trois / box a"
    assert corpus.images[0].size == (16, 10) and corpus.meta["source"] == "folder"
    # The counts printed are those of the rows made from the result.
    centres = np.concatenate([row[:, 1, 1] for row in corpus.rows])
    assert len(centres) == report.text_tokens + report.image_tokens
    rows = sum(image.height for image in corpus.images)
    assert tokenizer.is_pixel(centres).sum() + rows == report.image_tokens
    printed = capsys.readouterr().out
    assert f"{report.text_share:.1%} text" in printed
    assert f"alters {corpus_altered(corpus)} of" in printed


def corpus_altered(corpus) -> int:
    return sum(PixelBytesTokenizer("compat").normalise(text)[1] for text in corpus.captions)


def test_folder_and_pack_hold_the_same(tmp_path) -> None:
    make_folder(tmp_path / "in")
    build("folder", tmp_path / "out", path=tmp_path / "in", pack=tmp_path / "set.npz", progress=False)
    tokenizer = PixelBytesTokenizer()
    a, b = load_folder(tmp_path / "out", tokenizer), load_pack(tmp_path / "set.npz", tokenizer)
    assert a.names == b.names and a.captions == b.captions
    assert all(np.array_equal(x, y) for x, y in zip(a.rows, b.rows, strict=True))
    assert all(np.array_equal(np.asarray(x), np.asarray(y)) for x, y in zip(a.images, b.images, strict=True))


def test_builds_are_reproducible(tmp_path) -> None:
    make_folder(tmp_path / "in")
    arguments = {"path": tmp_path / "in", "limit": 3, "progress": False}
    for name, seed in (("a", 0), ("b", 0), ("c", 3)):
        build("folder", pack=tmp_path / name, seed=seed, **arguments)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    names = {name: read_pack(tmp_path / name).names for name in "ac"}
    assert len(names["a"]) == 3 and names["a"] == sorted(names["a"]) and names["a"] != names["c"]


def test_text_ratio_steers_both_ways(tmp_path) -> None:
    make_folder(tmp_path / "in")
    arguments = {"path": tmp_path / "in", "pack": tmp_path / "a", "progress": False}
    plain = build("folder", **arguments)
    more = build("folder", text_ratio=0.2, **arguments)
    assert plain.text_share < 0.2 <= more.text_share and 8 <= more.max_size < 25
    larger = build("folder", text_ratio=0.2, **(arguments | {"max_size": more.max_size + 1}))
    assert larger.max_size == more.max_size  # it was the largest that will do
    less = build("folder", text_ratio=0.05, **arguments)
    assert less.max_size == 25 and less.text_share <= 0.05 < plain.text_share
    assert less.shortened_captions == 6
    first = read_pack(tmp_path / "a").captions[0]
    assert first and "boîte a; un deux trois / box a".startswith(first)


def test_bad_items_are_left_out_and_counted(tmp_path, capsys) -> None:
    make_folder(tmp_path / "in")
    whole = (tmp_path / "in" / "a.png").read_bytes()
    (tmp_path / "in" / "a.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "in" / "b.txt").unlink()
    Image.new("RGBA", (8, 8)).save(tmp_path / "in" / "c.png")
    (tmp_path / "in" / "d.txt").write_bytes(b"\xff\xfe")
    (tmp_path / "in" / "e.png").write_bytes(b"")
    report = build("folder", tmp_path / "out", path=tmp_path / "in", progress=False)
    assert report.items == 1 and list(report.skipped) == list("abcde")
    printed = capsys.readouterr().out
    assert "left out: 5" in printed
    for words in ("a.png: not a readable image", "b.txt: caption missing", "c: no content", "d.txt: caption is not"):
        assert words in printed
    with pytest.raises(ValueError, match=r"a\.png: not a readable image"):
        build("folder", tmp_path / "strict", path=tmp_path / "in", strict=True, progress=False)
    assert not (tmp_path / "strict").exists()
    (tmp_path / "in" / "f.txt").unlink()
    with pytest.raises(ValueError, match="no usable item; first error: .*a.png"):
        build("folder", tmp_path / "none", path=tmp_path / "in", progress=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out"]


def test_out_is_never_half_written_nor_wrongly_replaced(tmp_path, monkeypatch) -> None:
    make_folder(tmp_path / "in")
    arguments = {"path": tmp_path / "in", "progress": False}
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "letter.txt").write_text("x")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="holds other files than a data set"):
            build("folder", precious, overwrite=overwrite, **arguments)
    build("folder", tmp_path / "out", **arguments)
    before = (tmp_path / "out" / "card.json").read_bytes()
    with pytest.raises(ValueError, match="holds a data set already"):
        build("folder", tmp_path / "out", **arguments)

    def no_space(self, *args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", no_space)
        with pytest.raises(OSError, match=r"cannot write the data folder .*out: No space left"):
            build("folder", tmp_path / "out", overwrite=True, limit=2, **arguments)
    assert (tmp_path / "out" / "card.json").read_bytes() == before
    build("folder", tmp_path / "out", overwrite=True, limit=2, **arguments)
    assert json.loads((tmp_path / "out" / "card.json").read_text())["items"] == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out", "precious"]


@pytest.mark.parametrize(
    ("source", "arguments", "words"),
    [
        ("folder", {}, "path must be given"),
        ("pokemon", {}, "source must be one of openmoji, folder, got 'pokemon'"),
        ("folder", {"path": "nowhere"}, "nowhere: not a folder"),
        ("folder", {"path": ".", "pack": None}, "out or pack"),
        ("folder", {"path": ".", "max_size": 0}, "max_size must be 1..255"),
        ("folder", {"path": ".", "max_size": 256}, "max_size must be 1..255"),
        ("folder", {"path": ".", "limit": 0}, "limit must be"),
        ("folder", {"path": ".", "text_ratio": 1.0}, "text_ratio must lie between"),
        ("folder", {"path": ".", "palette": "p.py"}, "unknown palette suffix"),
        ("openmoji", {"path": "."}, "belong to source 'folder'"),
    ],
)
def test_bad_arguments(tmp_path, source, arguments, words) -> None:
    with pytest.raises(ValueError, match=words):
        build(source, progress=False, **({"pack": tmp_path / "a"} | arguments))
    assert not os.listdir(tmp_path)


def test_unwritable_targets_are_told_before_the_work(tmp_path) -> None:
    make_folder(tmp_path / "in")
    (tmp_path / "file").write_text("")

    class Untouched:
        def keys(self) -> list[str]:
            raise AssertionError("the work has begun")

        item = card = keys

    for target in ({"out": tmp_path / "file" / "out"}, {"pack": tmp_path / "file" / "set.npz"}):
        with pytest.raises(OSError, match=r"file: "):
            build(Untouched(), progress=False, **target)  # type: ignore[arg-type]


def test_own_source_and_palette(tmp_path) -> None:
    class Boxes:
        def keys(self) -> list[str]:
            return ["x", "y"]

        def item(self, key: str) -> Item:
            return Item(key, drawing(16, 16), key)

        def card(self) -> dict:
            return {"source": "boxes", "title": "Boxes", "licence": "CC0"}

    two = np.array([[0, 0, 0], [255, 255, 255]], dtype=np.uint8)
    build(Boxes(), pack=tmp_path / "a", palette=two, progress=False)
    pack = read_pack(tmp_path / "a")
    assert np.array_equal(pack.palette, two) and pack.captions == ["x", "y"]
    assert pack.grids[0].shape == (16, 16) and pack.grids[0].max() == 1  # red is nearer to white than to black


def test_pack_files(tmp_path) -> None:
    grids = [np.array([[1, 2, 3]], dtype=np.uint8), np.array([[4], [54]], dtype=np.uint8)]
    pack = Pack(NES55, grids, ["a", "b"], ["l'été", "x"], {"source": "é"})
    write_pack(tmp_path / "a.npz", pack)
    again = read_pack(tmp_path / "a.npz")
    assert all(np.array_equal(x, y) for x, y in zip(again.grids, grids, strict=True))
    assert (again.names, again.captions, again.meta) == (pack.names, pack.captions, pack.meta)
    data = (tmp_path / "a.npz").read_bytes()
    flipped = bytearray(data)
    flipped[data.index(b"palette.npy") + 40] ^= 0x55
    plain = io.BytesIO()
    np.save(plain, NES55)
    for broken in (b"", b"no zip", data[:-40], data[:200], bytes(flipped), plain.getvalue()):
        (tmp_path / "b.npz").write_bytes(broken)
        with pytest.raises(ValueError, match=r"b\.npz: not a packed PixelBytes data set"):
            read_pack(tmp_path / "b.npz")
    np.savez(tmp_path / "b.npz", palette=NES55)
    with pytest.raises(ValueError, match=r"b\.npz: not a packed"):
        read_pack(tmp_path / "b.npz")
    with pytest.raises(ValueError, match="captions must be 2 single lines"):
        write_pack(tmp_path / "c.npz", Pack(NES55, grids, ["a", "b"], ["x\ny", "x"], {}))
    with pytest.raises(FileNotFoundError):
        read_pack(tmp_path / "none.npz")


def test_cldr_texts_and_captions(tmp_path) -> None:
    """Keys without U+FE0F, entries of one language only, a keyword equal to the name."""
    tables = {
        "fr": {"❤": {"tts": ["cœur"], "default": ["Cœur", "amour"]}, "★": {"tts": ["étoile"], "default": ["étoile"]}},
        "en": {"❤": {"tts": ["heart"], "default": ["heart", "love"]}, "★": {"tts": ["star"]}, "A": {"tts": ["a"]}},
    }
    for language, table in tables.items():
        folder = tmp_path / "annotations" / language
        folder.mkdir(parents=True)
        (folder / "annotations.json").write_text(json.dumps({"annotations": {"annotations": table}}))
    (tmp_path / "package.json").write_text('{"version": "9.9"}')
    release, texts = read_cldr(tmp_path, ["2764-FE0F", "2605", "0041", "0042"])
    assert release == "9.9" and list(texts) == ["2764-FE0F", "2605"]
    assert caption(texts["2764-FE0F"]) == "cœur; amour / heart; love"
    assert caption(texts["2605"]) == "étoile / star"
    assert read_texts(write_texts(tmp_path / "t.tsv", release, texts)) == (release, texts)
    with pytest.raises(ValueError, match="not an unpacked cldr-annotations-full"):
        read_cldr(tmp_path / "annotations", [])
    (tmp_path / "t.tsv").write_text("# Unicode CLDR 1 x\n2605\tx\n")
    with pytest.raises(ValueError, match=r"t\.tsv: line 2: wanted 5 cells, got 2"):
        read_texts(tmp_path / "t.tsv")
