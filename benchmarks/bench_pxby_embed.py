"""`pxby_embed`, forward + backward, against eager PyTorch (the reference): time, and bytes kept for the backward."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from benchmarks import counts, plain
from benchmarks.contestants import auto, backends
from benchmarks.harness import (
    OURS,
    PEAK_OF,
    Row,
    Run,
    Setup,
    measure,
    peak_bytes,
    refusal,
    saved_bytes,
    timed_pass,
    value_rows,
    words,
)
from pixelbytes_kernels import pxby_embed, pxby_embed_ref
from pixelbytes_kernels.testing import embed_inputs

OP = "pxby_embed"
# batch, seqlen, vocab, dim, dtype of the ids
CASES: list[tuple[int, int, int, int, torch.dtype]] = [
    (32, 256, 113, 64, torch.int64),
    (32, 1024, 113, 64, torch.int64),
    (32, 256, 113, 64, torch.uint8),
    (32, 256, 113, 81, torch.int64),
    (32, 256, 320, 256, torch.int16),
    (1, 64, 113, 64, torch.int64),
    (1, 1, 113, 64, torch.int64),
]


def contestants(setup: Setup) -> dict[str, Callable[..., Tensor]]:
    return {**backends(setup, OP, pxby_embed), "reference": pxby_embed_ref, "compile": plain.compiled(pxby_embed_ref)}


def rows(setup: Setup) -> Iterator[Row]:
    entrants = contestants(setup)
    chosen = [c for c in entrants if not (setup.quick and c == "compile") and c not in setup.without]
    for batch, seqlen, vocab, dim, ids in CASES[: 2 if setup.quick else None]:
        sizes = words(
            {"batch": batch, "seqlen": seqlen, "vocab": vocab, "dim": dim, "ids": str(ids).removeprefix("torch.")}
        )
        setup.report(f"{OP} {sizes} {setup.dtype_name}")
        inputs = setup.place(embed_inputs(batch, seqlen, vocab, dim, dtype=setup.dtype, ids=ids))
        found = {c: refusal(entrants[c], pxby_embed_ref, inputs) for c in chosen if c != "reference"}
        refused = {c: why for c, why in found.items() if why}
        weights = [t.requires_grad_() for t in inputs.values() if t is not None and t.is_floating_point()]
        calls = {c: functools.partial(entrants[c], **inputs) for c in chosen if c not in refused}
        runs = {c: timed_pass(setup, call, weights) for c, call in calls.items()}
        work = counts.embed(batch, seqlen, dim, inputs["tokens"].element_size(), setup.itemsize)
        yield from measure(setup, OP, sizes, runs, refused, share=0.5, work=work, backend=auto(setup, OP))
        kept = {c: saved_bytes(call, weights) for c, call in calls.items() if c != "compile"}
        yield from value_rows(setup, OP, "saved for backward", sizes, kept, "bytes", "weights not counted")


def workload(setup: Setup, contestant: str, sizes: Mapping[str, int]) -> Run:
    shape = (sizes["batch"], sizes["seqlen"], sizes["vocab"], sizes["dim"])
    inputs = setup.place(embed_inputs(*shape, dtype=setup.dtype))
    weights = [t.requires_grad_() for t in inputs.values() if t is not None and t.is_floating_point()]
    return timed_pass(setup, functools.partial(contestants(setup)[contestant], **inputs), weights)


def peaks(setup: Setup) -> Iterator[Row]:
    if setup.quick:
        return
    sizes = {"batch": 32, "seqlen": 1024, "vocab": 113, "dim": 64}
    setup.report(f"{OP} {words(sizes)}: peak memory")
    found = {
        c: peak_bytes(setup, OP, c, sizes, functools.partial(workload, setup, c, sizes)) for c in (OURS, "reference")
    }
    yield from value_rows(setup, OP, PEAK_OF[setup.kind], words(sizes), found, "bytes")


PARTS = {"speed": rows, "peaks": peaks}
