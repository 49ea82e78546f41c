"""`causal_conv1d` with SiLU, width 4, against `F.conv1d` + SiLU on a tensor of the same layout."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from benchmarks import counts, plain
from benchmarks.contestants import auto, backends, peer_convolutions
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
from pixelbytes_kernels import causal_conv1d, causal_conv1d_ref
from pixelbytes_kernels.testing import Inputs

OP = "causal_conv1d"
WIDTH = 4
CASES = {  # batch, seqlen, dim
    "cpu": [(2, 256, 128), (32, 256, 128), (8, 1024, 512), (1, 37, 81)],
    "cuda": [(32, 256, 128), (8, 1024, 512), (32, 1024, 512), (1, 37, 81)],
}


def conv_inputs(setup: Setup, batch: int, seqlen: int, dim: int, channels_last: bool) -> Inputs:
    gen = torch.Generator().manual_seed(0)
    x = torch.randn(batch, dim, seqlen, generator=gen).to(setup.dtype)
    return setup.place(
        {
            "x": x.transpose(1, 2).contiguous().transpose(1, 2) if channels_last else x,
            "weight": (torch.randn(dim, WIDTH, generator=gen) * 0.5).to(setup.dtype),
            "bias": (torch.randn(dim, generator=gen) * 0.1).to(setup.dtype),
        }
    )


def contestants(setup: Setup) -> dict[str, Callable[..., Any]]:
    ours = functools.partial(causal_conv1d, activation="silu")
    return {
        **backends(setup, OP, ours),
        "F.conv1d": plain.conv_silu,
        "reference": functools.partial(causal_conv1d_ref, activation="silu"),
        "compile": plain.compiled(plain.conv_silu),
        **peer_convolutions(),
    }


def rows(setup: Setup) -> Iterator[Row]:
    entrants = contestants(setup)
    left_out = {"torch", "reference", "compile"} if setup.quick else set()
    chosen = [c for c in entrants if c not in left_out and c not in setup.without]
    for batch, seqlen, dim in CASES[setup.kind]:
        for channels_last in (False, True):
            sizes = f"batch={batch} seqlen={seqlen} dim={dim} {'channels last' if channels_last else 'time last'}"
            setup.report(f"{OP} {sizes} {setup.dtype_name}")
            inputs = conv_inputs(setup, batch, seqlen, dim, channels_last)
            found = {c: refusal(entrants[c], entrants["reference"], inputs) for c in chosen if c != "reference"}
            refused = {c: why for c, why in found.items() if why}
            wanted: list[Tensor] = [t.requires_grad_() for t in inputs.values()]
            calls = {c: functools.partial(entrants[c], **inputs) for c in chosen if c not in refused}
            runs = {c: timed_pass(setup, call, wanted) for c, call in calls.items()}
            work = counts.conv(batch, seqlen, dim, WIDTH, setup.itemsize)
            yield from measure(setup, OP, sizes, runs, refused, share=0.5, work=work, backend=auto(setup, OP))
            activation = setup.itemsize * batch * seqlen * dim
            kept = {c: saved_bytes(call, wanted[1:]) / activation for c, call in calls.items() if c != "compile"}
            unit = "activation tensors"
            yield from value_rows(setup, OP, "saved for backward", sizes, kept, unit, "weights not counted")


def workload(setup: Setup, contestant: str, sizes: Mapping[str, int]) -> Run:
    inputs = conv_inputs(setup, sizes["batch"], sizes["seqlen"], sizes["dim"], channels_last=True)
    wanted: list[Tensor] = [t.requires_grad_() for t in inputs.values()]
    return timed_pass(setup, functools.partial(contestants(setup)[contestant], **inputs), wanted)


def peaks(setup: Setup) -> Iterator[Row]:
    if setup.quick:
        return
    sizes = dict(zip(("batch", "seqlen", "dim"), CASES[setup.kind][2], strict=True))
    setup.report(f"{OP} {words(sizes)}: peak memory")
    found = {
        c: peak_bytes(setup, OP, c, sizes, functools.partial(workload, setup, c, sizes)) for c in (OURS, "F.conv1d")
    }
    yield from value_rows(setup, OP, PEAK_OF[setup.kind], f"{words(sizes)} channels last", found, "bytes")


PARTS = {"speed": rows, "peaks": peaks}
