"""A whole training step of BysMamba (loss, gradients, AdamW), against the same weights on plain PyTorch with the
parallel scan.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from benchmarks import plain
from benchmarks.harness import (
    OURS,
    Goal,
    Row,
    Run,
    Setup,
    alternate,
    peak_bytes,
    refusal_of,
    saved_bytes,
    time_rows,
    value_rows,
    words,
)
from pixelbytes.models import BysMamba, MambaConfig
from pixelbytes_kernels import use_backend

OP = "bysmamba"
STEP = {"batch": 32, "seqlen": 256, "dim": 64, "depth": 8}
STEP_GOAL = Goal(10, 20)
SAVED = {"batch": 32, "seqlen": 256, "dim": 256, "depth": 8}
SAVED_GOAL = Goal(1.0e9, 0.5e9, at_least=False, of="value")
SMALL_BATCH = 2  # what the plain formulation keeps grows with the batch alone: measured here, scaled


def make(dim: int, depth: int, dtype: torch.dtype = torch.float32) -> BysMamba:
    torch.manual_seed(0)
    return BysMamba(MambaConfig(dim=dim, depth=depth)).to(dtype)


def windows(batch: int, seqlen: int, vocab_size: int = 113) -> tuple[Tensor, Tensor]:
    gen = torch.Generator().manual_seed(1)
    x = torch.randint(0, vocab_size, (batch, seqlen, 3, 3), generator=gen)
    return x, torch.randint(0, vocab_size, (batch,), generator=gen)


def form(contestant: str, model: BysMamba) -> BysMamba | plain.PlainBysMamba:
    return plain.PlainBysMamba(model) if contestant == "pscan" else model


def gradients(model: BysMamba | plain.PlainBysMamba, weights: BysMamba, x: Tensor, target: Tensor) -> dict[str, Tensor]:
    """The loss and every gradient, by name."""
    loss = model.loss(x, target)[0]
    named = dict(weights.named_parameters())
    return {"loss": loss.detach(), **dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))}


def gate(dim: int, depth: int, seqlen: int) -> dict[str, str]:
    """Against the reference ops in float64, at a small batch: the loss of both forms and all of their gradients."""
    x, target = windows(2, seqlen)
    model, wide = make(dim, depth), make(dim, depth, torch.float64)
    with use_backend("reference"):
        oracle, loop = gradients(wide, wide, x, target), gradients(model, model, x, target)
    found = {c: refusal_of(gradients(form(c, model), model, x, target), loop, oracle) for c in (OURS, "pscan")}
    return {c: why for c, why in found.items() if why}


def workload(contestant: str, sizes: Mapping[str, int]) -> Run:
    """One training step, to be called again and again."""
    base = make(sizes["dim"], sizes["depth"])
    model = form(contestant, base)
    optimiser = torch.optim.AdamW(base.parameters(), lr=1e-3)
    x, target = windows(sizes["batch"], sizes["seqlen"])

    def run() -> dict[str, float]:
        start = time.perf_counter()
        optimiser.zero_grad(set_to_none=True)
        model.loss(x, target)[0].backward()
        optimiser.step()
        return {"training step": time.perf_counter() - start}

    return run


def rows(setup: Setup) -> Iterator[Row]:
    case = {**STEP, "batch": 8} if setup.quick else STEP
    setup.report(f"{OP} {words(case)}: checking")
    refused = gate(STEP["dim"], 2, 40)
    setup.report(f"{OP} {words(case)}: timing")
    runs = {c: workload(c, case) for c in (OURS, "pscan") if c not in refused}
    measured = alternate(runs, setup.budget, least=2, most=setup.most)
    yield from time_rows(setup, OP, words(case), measured, refused, {"pscan": STEP_GOAL}, of="training step")
    yield from saved(setup)
    if not setup.quick:
        setup.report(f"{OP} {words(STEP)}: peak memory")
        peaks = {c: peak_bytes(OP, c, STEP) for c in (OURS, "pscan")}
        yield from value_rows(setup, OP, "peak resident memory above start", words(STEP), peaks, "bytes", {})


def saved(setup: Setup) -> Iterator[Row]:
    batch = SAVED["batch"]
    setup.report(f"{OP} {words(SAVED)}: bytes saved")
    base = make(SAVED["dim"], SAVED["depth"])
    weights = list(base.parameters())
    values: dict[str, float | None] = {}
    for contestant in (OURS, "pscan"):
        measured_at = SMALL_BATCH if contestant == "pscan" or setup.quick else batch
        x, target = windows(measured_at, SAVED["seqlen"])
        kept = saved_bytes(functools.partial(form(contestant, base).loss, x, target), weights)
        values[contestant] = kept * batch / measured_at
    scaled = "both" if setup.quick else "pscan"
    note = f"weights not counted; {scaled} measured at batch {SMALL_BATCH} and multiplied by {batch // SMALL_BATCH}"
    yield from value_rows(setup, OP, "saved for backward", words(SAVED), values, "bytes", {OURS: SAVED_GOAL}, note)
