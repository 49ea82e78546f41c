"""`pxby_embed`, forward + backward, against eager PyTorch (the reference): time, and bytes kept for the backward."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks.harness import (
    OURS,
    Goal,
    Row,
    Setup,
    alternate,
    refusal,
    saved_bytes,
    time_rows,
    timed_pass,
    value_rows,
    words,
)
from pixelbytes_kernels import pxby_embed, pxby_embed_ref
from pixelbytes_kernels.testing import embed_inputs

OP = "pxby_embed"
EAGER = "eager"
# batch, seqlen, vocab, dim, dtype of the ids; goals of time against eager PyTorch
CASES: list[tuple[int, int, int, int, torch.dtype, Goal | None]] = [
    (32, 256, 113, 64, torch.int64, Goal(8, 12)),
    (32, 1024, 113, 64, torch.int64, Goal(12, 20)),
    (32, 256, 113, 64, torch.uint8, None),
    (32, 256, 113, 81, torch.int64, None),
    (32, 256, 320, 256, torch.int16, None),
    (1, 64, 113, 64, torch.int64, None),
    (1, 1, 113, 64, torch.int64, None),
]
SAVED_GOAL = Goal(8)


def rows(setup: Setup) -> Iterator[Row]:
    contestants: dict[str, Callable[..., Tensor]] = {
        OURS: pxby_embed,
        EAGER: pxby_embed_ref,
        "torch path": functools.partial(pxby_embed, backend="torch"),
    }
    for batch, seqlen, vocab, dim, ids, goal in CASES[: 2 if setup.quick else None]:
        sizes = words(
            {"batch": batch, "seqlen": seqlen, "vocab": vocab, "dim": dim, "ids": str(ids).removeprefix("torch.")}
        )
        setup.report(f"{OP} {sizes}")
        inputs = embed_inputs(batch, seqlen, vocab, dim, ids=ids)
        found = {c: refusal(op, pxby_embed_ref, inputs) for c, op in contestants.items() if c != EAGER}
        refused = {c: why for c, why in found.items() if why}
        weights = [t.requires_grad_() for t in inputs.values() if t is not None and t.is_floating_point()]
        calls = {c: functools.partial(op, **inputs) for c, op in contestants.items() if c not in refused}
        runs = {c: timed_pass(call, weights) for c, call in calls.items()}
        measured = alternate(runs, setup.budget / 2, setup.least, setup.most)
        # Unavoidable: ids in, twice; output out, its gradient in.
        traffic = 2.0 * inputs["tokens"].nbytes + 2 * batch * seqlen * dim * 4
        goals = {EAGER: goal} if goal else {}
        yield from time_rows(setup, OP, sizes, measured, refused, goals, traffic=traffic)
        kept = {c: saved_bytes(call, weights) for c, call in calls.items()}
        bound = {EAGER: SAVED_GOAL} if goal else {}
        yield from value_rows(setup, OP, "saved for backward", sizes, kept, "bytes", bound, "weights not counted")
