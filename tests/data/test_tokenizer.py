from __future__ import annotations

import json
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pixelbytes.palette import NES55
from pixelbytes.tokenizer import Block, PixelBytesTokenizer, normalise_text

COMPAT = PixelBytesTokenizer()
BYTES = PixelBytesTokenizer("bytes")
BOTH = pytest.mark.parametrize("tokenizer", [COMPAT, BYTES], ids=["compat", "bytes"])


def test_compat_vocabulary_is_upstreams() -> None:
    """Upstream's 113 ids in upstream's order; a shifted id makes every published checkpoint useless."""
    words = [b"\0", b"\t", b"\n", b" ", b'"', b"'", b"(", b")", b"*", b",", b"-", b"+", b"."]
    words += [str(digit).encode() for digit in range(10)]
    words += [b"\xc2", b"\xa0", b":", b"[", b"]", b";", b"/", b"%", b"!"]
    words += [bytes([letter]) for letter in range(ord("a"), ord("z") + 1)]
    colours = """000000 fcfcfc f8f8f8 bcbcbc 7c7c7c a4e4fc 3cbcfc 0078f8 0000fc b8b8f8 6888fc 0058f8 0000bc d8b8f8
        9878f8 6844fc 4428bc f8b8f8 f878f8 d800cc 940084 f8a4c0 f85898 e40058 a80020 f0d0b0 f87858 f83800 a81000 fce0a8
        fca044 e45c10 881400 f8d878 f8b800 ac7c00 503000 d8f878 b8f818 00b800 007800 b8f8b8 58d854 00a800 006800 b8f8d8
        58f898 00a844 005800 00fcfc 00e8d8 008888 004058 f8d8f8 787878"""
    expected = [*words, *(tuple(bytes.fromhex(c)) for c in colours.split())]
    assert list(COMPAT.vocab) == expected and list(COMPAT.vocab.values()) == list(range(113))
    assert len(COMPAT) == len(COMPAT.vocab) == COMPAT.vocab_size == 113
    assert (COMPAT.null_id, COMPAT.row_id, COMPAT.end_id, COMPAT.first_pixel_id, COMPAT.white_id) == (0, 1, 2, 58, 59)
    assert COMPAT.dtype == np.uint8
    assert PixelBytesTokenizer(vocab=None) == COMPAT


def test_bytes_vocabulary_holds_every_byte_and_its_own_separators() -> None:
    assert BYTES.vocab_size == 3 + 256 + 55 and BYTES.dtype == np.int16
    ids = {BYTES.vocab[bytes([b])] for b in range(256)}
    assert len(ids) == 256 and not ids & {BYTES.null_id, BYTES.row_id, BYTES.end_id}
    assert sorted(BYTES.ids_to_tokens) == list(range(314))


def test_row_golden_vector() -> None:
    """Header '(2, 3)', image with its separators, caption: ids as upstream's tables give them."""
    image = NES55[np.array([[2, 3, 4], [12, 13, 14]])]  # ids 60 61 62 / 70 71 72
    ids = COMPAT.encode(image, "ab")
    assert ids.tolist() == [6, 15, 9, 3, 16, 7, 2, 60, 61, 62, 1, 70, 71, 72, 2, 32, 33, 2]
    assert ids.dtype == np.uint8
    first = COMPAT.encode(image, "ab", order="text-first")
    assert first.tolist() == [32, 33, 2, 6, 15, 9, 3, 16, 7, 2, 60, 61, 62, 1, 70, 71, 72, 2]
    assert COMPAT.encode(caption="ab").tolist() == [32, 33, 2]
    assert COMPAT.encode(image).tolist() == ids.tolist()[:-3]
    assert COMPAT.encode(caption="").tolist() == [2]


@given(st.text(st.characters(exclude_categories=("Cs",)), max_size=40))
@settings(deadline=None)
def test_bytes_loses_no_text(text: str) -> None:
    assert BYTES.decode_text(BYTES.encode_text(text)) == text
    assert BYTES.normalise(text) == (text, 0)


@given(st.text(max_size=40))
@settings(deadline=None)
def test_normalised_text_is_always_encodable_and_stays(text: str) -> None:
    plain, altered = normalise_text(text)
    ids = COMPAT.encode_text(text, errors="normalise")
    assert COMPAT.decode_text(ids) == plain == COMPAT.decode_text(COMPAT.encode_text(plain))
    assert normalise_text(plain) == (plain, 0)
    assert altered <= len(text) and (altered > 0) == (plain != text)
    assert not set(ids.tolist()) & {COMPAT.null_id, COMPAT.row_id, COMPAT.end_id}


