"""Every op on every usable backend of a device against the float64 oracle, before anything is timed.

Small odd sizes and the notebook's, forward and all gradients. On a machine with several GPUs each of them is checked.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from benchmarks.contestants import auto, backends
from benchmarks.harness import OURS, Row, Setup, refusal
from benchmarks.scans import OPS as SCANS
from pixelbytes_kernels import causal_conv1d, causal_conv1d_ref, pxby_embed, pxby_embed_ref
from pixelbytes_kernels.testing import Inputs, conv_inputs, embed_inputs, scan_inputs

OP = "numerics"


def cases(setup: Setup) -> Iterator[tuple[str, Callable[..., Any], Callable[..., Any], str, Inputs]]:
    """Op, its function, its reference, what is special, inputs."""
    dtype = setup.dtype
    for name, (op, reference) in SCANS.items():
        yield name, op, reference, "odd sizes", scan_inputs(2, 20, 37, 5, dtype=dtype)
        yield (
            name,
            op,
            reference,
            "dstate 16, channels last",
            scan_inputs(2, 64, 130, 16, dtype=dtype, channels_last=True),
        )
    ours, plain = (functools.partial(f, activation="silu") for f in (causal_conv1d, causal_conv1d_ref))
    for last in (False, True):
        layout = "channels last" if last else "time last"
        yield "causal_conv1d", ours, plain, layout, conv_inputs(2, 20, 37, dtype=dtype, channels_last=last)
    yield "pxby_embed", pxby_embed, pxby_embed_ref, "odd sizes", embed_inputs(2, 37, dim=81, dtype=dtype)
    yield "pxby_embed", pxby_embed, pxby_embed_ref, "2,048 tokens", embed_inputs(8, 256, dtype=dtype)


def rows(setup: Setup, ops: Sequence[str]) -> Iterator[Row]:
    """A row for each case of `ops` and each backend: 1 where it keeps the contract, 0 and the reason where it does not."""
    for name, op, reference, about, inputs in cases(setup):
        if name not in ops:
            continue
        setup.report(f"{OP} {name}, {about}, {setup.dtype_name}, {setup.device}")
        placed = setup.place(inputs)
        for contestant, call in backends(setup, name, op).items():
            why = refusal(call, reference, placed)
            backend = auto(setup, name) if contestant == OURS else contestant
            where = f"{about}, {setup.device}"
            yield setup.row(OP, name, where, contestant, float(not why), "passed", backend=backend, note=why)
