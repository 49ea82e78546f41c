"""The largest batch of windows of 256 tokens that trains in 15 GB, from measured bytes: BysMamba of depth 8 at dim 64,
128 and 256, on the reference ops and on ours.

Bytes of one training step = fixed + batch x slope. The slope is measured: on a CPU the bytes that autograd keeps, at
two batches, on a GPU the allocator's peak. Fixed are the weights four times (with gradients and AdamW's two moments).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks.bench_bysmamba import autocast, make, on, windows
from benchmarks.harness import OURS, Row, Setup, saved_bytes, why_not, words

OP = "capacity"
MEMORY = 15e9  # bytes: what a T4 of 16 GB leaves to a program
SEQLEN, DEPTH = 256, 8
BATCHES = (1, 2)


def step_bytes(setup: Setup, contestant: str, dim: int, batch: int) -> int:
    """Bytes beyond the weights that a training step of `batch` windows keeps (CPU) or allocates at most (GPU)."""
    model = make(dim, DEPTH, device=setup.device)
    x, target = windows(batch, SEQLEN, device=setup.device)
    weights = list(model.parameters())
    with on(contestant):
        if not setup.on_gpu:
            return saved_bytes(lambda: model.loss(x, target), weights)
        torch.cuda.reset_peak_memory_stats(setup.device)
        before = torch.cuda.memory_allocated(setup.device)
        with autocast(setup):
            loss = model.loss(x, target)[0]
        torch.autograd.grad(loss, weights)
        return torch.cuda.max_memory_allocated(setup.device) - before


def rows(setup: Setup) -> Iterator[Row]:
    for dim in (64, 128, 256):
        sizes = words({"dim": dim, "depth": DEPTH, "seqlen": SEQLEN})
        fits: dict[str, float] = {}
        for contestant in (OURS, "reference"):
            setup.report(f"{OP} {sizes} {setup.dtype_name}: {contestant}")
            small, large = (8 * b if contestant == OURS else b for b in BATCHES)
            try:
                first, second = (step_bytes(setup, contestant, dim, b) for b in (small, large))
            except Exception as failed:
                yield setup.row(OP, "largest batch", sizes, contestant, float("nan"), "windows", note=why_not(failed))
                continue
            slope = (second - first) / (large - small)
            fixed = 4 * 4 * sum(p.numel() for p in make(dim, DEPTH).parameters())
            fits[contestant] = (MEMORY - fixed) // slope
            yield setup.row(OP, "bytes a window", sizes, contestant, slope, "bytes")
        ours = fits.get(OURS)
        for contestant, batch in fits.items():
            ratio = batch / ours if ours and contestant != OURS else None
            note = f"in {MEMORY / 1e9:.0f} GB"
            yield setup.row(OP, "largest batch", sizes, contestant, batch, "windows", ratio=ratio, note=note)


PARTS = {"all": rows}