def test_normalised_french_stays_readable() -> None:
    assert normalise_text("Cœur brisé — l’été\u00a0!") == ("coeur brise - l'ete !", 8)
    assert normalise_text("a\nb?") == ("a b", 2)


def test_strict_names_the_character() -> None:
    with pytest.raises(ValueError, match="character 2 \\('é'\\) is not in the 'compat' vocabulary"):
        COMPAT.encode_text("caé")
    with pytest.raises(ValueError, match="'A'"):
        COMPAT.encode_text("A")
    with pytest.raises(ValueError, match=r"'\\n'"):  # would end the block
        COMPAT.encode_text("a\nb")
    with pytest.raises(ValueError, match="no Unicode text"):
        BYTES.encode_text("a\ud800")
    with pytest.raises(TypeError, match="text must be str, got bytes"):
        BYTES.encode_text(b"a")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="errors must be"):
        BYTES.encode_text("a", errors="ignore")  # type: ignore[arg-type]


@BOTH
def test_images_come_back(tokenizer: PixelBytesTokenizer) -> None:
    pixels = NES55[np.random.default_rng(1).integers(0, 55, (4, 7))]
    grid = tokenizer.encode_image(Image.fromarray(pixels))
    assert grid.shape == (4, 7) and grid.dtype == tokenizer.dtype
    assert tokenizer.is_pixel(grid).all()
    assert np.array_equal(tokenizer.decode_image(grid), pixels)
    assert not tokenizer.is_pixel(tokenizer.encode_text("(4, 7)")).any()


def test_alpha_is_laid_on_white() -> None:
    clear = np.zeros((1, 2, 4), dtype=np.uint8)
    clear[0, 1] = [0, 0, 0, 255]
    expected = [[COMPAT.white_id, COMPAT.first_pixel_id]]
    assert COMPAT.encode_image(clear).tolist() == expected
    assert COMPAT.encode_image(Image.fromarray(clear)).tolist() == expected
    palette_image = Image.fromarray(clear).convert("LA")
    assert COMPAT.encode_image(palette_image).tolist() == expected


@pytest.mark.parametrize(
    ("image", "error", "words"),
    [
        (np.zeros((3, 3), dtype=np.uint8), ValueError, r"\(H, W, 3\)"),
        (np.zeros((0, 3, 3), dtype=np.uint8), ValueError, r"got \(0, 3, 3\)"),
        (np.zeros((2, 2, 3)), TypeError, "uint8, got float64"),
        (Image.new("RGB", (0, 3)), ValueError, "empty"),
    ],
)
def test_bad_images(image, error, words) -> None:
    with pytest.raises(error, match=words):
        COMPAT.encode_image(image)


def test_bad_ids() -> None:
    for ids in ([113], [-1]):
        with pytest.raises(ValueError, match=r"ids must be 0\.\.112"):
            COMPAT.decode(ids)
    with pytest.raises(ValueError, match="pixel ids 58..112"):
        COMPAT.decode_image([[57]])
    with pytest.raises(TypeError, match="integers"):
        COMPAT.decode([1.5])
    with pytest.raises(ValueError, match="image or caption"):
        COMPAT.encode()
    with pytest.raises(ValueError, match="vocab must be"):
        PixelBytesTokenizer("utf-16")
    with pytest.raises(ValueError, match="order must be"):
        COMPAT.encode(caption="a", order="both")  # type: ignore[arg-type]


def test_tokens_and_ids() -> None:
    assert COMPAT.convert_tokens_to_ids([b"a", (0, 0, 0), "b"]) == [32, 58, 33]
    assert COMPAT.convert_tokens_to_ids((252, 252, 252)) == 59
    assert COMPAT.convert_ids_to_tokens([32, 59]) == [b"a", (252, 252, 252)]
    assert COMPAT.convert_ids_to_tokens(0) == b"\0"
    assert COMPAT.get_vocab() == COMPAT.vocab and COMPAT.get_vocab() is not COMPAT.vocab
    with pytest.raises(ValueError, match="b'A' is not in"):
        COMPAT.convert_tokens_to_ids([b"A"])
    with pytest.raises(ValueError, match="0..112"):
        COMPAT.convert_ids_to_tokens([113])


