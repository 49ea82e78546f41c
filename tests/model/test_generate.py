"""Generation: well-formed rows, prompts, draws."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from model_forms import FORMS, make
from PIL import Image

from pixelbytes.generate import Prompt, generate, pick
from pixelbytes.grammar import Grammar
from pixelbytes.tokenizer import PixelBytesTokenizer

TOKENIZER = PixelBytesTokenizer()
BYTES = PixelBytesTokenizer("bytes")


def sprite(height=3, width=4):
    return Image.fromarray(TOKENIZER.palette[np.arange(height * width).reshape(height, width) % 55])


def assert_well_formed(ids, tokenizer, kinds, max_side=25):
    blocks = tokenizer.split(ids)
    assert all(block.complete for block in blocks)
    assert [("header" if b.size else b.kind) for b in blocks] == kinds
    for header, image in zip(blocks, blocks[1:], strict=False):
        if header.size:
            height, width = header.size
            assert 1 <= height <= max_side and 1 <= width <= max_side
            part = ids[image.start : image.stop].reshape(height, width + 1)
            assert tokenizer.is_pixel(part[:, :-1]).all()
            assert part[:, -1].tolist() == [tokenizer.row_id] * (height - 1) + [tokenizer.end_id]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.booleans(), st.integers(1, 30), st.booleans())
def test_every_walk_through_the_grammar_is_a_row(seed, text_first, max_side, in_bytes):
    tokenizer = BYTES if in_bytes else TOKENIZER
    draw = np.random.default_rng(seed)
    plan = ("text", "image") if text_first else ("image", "text")
    grammar, ids = Grammar(tokenizer, plan, max_side=max_side, max_text=20), []
    while not grammar.done:
        choices = np.flatnonzero(grammar.allowed())
        ids.append(int(draw.choice(choices)))
        grammar.advance(ids[-1])
    kinds = ["text", "header", "image"] if text_first else ["header", "image", "text"]
    assert_well_formed(np.array(ids), tokenizer, kinds, max_side)
    assert np.flatnonzero(grammar.allowed()).tolist() == [tokenizer.end_id]


def test_every_size_can_be_announced():
    for size in [(1, 1), (9, 25), (10, 3), (25, 25), (20, 19)]:
        grammar = Grammar(TOKENIZER, ("image",), max_side=25)
        for token in TOKENIZER.encode_text(str(size)):
            grammar.advance(int(token))
        grammar.advance(TOKENIZER.end_id)
    for text in ["(0", "(26", "(3,4", "(03", "3"]:
        grammar = Grammar(TOKENIZER, ("image",), max_side=25)
        with pytest.raises(ValueError, match="cannot come here"):
            for token in TOKENIZER.encode_text(text):
                grammar.advance(int(token))
    with pytest.raises(ValueError, match="'sound'"):
        Grammar(TOKENIZER, ("sound",))


@pytest.mark.parametrize("name", FORMS)
def test_untrained_models_write_well_formed_rows(name):
    samples = generate(make(name), TOKENIZER, [Prompt(), Prompt("cat")], seed=0, max_side=6, max_text=10, context=16)
    for sample in samples:
        assert_well_formed(sample.ids, TOKENIZER, ["text", "header", "image"], 6)
        assert sample.image is not None and max(sample.image.size) <= 6
    assert samples[1].text.startswith("cat") and not samples[1].text[3:4].isalnum()


def test_a_text_comes_before_its_image():
    exact = generate(make("rnn"), TOKENIZER, [Prompt("a cat", exact=True)], seed=1, max_side=4)[0]
    assert exact.text == "a cat"
    assert exact.ids[:6].tolist() == [*TOKENIZER.encode_text("a cat"), TOKENIZER.end_id]


def test_an_image_comes_back_with_a_text():
    picture = sprite()
    sample = generate(make("rnn"), TOKENIZER, [Prompt("hat", picture)], seed=1)[0]
    assert_well_formed(sample.ids, TOKENIZER, ["header", "image", "text"])
    assert np.array_equal(np.asarray(sample.image), np.asarray(picture))
    assert sample.text.startswith("hat")


def test_lines_of_an_image_can_be_kept():
    picture = sprite(5, 4)
    sample = generate(make("rnn"), TOKENIZER, [Prompt(image=picture, keep_rows=2)], seed=1, max_side=4)[0]
    assert sample.image.size == (4, 5)
    assert np.array_equal(np.asarray(sample.image)[:2], np.asarray(picture)[:2])
    assert not np.array_equal(np.asarray(sample.image)[2:], np.asarray(picture)[2:])
    whole = generate(make("rnn"), TOKENIZER, [Prompt(image=picture, keep_rows=9)], seed=1)[0]
    assert np.array_equal(np.asarray(whole.image), np.asarray(picture))


def test_prompts_of_one_batch_do_not_touch_each_other():
    prompts = [Prompt("cat"), Prompt(image=sprite()), Prompt()]
    together = generate(make("mamba"), TOKENIZER, prompts, temperature=0, max_side=5, max_text=9)
    for prompt, sample in zip(prompts, together, strict=True):
        alone = generate(make("mamba"), TOKENIZER, [prompt], temperature=0, max_side=5, max_text=9)[0]
        assert alone.ids.tolist() == sample.ids.tolist()
    assert generate(make("mamba"), TOKENIZER, []) == []


def test_draws_follow_seed_and_top_k():
    def ids(**options):
        return generate(make("rnn"), TOKENIZER, max_side=5, max_text=9, **options)[0].ids.tolist()

    assert ids(seed=3) == ids(seed=3) != ids(seed=4)
    assert ids(temperature=0) == ids(top_k=1, seed=5)
    scores = np.array([0.0, 1.0, 2.0, -np.inf])
    draw = np.random.default_rng(0)
    assert {pick(scores, 1.0, 2, draw) for _ in range(200)} == {1, 2}
    assert {pick(scores, 1.0, None, draw) for _ in range(400)} == {0, 1, 2}
    counts = np.bincount([pick(scores, 0.5, None, draw) for _ in range(4000)], minlength=4) / 4000
    expected = np.exp(2 * scores) / np.exp(2 * scores).sum()
    assert np.abs(counts - expected).max() < 0.04  # five standard deviations of 4,000 draws
    with pytest.raises(RuntimeError, match="no finite score"):
        pick(np.full(4, np.nan), 1.0, None, draw)


def test_free_models_are_not_held():
    samples = generate(make("rnn"), TOKENIZER, [Prompt()] * 4, seed=0, free=True, max_tokens=120)
    assert all(len(sample.ids) <= 120 for sample in samples)
    assert any(TOKENIZER.split(s.ids)[0].size is None and s.image is not None for s in samples)


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        (Prompt(), {"temperature": -1.0}, "temperature"),
        (Prompt(), {"temperature": float("nan")}, "temperature"),
        (Prompt(), {"top_k": 0}, "top_k"),
        (Prompt(), {"max_tokens": 0}, "max_tokens"),
        (Prompt("日本"), {}, "no character"),
        (Prompt(image=sprite(65, 2)), {}, "at most 64 x 64"),
        (Prompt(keep_rows=1), {}, "no prompt image"),
        (Prompt(image=sprite(), keep_rows=-1), {}, "keep_rows"),
        (Prompt("cat", sprite(), keep_rows=1), {}, "cannot follow"),
    ],
)
def test_bad_requests(prompt, options, message):
    with pytest.raises(ValueError, match=message):
        generate(make("rnn"), TOKENIZER, [prompt], **options)


def test_model_and_tokenizer_must_agree():
    with pytest.raises(ValueError, match="knows 113 ids, the tokenizer has 314"):
        generate(make("rnn"), BYTES)
