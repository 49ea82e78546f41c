from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pixelbytes.neighborhood import WindowBuilder, windows
from pixelbytes.tokenizer import PixelBytesTokenizer

TOKENIZERS = {kind: PixelBytesTokenizer(kind) for kind in ("compat", "bytes")}
kinds = st.sampled_from(list(TOKENIZERS))


def grid_windows(grid: np.ndarray) -> np.ndarray:
    """The construction of one block from its (H, W) grid, separators included: pad by one, read five neighbours."""
    height, width = grid.shape
    padded = np.zeros((height + 1, width + 2), dtype=grid.dtype)
    padded[1:, 1:-1] = grid
    out = np.zeros((height * width, 3, 3), dtype=grid.dtype)
    for i in range(height):
        for j in range(width):
            out[i * width + j] = [padded[i, j : j + 3], [padded[i + 1, j], padded[i + 1, j + 1], 0], [0, 0, 0]]
    return out


def row_windows(tokenizer: PixelBytesTokenizer, grids: list[np.ndarray | None], texts: list[str]) -> np.ndarray:
    """Windows of several items' rows, block by block: the oracle of the tests below."""

    def text_block(text: str) -> np.ndarray:
        return np.append(tokenizer.encode_text(text), tokenizer.end_id).astype(tokenizer.dtype)[None]

    parts = []
    for grid, text in zip(grids, texts, strict=True):
        if grid is not None:
            height, width = grid.shape
            closed = np.full((height, width + 1), tokenizer.row_id, dtype=tokenizer.dtype)
            closed[:, :-1] = grid
            closed[-1, -1] = tokenizer.end_id
            parts += [grid_windows(text_block(f"({height}, {width})")), grid_windows(closed)]
        parts.append(grid_windows(text_block(text)))
    return np.concatenate(parts)


@st.composite
def items(draw) -> tuple[PixelBytesTokenizer, list[np.ndarray | None], list[str]]:
    tokenizer = TOKENIZERS[draw(kinds)]
    alphabet = "ab (1,2)" if tokenizer.kind == "compat" else "ab\n\té\0"
    grids: list[np.ndarray | None] = []
    texts = []
    for _ in range(draw(st.integers(1, 3))):
        if draw(st.booleans()):
            shape = draw(st.tuples(st.integers(1, 6), st.integers(1, 6)))
            pixel = st.integers(tokenizer.first_pixel_id, tokenizer.vocab_size - 1)
            cells = draw(st.lists(pixel, min_size=shape[0] * shape[1], max_size=shape[0] * shape[1]))
            grids.append(np.array(cells, dtype=tokenizer.dtype).reshape(shape))
        else:
            grids.append(None)
        texts.append(draw(st.text(alphabet, max_size=8)))
    return tokenizer, grids, texts


@given(items())
@settings(max_examples=150, deadline=None)
def test_both_constructions_equal_the_blocks_own(item) -> None:
    """1xN, Nx1, empty captions, several items: batch and incremental windows are those of each block's grid."""
    tokenizer, grids, texts = item
    expected = row_windows(tokenizer, grids, texts)
    ids = np.concatenate([tokenizer.encode_ids(g, tokenizer.encode_text(t)) for g, t in zip(grids, texts, strict=True)])
    assert np.array_equal(windows(ids, tokenizer), expected)
    builder = WindowBuilder(tokenizer)
    builder.extend(ids)
    assert np.array_equal(builder.array(), expected)
    assert np.array_equal(builder.ids(), ids)


@given(kinds, st.data())
@settings(max_examples=150, deadline=None)
def test_any_sequence_has_windows(kind: str, data) -> None:
    """A model may write anything: no crash, both constructions agree, four cells stay empty, nothing looks ahead."""
    tokenizer = TOKENIZERS[kind]
    few = [0, tokenizer.row_id, tokenizer.end_id, 5, tokenizer.first_pixel_id, tokenizer.vocab_size - 1]
    ids = np.array(data.draw(st.lists(st.sampled_from(few), max_size=60)), dtype=tokenizer.dtype)
    batch = windows(ids, tokenizer)
    builder = WindowBuilder(tokenizer)
    one_by_one = [builder.append(i).copy() for i in ids]
    assert np.array_equal(builder.array(), batch)
    assert np.array_equal(np.array(one_by_one).reshape(-1, 3, 3), batch)
    assert np.array_equal(batch[:, 1, 1], ids)
    assert not batch[:, [1, 2, 2, 2], [2, 0, 1, 2]].any()
    cut = data.draw(st.integers(0, len(ids)))
    assert np.array_equal(windows(ids[:cut], tokenizer), batch[:cut])


def test_golden_windows() -> None:
    tokenizer = TOKENIZERS["compat"]
    ids = tokenizer.encode_ids(np.array([[60, 61, 62], [70, 71, 72]], dtype=np.uint8), None)[-8:]
    assert ids.tolist() == [60, 61, 62, 1, 70, 71, 72, 2]
    found = windows(ids, tokenizer)
    assert found.dtype == np.uint8
    assert found[4].tolist() == [[0, 60, 61], [0, 70, 0], [0, 0, 0]]
    assert found[5].tolist() == [[60, 61, 62], [70, 71, 0], [0, 0, 0]]
    assert found[6].tolist() == [[61, 62, 1], [71, 72, 0], [0, 0, 0]]
    assert found[7].tolist() == [[62, 1, 0], [72, 2, 0], [0, 0, 0]]
    text = windows([32, 33, 34, 2], tokenizer)
    assert text[:, 1, 1].tolist() == [32, 33, 34, 2]
    assert text[:, 1, 0].tolist() == [0, 32, 33, 34]
    assert not text[:, 0].any()


def test_builder_grows_and_returns_the_window() -> None:
    """More tokens than the first buffer holds, in one long line below another."""
    tokenizer = TOKENIZERS["bytes"]
    pixel = tokenizer.first_pixel_id
    ids = [pixel + i % 7 for i in range(150)] + [tokenizer.row_id] + [pixel + i % 5 for i in range(150)]
    builder = WindowBuilder(tokenizer)
    builder.extend(ids)
    assert len(builder) == 301
    assert np.array_equal(builder.array(), windows(ids, tokenizer))


def test_bad_input() -> None:
    tokenizer = TOKENIZERS["compat"]
    with pytest.raises(ValueError, match="ids must be 0..112, got 5..113"):
        windows([5, 113], tokenizer)
    with pytest.raises(ValueError, match=r"shape \(L,\)"):
        windows([[5, 6]], tokenizer)
    with pytest.raises(TypeError, match="integers"):
        windows([0.5], tokenizer)
    with pytest.raises(ValueError, match="token must be 0..112, got -1"):
        WindowBuilder(tokenizer).append(-1)
    assert windows([], tokenizer).shape == (0, 3, 3)