@BOTH
def test_split_and_decode_of_a_row(tokenizer: PixelBytesTokenizer) -> None:
    image = NES55[np.array([[2, 3, 4], [12, 13, 14]])]
    ids = tokenizer.encode(image, "chat")
    assert tokenizer.split(ids) == [
        Block("text", 0, 7, True, (2, 3)),
        Block("image", 7, 15, True),
        Block("text", 15, 20, True),
    ]
    header, picture, text = tokenizer.decode(ids)
    assert header == ("header", (2, 3)) and text == ("text", "chat")
    assert picture[0] == "image" and np.array_equal(picture[1], image)
    assert [kind for kind, _ in tokenizer.decode(ids, min_pixels=7)] == ["header", "text"]


@BOTH
def test_decode_of_ragged_rows_and_missing_separators(tokenizer: PixelBytesTokenizer) -> None:
    p, row, end = tokenizer.first_pixel_id, tokenizer.row_id, tokenizer.end_id
    letters = tokenizer.encode_text("hi").tolist()
    found = tokenizer.decode([p, p, p, row, p, row, row, p, p, *letters, p, end, end, *letters])
    assert [kind for kind, _ in found] == ["image", "text", "image", "text"]
    black, white = [0, 0, 0], [252, 252, 252]
    assert found[0][1].tolist() == [[black] * 3, [black, white, white], [white] * 3, [black, black, white]]
    assert found[1][1] == found[3][1] == "hi"
    assert found[2][1].shape == (1, 1, 3)


@given(st.sampled_from([COMPAT, BYTES]), st.data())
@settings(deadline=None)
def test_any_sequence_comes_apart(tokenizer: PixelBytesTokenizer, data) -> None:
    """Blocks cover every id once, hold one modality, and decoding keeps every pixel."""
    few = [0, tokenizer.row_id, tokenizer.end_id, *tokenizer.encode_text("(1, )").tolist()]
    few += [tokenizer.first_pixel_id, tokenizer.vocab_size - 1]
    ids = np.array(data.draw(st.lists(st.sampled_from(few), max_size=40)), dtype=tokenizer.dtype)
    blocks = tokenizer.split(ids)
    assert [b.start for b in blocks] == [0, *(b.stop for b in blocks[:-1])][: len(blocks)]
    assert (blocks[-1].stop if blocks else 0) == len(ids)
    for block in blocks:
        part = ids[block.start : block.stop]
        assert tokenizer.is_pixel(part).any() == (block.kind == "image")
        assert block.kind == "text" or tokenizer.decode_text(part) == ""
        assert block.complete == (part[-1] == tokenizer.end_id) and tokenizer.end_id not in part[:-1]
    black = sum((image == NES55[0]).all(-1).sum() for kind, image in tokenizer.decode(ids) if kind == "image")
    assert black == (ids == tokenizer.first_pixel_id).sum()


@BOTH
def test_save_and_load(tokenizer: PixelBytesTokenizer, tmp_path) -> None:
    """\\xc2, tab and newline are what upstream's text file loses."""
    for path in (tmp_path / "t.json", tmp_path):
        written = tokenizer.save(path)
        assert written.read_bytes().isascii()
        assert PixelBytesTokenizer.load(path) == tokenizer
    assert not [p for p in tmp_path.iterdir() if p.suffix != ".json"]
    assert pickle.loads(pickle.dumps(tokenizer)) == tokenizer


def test_own_palette(tmp_path) -> None:
    tokenizer = PixelBytesTokenizer("compat", palette=[[255, 0, 0], [255, 255, 255]])
    assert tokenizer.vocab_size == 60 and tokenizer.white_id == 59
    tokenizer.save(tmp_path / "t.json")
    assert PixelBytesTokenizer.load(tmp_path / "t.json") == tokenizer != COMPAT
    many = np.stack([np.arange(200), np.arange(200), np.arange(200)], axis=1)
    assert PixelBytesTokenizer("compat", many).dtype == np.int16


def test_bad_tokenizer_files_are_named(tmp_path) -> None:
    path = tmp_path / "t.json"
    path.write_text("{")
    with pytest.raises(ValueError, match=r"t\.json"):
        PixelBytesTokenizer.load(path)
    path.write_text('{"format": "other"}')
    with pytest.raises(ValueError, match=r"t\.json: not a PixelBytes tokenizer"):
        PixelBytesTokenizer.load(path)
    data = COMPAT.to_dict()
    data["tokens"][5:7] = data["tokens"][6:4:-1]
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=r"t\.json: the tokens differ"):
        PixelBytesTokenizer.load(path)
