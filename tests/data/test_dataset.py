from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader

from pixelbytes.dataset import IGNORE, SIDES, PxByDataset, load_folder, split_indices, split_rows
from pixelbytes.neighborhood import windows
from pixelbytes.palette import NES55
from pixelbytes.rows import mirror_row
from pixelbytes.tokenizer import PixelBytesTokenizer

COMPAT = PixelBytesTokenizer()
BYTES = PixelBytesTokenizer("bytes")


def random_rows(lengths: list[int], dtype=np.uint8, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(1, 113, (length, 3, 3)).astype(dtype) for length in lengths]


def upstream_last(rows: list[np.ndarray], seq_length: int, stride: int) -> list[tuple[np.ndarray, int]]:
    """Upstream's loop: eager windows of seq_length + 1 indices, clamped to the row's end."""
    found = []
    for row in rows:
        for start in range(0, max(len(row) - seq_length, 1), stride):
            index = [min(start + k, len(row) - 1) for k in range(seq_length + 1)]
            found.append((row[index[:-1]], int(row[index[-1], 1, 1])))
    return found


@pytest.mark.parametrize(("seq_length", "stride"), [(1, 1), (4, 3), (8, 8), (16, 64)])
def test_last_is_upstreams_windows(seq_length: int, stride: int) -> None:
    """Row lengths around the window: 1, seq_length - 1, seq_length, seq_length + 1, and far longer."""
    rows = random_rows([1, 3, 4, 5, 7, 8, 9, 16, 17, 40])
    data = PxByDataset(rows, seq_length, stride)
    expected = upstream_last(rows, seq_length, stride)
    assert len(data) == len(expected)
    for (x, y), (ex, ey) in zip((data[i] for i in range(len(data))), expected, strict=True):
        assert x.shape == (seq_length, 3, 3) and x.dtype == torch.uint8
        assert y.shape == () and y.dtype == torch.int64
        assert np.array_equal(x.numpy(), ex) and int(y) == ey


@pytest.mark.parametrize("stride", [4, 8])
def test_all_covers_every_token_but_the_first(stride: int) -> None:
    """Each target is the next centre; with stride = seq_length each token of a row is a target exactly once."""
    lengths = [1, 2, 7, 8, 9, 10, 16, 17, 18, 40]
    rows = [np.zeros((n, 3, 3), dtype=np.int16) for n in lengths]
    first = np.cumsum(lengths) - lengths
    for row, start in zip(rows, first, strict=True):
        row[:, 1, 1] = start + np.arange(len(row)) + 1  # every centre is unique
        row[:, 1, 0] = 7
    data = PxByDataset(rows, 8, stride, targets="all")
    seen = np.zeros(sum(lengths) + 1, dtype=int)
    for i in range(len(data)):
        x, y = data[i]
        assert x.shape == (8, 3, 3) and y.shape == (8,) and y.dtype == torch.int64
        real = y != IGNORE
        assert torch.equal(y[real], x[real][:, 1, 1].long() + 1)
        null = (x == 0).flatten(1).all(1)
        assert not (real & null).any()
        seen[y[real].numpy()] += 1
    never = first + 1  # a row's first token
    assert not seen[never].any()
    rest = np.delete(seen, [0, *never])
    assert rest.min() >= 1 and (stride < 8 or rest.max() == 1)


@pytest.mark.parametrize("targets", ["last", "all"])
def test_batches_equal_items_through_worker_processes(targets) -> None:
    data = PxByDataset(random_rows([30, 5, 12]), 8, 4, targets)
    x, y = data.batch(np.arange(len(data)))
    for workers in (0, 2):
        loader = DataLoader(data, batch_size=5, num_workers=workers)
        got = list(loader)
        assert torch.equal(torch.cat([b[0] for b in got]), x) and torch.equal(torch.cat([b[1] for b in got]), y)
    again = pickle.loads(pickle.dumps(data))
    assert torch.equal(again.batch([0, 2])[0], x[[0, 2]])
    assert torch.equal(torch.stack([data[i][0] for i in range(len(data))]), x)
    assert torch.equal(data[-1][0], x[-1])


def test_items_are_copies() -> None:
    """Writing into a batch must not change the data set."""
    data = PxByDataset(random_rows([20]), 4, 4)
    x, _ = data[0]
    before = x.clone()
    x.zero_()
    assert torch.equal(data[0][0], before)


def test_memory_is_one_small_array() -> None:
    rows = random_rows([500] * 20)
    data = PxByDataset(rows, 256, 1, "all")
    assert len(pickle.dumps(data)) < 500 * 20 * 9 + 20 * 500 * 2 * 8 + 10_000
    assert PxByDataset(random_rows([4], np.int64), 2).batch([0])[0].dtype == torch.uint8
    wide = random_rows([4], np.int64)
    wide[0][0, 1, 1] = 300
    assert PxByDataset([*random_rows([4]), *wide], 2).batch([0])[0].dtype == torch.int16


