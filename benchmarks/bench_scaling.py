"""How time and memory of ours grow with one size at a time, and the exponents of it: 1 is linear."""

from __future__ import annotations

import functools
import math
import os
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks import scans
from benchmarks.bench_causal_conv1d import conv_inputs
from benchmarks.contestants import auto
from benchmarks.harness import BOTH, OURS, Row, Setup, alternate, saved_bytes, timed_pass, why_not, words
from pixelbytes_kernels import causal_conv1d, pxby_embed
from pixelbytes_kernels.testing import Inputs, embed_inputs

OP = "scaling"
SEQLENS = (256, 1024, 4096, 16384, 65536)
Case = dict[str, int]


def scan_series(setup: Setup) -> dict[str, list[Case]]:
    """A GPU is given two thousand rows throughout, that it is full; a CPU is full with two."""
    lengths = SEQLENS[: 3 if setup.quick else None]
    if setup.on_gpu:
        series = {
            "seqlen": [scans.sizes_of(4, n, 512) for n in lengths],
            "batch": [scans.sizes_of(n, 1024, 512) for n in (4, 8, 16, 32)],
            "dim": [scans.sizes_of(4, 1024, n) for n in (512, 1024, 2048, 4096)],
            "dstate": [scans.sizes_of(4, 1024, 512, n) for n in (8, 16, 32, 64)],
        }
    else:
        series = {
            "seqlen": [scans.sizes_of(1, n, 128) for n in lengths],
            "batch": [scans.sizes_of(n, 256, 128) for n in (1, 4, 16, 64)],
            "dim": [scans.sizes_of(2, 256, n) for n in (64, 256, 1024)],
            "dstate": [scans.sizes_of(2, 256, 128, n) for n in (4, 16, 64, 256)],
        }
    return {"seqlen": series["seqlen"]} if setup.quick else series


def row_series(setup: Setup) -> dict[str, list[Case]]:
    """Of the ops without a state."""
    batch, dim = (32, 512) if setup.on_gpu else (16, 128)
    lengths = SEQLENS[: 3 if setup.quick else 4]
    series = {
        "seqlen": [{"batch": batch // 2, "seqlen": n, "dim": dim} for n in lengths],
        "batch": [{"batch": n, "seqlen": 256, "dim": dim} for n in (batch, 4 * batch, 16 * batch)],
        "dim": [{"batch": 2 * batch, "seqlen": 256, "dim": n} for n in (dim // 2, dim, 2 * dim)],
    }
    return {"seqlen": series["seqlen"]} if setup.quick else series


def call_of(setup: Setup, op: str, sizes: Case) -> tuple[Callable[[], Any], list[Tensor]]:
    """A call of ours, and the tensors whose gradients are wanted."""
    function: Callable[..., Any]
    inputs: Inputs
    if op == "pxby_embed":
        function = pxby_embed
        inputs = setup.place(embed_inputs(sizes["batch"], sizes["seqlen"], 113, sizes["dim"], dtype=setup.dtype))
    elif op == "causal_conv1d":
        function = functools.partial(causal_conv1d, activation="silu")
        inputs = conv_inputs(setup, sizes["batch"], sizes["seqlen"], sizes["dim"], channels_last=True)
    else:
        function, inputs = scans.OPS[op][0], scans.scan_case(setup, sizes)
    inputs, wanted = scans.leaves(inputs)
    return functools.partial(function, **inputs), wanted


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Exponent p of y ~ x^p by least squares of the logarithms."""
    return statistics.linear_regression([math.log(v) for v in x], [math.log(v) for v in y]).slope


def one_series(setup: Setup, op: str, varied: str, cases: Sequence[Case]) -> Iterator[Row]:
    """A row of time and one of saved bytes for each size, then the exponents."""
    grown: list[float] = []
    times: list[float] = []
    kept: list[float] = []
    for sizes in cases:
        setup.report(f"{OP} {op} {words(sizes)} {setup.dtype_name}: growth with {varied}")
        name = f"{op} {words(sizes)}"
        try:
            call, wanted = call_of(setup, op, sizes)
            saved = saved_bytes(call)
            measured = alternate({OURS: timed_pass(setup, call, wanted)}, setup.budget / 4, setup.least, setup.most)
        except Exception as failed:
            note = why_not(failed)
            yield setup.row(OP, f"{BOTH}, growth with {varied}", name, OURS, math.nan, "ms", note=note)
            continue
        s = measured[OURS][BOTH]
        grown.append(float(sizes[varied]))
        times.append(s.median)
        kept.append(float(saved))
        yield setup.row(
            OP, f"{BOTH}, growth with {varied}", name, OURS, s.median * 1e3, "ms", low=s.low * 1e3, high=s.high * 1e3,
            backend=auto(setup, op),
        )  # fmt: skip
        yield setup.row(OP, f"saved for backward, growth with {varied}", name, OURS, float(saved), "bytes")
    if len(grown) > 1:
        for what, figures in (("time", times), ("saved bytes", kept)):
            exponent = slope(grown, figures)
            yield setup.row(OP, f"exponent of {what}", f"{op} against {varied}", OURS, exponent, "power")


def thread_series(setup: Setup) -> Iterator[Row]:
    """A CPU's threads, doubled up to its cores."""
    cores = os.cpu_count() or 1
    counts = [n for n in (1, 2, 4, 8, 16, 32, 64) if n <= cores]
    before = torch.get_num_threads()
    times: list[float] = []
    try:
        for n in counts:
            torch.set_num_threads(n)
            sizes = scans.sizes_of(8, 1024, 512)
            setup.report(f"{OP} bidirectional_selective_scan {words(sizes)}: {n} thread(s)")
            call, wanted = call_of(setup, "bidirectional_selective_scan", sizes)
            run = timed_pass(setup, call, wanted)
            s = alternate({OURS: run}, setup.budget / 2, setup.least, setup.most)[OURS][BOTH]
            times.append(s.median)
            name = f"bidirectional_selective_scan {words(sizes)} threads={n}"
            yield setup.row(
                OP, f"{BOTH}, growth with threads", name, OURS, s.median * 1e3, "ms", low=s.low * 1e3,
                high=s.high * 1e3, threads=n, backend=auto(setup, "bidirectional_selective_scan"),
            )  # fmt: skip
    finally:
        torch.set_num_threads(before)
    if len(counts) > 1:
        exponent = slope([float(n) for n in counts], times)
        name = "bidirectional_selective_scan against threads"
        yield setup.row(OP, "exponent of time", name, OURS, exponent, "power", note="-1 is perfect sharing")


def scan_rows(setup: Setup) -> Iterator[Row]:
    for op in ("selective_scan", "bidirectional_selective_scan"):
        for varied, cases in scan_series(setup).items():
            yield from one_series(setup, op, varied, cases)


def other_rows(setup: Setup) -> Iterator[Row]:
    for op in ("causal_conv1d", "pxby_embed"):
        for varied, cases in row_series(setup).items():
            yield from one_series(setup, op, varied, cases)


def thread_rows(setup: Setup) -> Iterator[Row]:
    if not (setup.on_gpu or setup.quick):
        yield from thread_series(setup)


PARTS = {"scans": scan_rows, "others": other_rows, "threads": thread_rows}
