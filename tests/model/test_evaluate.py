"""Evaluation: kinds of tokens, baselines, each target once."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import torch
from model_forms import make
from torch import nn

from pixelbytes.evaluate import evaluate, format_table
from pixelbytes.models.common import SequenceModel
from pixelbytes.neighborhood import windows
from pixelbytes.rows import KINDS, token_kinds, with_start


class Copies(SequenceModel):
    """Says the centre (or another cell) again, with probability almost 1."""

    def __init__(self, cell=(1, 1), causal=True):
        super().__init__()
        self.cell, self.vocab_size, self.causal = cell, 113, causal
        self.nothing = nn.Parameter(torch.zeros(()))

    def hidden(self, x):
        return nn.functional.one_hot(x[:, :, self.cell[0], self.cell[1]].long(), 113).float() * 30

    def head(self, h):
        return h + self.nothing


def test_kinds_of_a_row(tokenizer):
    ids = tokenizer.encode(np.zeros((2, 3, 3), np.uint8), "(3, 4)")  # a text that looks like a header is a text
    kinds = [KINDS[k] for k in token_kinds(ids, tokenizer)]
    header, line, text = ["structure"] * 7, [*["pixel"] * 3, "structure"], [*["text"] * 6, "structure"]
    assert kinds == header + line * 2 + text


@pytest.mark.parametrize("seq_length", [8, 31, 200])
def test_each_token_is_a_target_once(seq_length, rows, tokenizer):
    result = evaluate(make("rnn"), rows, tokenizer, train_rows=rows, seq_length=seq_length, batch_size=5)
    count = Counter(KINDS[k] for row in rows for k in token_kinds(row[:, 1, 1], tokenizer))
    assert {name: result[name]["targets"] for name in KINDS} == dict(count)
    assert result["all"]["targets"] == sum(len(row) for row in rows)


@pytest.mark.parametrize("targets", ["all", "last"])
def test_models_that_copy_are_the_baselines(targets, rows, tokenizer):
    for cell, baseline in (((1, 1), "copy"), ((0, 2), "copy_up")):
        result = evaluate(
            Copies(cell), rows, tokenizer, train_rows=rows, seq_length=32, targets=targets, stride=1, batch_size=7
        )
        for m in result.values():
            assert m["accuracy"] == m["baselines"][baseline]
            assert m["margin"] == m["accuracy"] - max(m["baselines"].values())
            # A wrong answer costs 30 nats, a right one nothing.
            assert m["nats"] == pytest.approx(30 * (1 - m["accuracy"] / 100), abs=1e-3)
            assert m["bits"] == pytest.approx(m["nats"] / math.log(2))


def test_baselines_by_hand(tokenizer):
    white, black = tokenizer.white_id, tokenizer.first_pixel_id
    grid = np.array([[white, black], [black, black]])
    row = windows(tokenizer.encode_ids(grid, tokenizer.encode_text("aab")), tokenizer)
    result = evaluate(Copies(), [row], tokenizer, train_rows=[row], seq_length=64)
    # Pixels: w b | b b, after the header's end, w, the row's end and b. Only the last has a pixel above it in sight:
    # at the first of a line, the window belongs to the row's end.
    assert result["pixel"]["baselines"] == {"majority": 75.0, "copy": 25.0, "copy_up": 25.0}
    assert result["text"]["baselines"] == {
        "majority": pytest.approx(200 / 3),
        "copy": pytest.approx(100 / 3),
        "copy_up": 0,
    }


def test_the_majority_comes_from_the_training_rows(tokenizer):
    def row_of(colour):
        return windows(tokenizer.encode(np.tile(tokenizer.palette[colour], (2, 2, 1))), tokenizer)

    result = evaluate(Copies(), [row_of(5)], tokenizer, train_rows=[row_of(6)], seq_length=64)
    assert result["pixel"]["baselines"]["majority"] == 0
    assert "text" not in result


def test_windows_of_longer_rows_are_those_of_training(rows, tokenizer):
    """The loss of a causal model on a row that fits equals the loss that training would compute."""
    model = make("attention").eval()
    result = evaluate(model, rows[:1], tokenizer, train_rows=rows, seq_length=64)
    x = torch.from_numpy(with_start(rows[:1], 1)[0])[None]
    target = torch.from_numpy(rows[0][:, 1, 1].astype(np.int64))[None]
    loss, n = model.loss(x[:, :-1], target)
    assert result["all"]["targets"] == n
    assert result["all"]["nats"] == pytest.approx(loss.item(), rel=1e-5)


def test_errors_and_table(rows, tokenizer):
    with pytest.raises(ValueError, match="needs a causal model"):
        evaluate(make("rnn-bi"), rows, tokenizer, train_rows=rows)
    with pytest.raises(ValueError, match="nothing to evaluate"):
        evaluate(make("rnn"), [], tokenizer, train_rows=rows)
    table = format_table(evaluate(make("rnn"), rows, tokenizer, train_rows=rows, seq_length=64))
    assert [line.split()[0] for line in table.splitlines()] == ["targets", *KINDS, "all", "bits:"]