def test_upstreams_nested_lists() -> None:
    rows = random_rows([9, 12])
    a, b = PxByDataset([row.tolist() for row in rows], 4), PxByDataset(rows, 4)
    assert torch.equal(a.batch(range(len(a)))[0], b.batch(range(len(b)))[0])


@pytest.mark.parametrize(
    ("rows", "arguments", "error", "words"),
    [
        ([], {}, ValueError, "rows is empty"),
        ([np.zeros((0, 3, 3), dtype=np.uint8)], {}, ValueError, r"rows\[0\] must have shape \(L, 3, 3\)"),
        ([np.zeros((4, 3, 2), dtype=np.uint8)], {}, ValueError, r"got \(4, 3, 2\)"),
        ([np.ones((4, 3, 3), dtype=int), np.ones((4, 3, 3))], {}, TypeError, r"rows\[1\].*got float64"),
        ([[[[1, 2], [3]]]], {}, ValueError, r"rows\[0\].*unequal length"),
        ([np.full((4, 3, 3), 113)], {"vocab_size": 113}, ValueError, r"rows\[0\] must hold ids 0\.\.112, got 113"),
        ([np.full((4, 3, 3), -1)], {}, ValueError, "0 or more"),
        ([np.ones((4, 3, 3), dtype=int)], {"seq_length": 0}, ValueError, "seq_length must be at least 1, got 0"),
        ([np.ones((4, 3, 3), dtype=int)], {"stride": 0}, ValueError, "stride must be at least 1"),
        ([np.ones((4, 3, 3), dtype=int)], {"seq_length": 2.5}, TypeError, "seq_length must be an integer"),
        ([np.ones((4, 3, 3), dtype=int)], {"targets": "first"}, ValueError, "targets must be"),
    ],
)
def test_bad_input_names_the_argument(rows, arguments, error, words) -> None:
    with pytest.raises(error, match=words):
        PxByDataset(rows, **arguments)


def test_bad_index() -> None:
    data = PxByDataset(random_rows([20]), 4, 4)
    with pytest.raises(IndexError, match="indices must be 0..3, got 4"):
        data[4]


def test_split_is_by_item_seeded_and_complete() -> None:
    rows = list(range(107))
    train, val, test = split_rows(rows, seed=3)
    assert sorted(train + val + test) == rows
    assert (len(val), len(test)) == (10, 10)
    assert split_rows(rows, seed=3) == (train, val, test) != split_rows(rows, seed=4)
    groups = np.arange(107) // 2
    parts = split_indices(107, groups=groups)
    assert all(set(groups[a]).isdisjoint(groups[b]) for a, b in ((parts[0], parts[1]), (parts[1], parts[2])))
    assert [len(p) for p in split_rows(rows[:3])] == [1, 1, 1]
    assert [len(p) for p in split_rows(rows[:5], (1.0, 0.0, 0.0))] == [5, 0, 0]
    with pytest.raises(ValueError, match="2 items are too few for a split into 3 parts"):
        split_rows(rows[:2])
    with pytest.raises(ValueError, match="add up to 1"):
        split_rows(rows, (0.5, 0.1))


def make_folder(path, count: int = 4) -> None:
    rng = np.random.default_rng(0)
    for i in range(count):
        Image.fromarray(NES55[rng.integers(0, 55, (3 + i, 5))]).save(path / f"item{i}.png")
        (path / f"item{i}.txt").write_text(f"l'été\n  numéro {i}\n", encoding="utf-8")


def test_load_folder(tmp_path) -> None:
    make_folder(tmp_path)
    corpus = load_folder(tmp_path, COMPAT)
    assert corpus.names == ["item0", "item1", "item2", "item3"]
    assert corpus.captions[2] == "l'été numéro 2"
    assert corpus.images[1].size == (5, 4)
    assert np.array_equal(corpus.rows[1], windows(COMPAT.encode(corpus.images[1], "l'ete numero 1"), COMPAT))
    assert corpus.meta["altered_characters"] == 12 and corpus.meta["tokenizer"] == "compat"
    assert len(load_folder(tmp_path, COMPAT, limit=2)) == 2


