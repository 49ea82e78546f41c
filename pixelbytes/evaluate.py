"""How well a model predicts rows, for each modality, beside what costs nothing."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from tqdm.auto import tqdm

from pixelbytes.models.common import IGNORE, SequenceModel
from pixelbytes.rows import KINDS, start_length, token_kinds
from pixelbytes.tokenizer import PixelBytesTokenizer

BASELINES = ("majority", "copy", "copy_up")
ALL = "all"
_LEGEND = "bits: per pixel and per byte of text. over best: points above the best trivial baseline."


def evaluate(
    model: SequenceModel,
    rows: Sequence[NDArray[Any]],
    tokenizer: PixelBytesTokenizer,
    *,
    train_rows: Sequence[NDArray[Any]],
    seq_length: int = 256,
    targets: str = "all",
    stride: int = 32,
    batch_size: int = 32,
    device: str | torch.device | None = None,
    progress: bool = False,
) -> dict[str, dict[str, Any]]:
    """Accuracy and loss on `rows`, with the trivial baselines on the very same targets.

    Baselines: `majority` (the commonest token of the kind in `train_rows`), `copy` (the token again), `copy_up` (the
    upper right cell of the window, which is the pixel above the target).

    Args:
        rows: (L, 3, 3) arrays without a start.
        train_rows: what the majority is counted on.
        seq_length: windows a model sees at once. In longer rows each target has at least half of them before it.
        targets: "all": every token of every row is a target once (causal models). "last": one in `stride` is.
        batch_size: windows a batch.
        device: default where the model is.
        progress: show a bar on a terminal.

    Returns:
        For "all" and each of rows.KINDS that occurs: `targets`, `accuracy` (percent), `nats` and `bits` per target (per
        pixel, per byte), `baselines` (percent), `margin` (accuracy over the best baseline, in points).
    """
    if targets == "all" and not model.causal:
        raise ValueError("targets: 'all' needs a causal model, this one is bidirectional; use 'last'")
    if not rows:
        raise ValueError("rows: nothing to evaluate")
    device = torch.device(device or next(model.parameters()).device)
    majority = _majority(train_rows, tokenizer)  # (kinds,)
    kind_of: list[NDArray[Any]] = []
    nats: list[NDArray[Any]] = []
    hits: list[NDArray[Any]] = []  # of the model and of each baseline, (targets, 1 + baselines)
    was_training = model.training
    model.eval()
    batches = list(_batches(rows, tokenizer, seq_length, targets, stride, batch_size))
    for x, target, kind in tqdm(batches, desc="Evaluate", disable=None if progress else True, leave=False):
        with torch.no_grad():
            windows = torch.from_numpy(x).to(device)
            logits, wanted = model.logits_for(windows, torch.from_numpy(target).to(device))
            loss = F.cross_entropy(logits.float(), wanted, ignore_index=IGNORE, reduction="none").cpu().numpy()
            guess = logits.argmax(-1).cpu().numpy()
        if targets == "last":
            x = x[:, -1:]
        target, kind, x = target.ravel(), kind.ravel(), x.reshape(-1, 3, 3)
        guesses = np.stack([guess, majority[kind], x[:, 1, 1], x[:, 0, 2]], axis=1)
        kept = target != IGNORE
        kind_of.append(kind[kept])
        nats.append(loss[kept])
        hits.append((guesses == target[:, None])[kept])
    model.train(was_training)
    kinds, losses, right = np.concatenate(kind_of), np.concatenate(nats).astype(np.float64), np.concatenate(hits)
    masks = {ALL: np.ones(len(kinds), dtype=bool)} | {name: kinds == i for i, name in enumerate(KINDS)}
    return {name: _summary(losses[mask], right[mask]) for name, mask in masks.items() if mask.any()}


def _summary(losses: NDArray[np.float64], right: NDArray[np.bool_]) -> dict[str, Any]:
    accuracy, *baselines = (100 * right.mean(axis=0)).tolist()
    nats = float(losses.mean())
    return {
        "targets": len(losses),
        "accuracy": accuracy,
        "nats": nats,
        "bits": nats / math.log(2),
        "baselines": dict(zip(BASELINES, baselines, strict=True)),
        "margin": accuracy - max(baselines),
    }


def _majority(rows: Sequence[NDArray[Any]], tokenizer: PixelBytesTokenizer) -> NDArray[np.int64]:
    """The commonest id of each kind."""
    counts = np.zeros((len(KINDS), tokenizer.vocab_size), dtype=np.int64)
    for row in rows:
        ids = row[:, 1, 1]
        np.add.at(counts, (token_kinds(ids, tokenizer), ids), 1)
    return counts.argmax(axis=1)


def _batches(
    rows: Sequence[NDArray[Any]],
    tokenizer: PixelBytesTokenizer,
    seq_length: int,
    targets: str,
    stride: int,
    batch_size: int,
) -> Iterator[tuple[NDArray[Any], NDArray[np.int64], NDArray[np.int8]]]:
    """Windows (B, seq_length, 3, 3), targets and their kinds, (B, seq_length) or, for "last", (B,)."""
    lead = start_length(targets, seq_length)
    xs: list[NDArray[Any]] = []
    wanted: list[Any] = []
    kinds: list[Any] = []
    for row in rows:
        ids = row[:, 1, 1]
        kind = token_kinds(ids, tokenizer)
        padded = np.concatenate([np.zeros((lead, 3, 3), dtype=row.dtype), row])
        for start, first, stop in _spans(len(row), seq_length, targets, stride):
            # The window at `start` of the padded row predicts tokens start + 1 - lead onwards; first:stop are counted.
            window = np.zeros((seq_length, 3, 3), dtype=row.dtype)
            part = padded[start : start + seq_length]
            window[: len(part)] = part
            xs.append(window)
            if targets == "last":
                wanted.append(int(ids[first]))
                kinds.append(kind[first])
            else:
                target = np.full(seq_length, IGNORE, dtype=np.int64)
                of_kind = np.zeros(seq_length, dtype=np.int8)
                target[first - start : stop - start] = ids[first:stop]
                of_kind[first - start : stop - start] = kind[first:stop]
                wanted.append(target)
                kinds.append(of_kind)
            if len(xs) == batch_size:
                yield np.stack(xs), np.array(wanted, dtype=np.int64), np.array(kinds, dtype=np.int8)
                xs, wanted, kinds = [], [], []
    if xs:
        yield np.stack(xs), np.array(wanted, dtype=np.int64), np.array(kinds, dtype=np.int8)


def _spans(length: int, seq_length: int, targets: str, stride: int) -> Iterator[tuple[int, int, int]]:
    """(start of a window in the padded row, first and end of the tokens that it is asked for)."""
    if targets == "last":
        for first in range(0, length, stride):
            yield first, first, first + 1
        return
    yield 0, 0, min(length, seq_length)
    done = seq_length
    hop = max(1, seq_length // 2)
    while done < length:
        stop = min(length, done + hop)
        yield stop - seq_length, done, stop
        done = stop


def format_table(metrics: dict[str, dict[str, Any]]) -> str:
    """The result of `evaluate` as a table of fixed width."""
    lines = [
        f"{'':<10}{'targets':>9}{'nats':>8}{'bits':>8}{'accuracy':>10} |{'majority':>9}{'copy':>8}{'copy up':>9} |"
        f"{'over best':>10}"
    ]
    for name in (*KINDS, ALL):
        if name in metrics:
            m = metrics[name]
            b = m["baselines"]
            lines.append(
                f"{name:<10}{m['targets']:>9}{m['nats']:>8.3f}{m['bits']:>8.3f}{m['accuracy']:>9.2f}% |"
                f"{b['majority']:>8.2f}%{b['copy']:>7.2f}%{b['copy_up']:>8.2f}% |{m['margin']:>+10.2f}"
            )
    return "\n".join([*lines, _LEGEND])
