"""Small parts of the trainer: schedule, order of the windows, holding out, Ctrl-C."""

from __future__ import annotations

import math
import signal
import threading
from collections.abc import Iterator, Sized
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset

WARM_UP_STEPS = 100
FINAL_SHARE = 0.02  # of the learning rate, at the end of the cosine

SCHEDULES = ("constant", "cosine")


def learning_rate_share(schedule: str, step: int, total_steps: int, progress: float) -> float:
    """The learning rate at `step` as a share of its highest value.

    "constant" is 1 throughout. "cosine" rises over the first steps, a tenth of the training at most, then falls to
    FINAL_SHARE along half a cosine of `progress`, the share of the training that is done (in steps or in time).
    """
    if schedule == "constant":
        return 1.0
    warm_up = min(WARM_UP_STEPS, max(1, total_steps // 10))
    rise = min(1.0, (step + 1) / warm_up)
    fall = FINAL_SHARE + (1 - FINAL_SHARE) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return rise * fall


def shuffled(n: int, seed: int, epoch: int) -> list[int]:
    """Indices 0..n-1 in the order of one epoch: a function of its arguments only, so that a resumed run repeats it."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(n, generator=generator).tolist()


def trimmed(x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """A batch with a target for each position, cut behind the last one: rows are padded to their window, and a causal model
    need not read past its last target. The loss is the same.
    """
    if target.ndim < 2:
        return x, target
    wanted = (target != -100).any(dim=0).nonzero()
    length = int(wanted[-1]) + 1 if len(wanted) else 1
    return x[:, :length], target[:, :length]


def hold_out(dataset: Dataset[Any], fraction: float, seed: int) -> tuple[Subset[Any], Subset[Any]]:
    """Training and validation parts of a data set of windows.

    Windows of one row overlap and lie next to each other, so the validation part is one run of neighbours at a place
    drawn by `seed`: at most two rows are cut, where single windows drawn at random would share text with training.
    """
    assert isinstance(dataset, Sized)
    n = len(dataset)
    if n < 2:
        raise ValueError(f"train_dataset: {n} window(s) are too few to hold some out; pass val_dataset")
    size = min(n - 1, max(1, round(n * fraction)))
    start = int(torch.randint(n - size + 1, (1,), generator=torch.Generator().manual_seed(seed)))
    held = range(start, start + size)
    return Subset(dataset, [*range(start), *range(start + size, n)]), Subset(dataset, list(held))


class Interrupt:
    """Whether Ctrl-C was pressed."""

    pressed = False


@contextmanager
def ctrl_c_between_steps() -> Iterator[Interrupt]:
    """Within this block the first Ctrl-C only sets a flag, so that no optimiser step is torn; the second raises."""
    interrupt = Interrupt()
    if threading.current_thread() is not threading.main_thread():
        yield interrupt  # only the main thread may set handlers; elsewhere Ctrl-C raises as usual
        return
    previous = signal.getsignal(signal.SIGINT)

    def note(number: int, frame: Any) -> None:
        interrupt.pressed = True
        signal.signal(signal.SIGINT, previous)

    signal.signal(signal.SIGINT, note)
    try:
        yield interrupt
    finally:
        signal.signal(signal.SIGINT, previous)