def test_both_orders_stay_together_in_a_split(tmp_path) -> None:
    make_folder(tmp_path)
    tokenizer = PixelBytesTokenizer("bytes")
    corpus = load_folder(tmp_path, tokenizer, order="both")
    assert len(corpus.rows) == 8 and corpus.items.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    train, val, test = corpus.split((0.5, 0.25, 0.25), seed=1)
    assert sorted(train.names + val.names + test.names) == corpus.names
    for part in (train, val, test):
        assert len(part.rows) == 2 * len(part)
        for row, item in zip(part.rows, part.items, strict=True):
            kinds = dict(tokenizer.decode(row[:, 1, 1]))
            assert kinds["text"] == part.captions[item]
            assert np.array_equal(kinds["image"], np.asarray(part.images[item]))
    first = [tokenizer.decode(row[:, 1, 1])[0][0] for row in corpus.rows[:2]]
    assert first == ["header", "text"]


def test_bad_folders_are_named(tmp_path) -> None:
    with pytest.raises(ValueError, match="no images in this folder"):
        load_folder(tmp_path, COMPAT)
    with pytest.raises(ValueError, match="not a folder"):
        load_folder(tmp_path / "none", COMPAT)
    make_folder(tmp_path)
    (tmp_path / "item1.txt").unlink()
    with pytest.raises(ValueError, match=r"item1\.txt: caption missing for item1\.png"):
        load_folder(tmp_path, COMPAT)
    whole = (tmp_path / "item2.png").read_bytes()
    (tmp_path / "item2.png").write_bytes(whole[:60])
    Image.new("RGB", (65, 4)).save(tmp_path / "item3.png")
    corpus = load_folder(tmp_path, COMPAT, strict=False)
    assert corpus.names == ["item0"]
    assert set(corpus.meta["skipped"]) == {"item1.png", "item2.png", "item3.png"}
    assert "not a readable image" in corpus.meta["skipped"]["item2.png"]
    assert "65 x 4 pixels" in corpus.meta["skipped"]["item3.png"]
    (tmp_path / "item0.txt").write_text(" \n")
    with pytest.raises(ValueError, match=r"no usable item; first error: .*item0\.txt: caption is empty"):
        load_folder(tmp_path, COMPAT, strict=False)
    with pytest.raises(ValueError, match="limit must be at least 1"):
        load_folder(tmp_path, COMPAT, limit=0)


@given(st.sampled_from([COMPAT, BYTES]), st.sampled_from(["image-first", "text-first"]), st.data())
@settings(deadline=None)
def test_a_mirrored_row_shows_the_mirror_image(tokenizer, order, data) -> None:
    height, width = data.draw(st.tuples(st.integers(1, 6), st.integers(1, 6)))
    picture = NES55[np.random.default_rng(data.draw(st.integers(0, 99))).integers(0, 55, (height, width))]
    image = data.draw(st.sampled_from([picture, None]))
    text = data.draw(st.none() | st.text("abz (,9)", max_size=12)) if image is not None else "(2, 3) cat"
    row = windows(tokenizer.encode(image, text, order=order), tokenizer)
    mirrored = mirror_row(row, tokenizer)
    flipped = None if image is None else image[:, ::-1]
    assert mirrored.dtype == row.dtype
    assert np.array_equal(mirrored, windows(tokenizer.encode(flipped, text, order=order), tokenizer))
    assert np.array_equal(mirror_row(mirrored, tokenizer), row)


@pytest.mark.parametrize("order", ["image-first", "text-first", "both"])
def test_mirrored_corpus(tmp_path, order) -> None:
    make_folder(tmp_path)
    (tmp_path / "item1.txt").write_text("main vers la Gauche / left-facing hand")
    Image.new("RGB", (3, 2), tuple(NES55[7].tolist())).save(tmp_path / "item3.png")  # symmetric
    corpus = load_folder(tmp_path, BYTES, order=order)
    before = [row.copy() for row in corpus.rows]
    mirrored = corpus.mirrored(BYTES)
    assert mirrored.names == ["item0", "item2", "item3"] and mirrored.captions[1] == corpus.captions[2]
    assert len(mirrored.rows) == len(mirrored.items) == 3 * len(corpus.rows) // 4
    for row, item in zip(mirrored.rows, mirrored.items, strict=True):
        shown = dict(BYTES.decode(row[:, 1, 1]))
        of_it = corpus.images[corpus.names.index(mirrored.names[item])]
        assert np.array_equal(shown["image"], np.asarray(of_it)[:, ::-1])
        assert np.array_equal(shown["image"], np.asarray(mirrored.images[item]))
        assert shown["text"] == mirrored.captions[item]
    assert all(np.array_equal(a, b) for a, b in zip(corpus.rows, before, strict=True))


def test_captions_that_name_a_side() -> None:
    for caption in ("left", "up-right arrow", "LEFTWARDS hand", "à gauche", "œil droit", "main droite", "aile/gauche"):
        assert SIDES.search(caption), caption
    for caption in ("bright sun", "droits d'auteur", "endroit", "copyright", "gaucher", "leftover"):
        assert not SIDES.search(caption), caption
