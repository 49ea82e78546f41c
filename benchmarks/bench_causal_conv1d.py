"""`causal_conv1d` with SiLU, width 4, against `F.conv1d` + SiLU on a tensor of the same layout."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks import plain
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
)
from pixelbytes_kernels import causal_conv1d, causal_conv1d_ref
from pixelbytes_kernels.testing import Inputs

OP = "causal_conv1d"
WIDTH = 4
CASES = [(2, 256, 128), (32, 256, 128), (8, 1024, 512), (1, 37, 81)]  # batch, seqlen, dim
GOAL = Goal(2.5, 5)


def conv_inputs(batch: int, seqlen: int, dim: int, channels_last: bool) -> Inputs:
    gen = torch.Generator().manual_seed(0)
    x = torch.randn(batch, dim, seqlen, generator=gen)
    return {
        "x": x.transpose(1, 2).contiguous().transpose(1, 2) if channels_last else x,
        "weight": torch.randn(dim, WIDTH, generator=gen) * 0.5,
        "bias": torch.randn(dim, generator=gen) * 0.1,
    }


def rows(setup: Setup) -> Iterator[Row]:
    ours, reference = (functools.partial(op, activation="silu") for op in (causal_conv1d, causal_conv1d_ref))
    contestants: dict[str, Callable[..., Any]] = {
        OURS: ours,
        "F.conv1d": plain.conv_silu,
        "torch path": functools.partial(ours, backend="torch"),
    }
    chosen = [OURS, "F.conv1d"] if setup.quick else list(contestants)
    for batch, seqlen, dim in CASES:
        for channels_last in (False, True):
            sizes = f"batch={batch} seqlen={seqlen} dim={dim} {'channels last' if channels_last else 'time last'}"
            setup.report(f"{OP} {sizes}")
            inputs = conv_inputs(batch, seqlen, dim, channels_last)
            found = {c: refusal(contestants[c], reference, inputs) for c in chosen}
            refused = {c: why for c, why in found.items() if why}
            wanted: list[Tensor] = [t.requires_grad_() for t in inputs.values()]
            calls = {c: functools.partial(contestants[c], **inputs) for c in chosen if c not in refused}
            runs = {c: timed_pass(call, wanted) for c, call in calls.items()}
            measured = alternate(runs, setup.budget / 2, setup.least, setup.most)
            large = batch * seqlen * dim >= 1 << 16
            goals = {"F.conv1d": GOAL} if large else {}
            traffic = 4.0 * 5 * batch * seqlen * dim  # x, out; x, dout, dx
            yield from time_rows(setup, OP, sizes, measured, refused, goals, traffic=traffic)
            activation = 4 * batch * seqlen * dim
            kept = {c: saved_bytes(call, wanted[1:]) / activation for c, call in calls.items()}
            bound = {OURS: Goal(1, at_least=False, of="value")}
            yield from value_rows(
                setup, OP, "saved for backward", sizes, kept, "activation tensors", bound, "weights not counted"
            )
