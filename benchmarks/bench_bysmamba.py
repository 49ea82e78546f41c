"""A whole training step of BysMamba (loss, gradients, AdamW), against the same weights on plain PyTorch with the
parallel scan. In float16 it runs under autocast with a scaled loss, the weights in float32.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from benchmarks import plain
from benchmarks.clock import wall
from benchmarks.contestants import auto, backends
from benchmarks.harness import (
    OURS,
    PEAK_OF,
    Row,
    Run,
    Setup,
    measure,
    peak_bytes,
    refusal_of,
    saved_bytes,
    value_rows,
    why_not,
    words,
)
from pixelbytes.models import BysMamba, MambaConfig
from pixelbytes_kernels import use_backend

OP = "bysmamba"
STEP = {"batch": 32, "seqlen": 256, "dim": 64, "depth": 8}
SAVED = {"batch": 32, "seqlen": 256, "dim": 256, "depth": 8}
SMALL_BATCH = 2  # what the plain formulation keeps grows with the batch alone: measured here, scaled
PLAIN = ("pscan", "reference")  # not ours


def make(dim: int, depth: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> BysMamba:
    torch.manual_seed(0)
    return BysMamba(MambaConfig(dim=dim, depth=depth)).to(device, dtype)


def windows(batch: int, seqlen: int, vocab_size: int = 113, device: str = "cpu") -> tuple[Tensor, Tensor]:
    gen = torch.Generator().manual_seed(1)
    x = torch.randint(0, vocab_size, (batch, seqlen, 3, 3), generator=gen)
    return x.to(device), torch.randint(0, vocab_size, (batch,), generator=gen).to(device)


def form(contestant: str, model: BysMamba) -> BysMamba | plain.PlainBysMamba:
    return plain.PlainBysMamba(model) if contestant == "pscan" else model


def on(contestant: str) -> contextlib.AbstractContextManager[None]:
    """The backend that a contestant's ops run on."""
    return contextlib.nullcontext() if contestant in (OURS, "pscan") else use_backend(contestant)


def autocast(setup: Setup) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext() if setup.dtype == torch.float32 else torch.autocast(setup.kind, dtype=setup.dtype)


def contestants(setup: Setup) -> list[str]:
    """Loops over time in PyTorch are left out of a CPU: a step of them takes minutes."""
    ours = list(backends(setup, "mamba_inner", make))
    slow = ["reference"] if setup.on_gpu and not setup.quick else []
    return [c for c in ours if c != "torch" or (setup.on_gpu and not setup.quick)] + ["pscan", *slow]


def gradients(model: BysMamba | plain.PlainBysMamba, weights: BysMamba, x: Tensor, target: Tensor) -> dict[str, Tensor]:
    """The loss and every gradient, by name."""
    loss = model.loss(x, target)[0]
    named = dict(weights.named_parameters())
    return {"loss": loss.detach(), **dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))}


def gate(setup: Setup, dim: int, depth: int, seqlen: int) -> dict[str, str]:
    """Against the reference ops in float64, at a small batch: the loss of every form and all of their gradients."""
    x, target = windows(2, seqlen, device=setup.device)
    model, wide = make(dim, depth, device=setup.device), make(dim, depth, torch.float64, setup.device)
    with use_backend("reference"):
        oracle = gradients(wide, wide, x, target)
        with autocast(setup):
            loop = gradients(model, model, x, target)
    refused: dict[str, str] = {}
    for c in contestants(setup):
        try:
            with on(c), autocast(setup):
                why = refusal_of(gradients(form(c, model), model, x, target), loop, oracle)
        except Exception as failed:
            why = why_not(failed)
        if why:
            refused[c] = why
    return refused


def workload(setup: Setup, contestant: str, sizes: Mapping[str, int]) -> Run:
    """One training step, to be called again and again."""
    base = make(sizes["dim"], sizes["depth"], device=setup.device)
    model = form(contestant, base)
    optimiser = torch.optim.AdamW(base.parameters(), lr=1e-3, fused=True)
    scaler = torch.amp.GradScaler(setup.kind, enabled=setup.dtype == torch.float16)
    x, target = windows(sizes["batch"], sizes["seqlen"], device=setup.device)

    def run() -> dict[str, float]:
        start = wall(setup.device)
        with on(contestant):
            optimiser.zero_grad(set_to_none=True)
            with autocast(setup):
                loss = model.loss(x, target)[0]
            scaler.scale(loss).backward()
            scaler.step(optimiser)
            scaler.update()
        return {"training step": wall(setup.device) - start}

    return run


def speed(setup: Setup) -> Iterator[Row]:
    setup.report(f"{OP} {words(STEP)} {setup.dtype_name}: checking")
    refused = gate(setup, STEP["dim"], 2, 40)
    setup.report(f"{OP} {words(STEP)} {setup.dtype_name}: timing")
    runs = {c: workload(setup, c, STEP) for c in contestants(setup) if c not in refused}
    about: dict[str, Any] = {"of": "training step", "backend": auto(setup, "mamba_inner")}
    yield from measure(setup, OP, words(STEP), runs, refused, least=2, **about)


def saved(setup: Setup) -> Iterator[Row]:
    batch = SAVED["batch"]
    setup.report(f"{OP} {words(SAVED)} {setup.dtype_name}: bytes saved")
    base = make(SAVED["dim"], SAVED["depth"], device=setup.device)
    weights = list(base.parameters())
    values: dict[str, float | None] = {}
    for contestant in (OURS, "pscan"):
        measured_at = SMALL_BATCH if contestant == "pscan" or setup.quick else batch
        x, target = windows(measured_at, SAVED["seqlen"], device=setup.device)
        with autocast(setup):
            kept = saved_bytes(functools.partial(form(contestant, base).loss, x, target), weights)
        values[contestant] = kept * batch / measured_at
    scaled = "both" if setup.quick else "pscan"
    note = f"weights not counted; {scaled} measured at batch {SMALL_BATCH} and multiplied by {batch // SMALL_BATCH}"
    yield from value_rows(setup, OP, "saved for backward", words(SAVED), values, "bytes", note)


def peaks(setup: Setup) -> Iterator[Row]:
    if setup.quick:
        return
    setup.report(f"{OP} {words(STEP)} {setup.dtype_name}: peak memory")
    found = {c: peak_bytes(setup, OP, c, STEP, functools.partial(workload, setup, c, STEP)) for c in contestants(setup)}
    yield from value_rows(setup, OP, PEAK_OF[setup.kind], words(STEP), found, "bytes")


PARTS = {"speed": speed, "saved": saved, "peaks": peaks}
