"""How everything here is measured: checked first, then alternated in one process, medians with quantiles, and bytes by
counting.

A row is one figure of one contestant. The first contestant of a group (op, what, sizes) is ours; the others carry how
many times worse they are, as `ratio`.
"""

from __future__ import annotations

import math
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pixelbytes_kernels.testing import Inputs, assert_matches, error

OURS = "ours"  # the backend that "auto" takes here
BOTH = "forward + backward"
Call = Callable[[], Tensor]
Run = Callable[[], dict[str, float]]  # seconds by part


@dataclass(frozen=True)
class Goal:
    """What a figure has to reach; of the ratio, or of the value itself."""

    must: float
    aim: float | None = None
    at_least: bool = True
    of: str = "ratio"

    def verdict(self, figure: float) -> str:
        """ "aim met", "met" or "missed"; what could not be measured is missed."""

        def reached(bound: float | None) -> bool:
            return bound is not None and (figure >= bound if self.at_least else figure <= bound)

        return "aim met" if reached(self.aim) else "met" if reached(self.must) else "missed"


@dataclass(frozen=True)
class Spread:
    """Median, and the quantiles that one sample in five lies below and above."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Row:
    op: str
    what: str  # "forward + backward", "saved for backward", ...
    sizes: str
    dtype: str
    contestant: str
    value: float
    unit: str
    low: float = math.nan
    high: float = math.nan
    ratio: float | None = None  # value over that of ours
    goal: Goal | None = None
    threads: int = 1
    traffic: float | None = None  # bytes that cannot be avoided, for the share of the copy bandwidth
    gflops: float | None = None  # GFLOP/s, where the arithmetic is counted
    note: str = ""

    @property
    def verdict(self) -> str:
        if self.goal is None:
            return ""
        figure = self.value if self.goal.of == "value" else self.ratio
        return self.goal.verdict(math.nan if figure is None else figure)


@dataclass(frozen=True)
class Setup:
    """How thorough a run is."""

    quick: bool = False
    threads: int = 1
    seconds: float = 8.0  # that one group of contestants may take
    most: int = 25  # rounds
    least: int = 3
    report: Callable[[str], None] = field(default=lambda text: None)

    @property
    def budget(self) -> float:
        return self.seconds / 4 if self.quick else self.seconds


# ---- time ------------------------------------------------------------------------------------------------------------


def spread(samples: Sequence[float]) -> Spread:
    """Median and 20/80 quantiles, linear between neighbouring samples."""
    if not samples:
        raise ValueError("spread: needs at least one sample")
    ordered = sorted(samples)

    def quantile(q: float) -> float:
        at = q * (len(ordered) - 1)
        low = int(at)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (ordered[high] - ordered[low]) * (at - low)

    return Spread(quantile(0.5), quantile(0.2), quantile(0.8))


def alternate(runs: Mapping[str, Run], budget: float, least: int = 3, most: int = 25) -> dict[str, dict[str, Spread]]:
    """Seconds by contestant and part. Every round runs each contestant, beginning with another one each time.

    The first one or two runs of each are thrown away (they compile and fill caches). A contestant that takes little
    time is run up to five times a round, so that a median of few rounds rests on more samples.
    """
    own: dict[str, float] = {}
    for name, run in runs.items():
        for _ in range(2):  # a first run of some seconds tells enough by itself
            start = time.perf_counter()
            run()
            own[name] = time.perf_counter() - start
            if 2 < own[name] < 20:  # seconds; longer ones may have been compiling
                break
    repeats = {name: max(1, min(5, int(0.05 / max(taken, 1e-9)))) for name, taken in own.items()}
    per_round = sum(repeats[name] * own[name] for name in runs)
    rounds = max(least, min(most, int(budget / max(per_round, 1e-9))))
    samples: dict[str, dict[str, list[float]]] = {name: {} for name in runs}
    names = list(runs)
    for turn in range(rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            for _ in range(repeats[name]):
                for part, seconds in runs[name]().items():
                    samples[name].setdefault(part, []).append(seconds)
    return {name: {part: spread(taken) for part, taken in parts.items()} for name, parts in samples.items()}


def timed_pass(call: Call, wanted: Sequence[Tensor]) -> Run:
    """A run of `call` and of the gradients of `wanted`, with the seconds of each and of both."""
    dout: list[Tensor] = []

    def run() -> dict[str, float]:
        start = time.perf_counter()
        out = call()
        between = time.perf_counter()
        if not dout:
            dout.append(torch.randn_like(out))
        resumed = time.perf_counter()
        torch.autograd.grad(out, wanted, dout[0])
        end = time.perf_counter()
        forward, backward = between - start, end - resumed
        return {"forward": forward, "backward": backward, BOTH: forward + backward}

    return run


# ---- memory ----------------------------------------------------------------------------------------------------------


def saved_bytes(call: Callable[[], Any], without: Sequence[Tensor] = ()) -> int:
    """Bytes of the distinct storages that autograd keeps for the backward of `call`; not those of `without`
    (weights).
    """
    known = {t.untyped_storage().data_ptr() for t in without}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = call()  # alive until the sum: an address that is freed could be taken again
    total = sum(kept.values())
    del out
    return total


def peak_bytes(op: str, contestant: str, sizes: Mapping[str, int]) -> int | None:
    """Highest resident memory above the start of one pass, in a process of its own; None where the system does not
    tell.
    """
    arguments = [op, contestant, *(f"{name}={size}" for name, size in sizes.items())]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.peak", *arguments], capture_output=True, text=True, check=False, timeout=600
    )
    if done.returncode != 0:
        return None
    return int(done.stdout.split()[-1])


# ---- the gate --------------------------------------------------------------------------------------------------------


def refusal(
    op: Callable[..., Any], reference: Callable[..., Any], inputs: Inputs, options: Mapping[str, Any] | None = None
) -> str:
    """Empty if `op` keeps the numeric contract on `inputs`, outputs and gradients; else why it may not be timed."""
    try:
        assert_matches(op, reference, inputs, options=options)
    except AssertionError as failed:
        return f"refused: {failed}"
    except RuntimeError as failed:
        return f"cannot run: {' '.join(str(failed).split())[:200]}"
    return ""


def refusal_of(got: Mapping[str, Tensor], plain: Mapping[str, Tensor], oracle: Mapping[str, Tensor]) -> str:
    """The same contract for results already computed, the tensors of one model sharing one bound.

    The bound is twice the worst error of plain PyTorch in float32 plus 4 eps: of a hundred tensors of one model, some
    are always nearer to the oracle by luck.
    """
    allowed = 2 * max(error(plain[name], value) for name, value in oracle.items()) + 4 * torch.finfo(torch.float32).eps
    for name, value in oracle.items():
        found = error(got[name], value)
        if not found <= allowed:
            return f"refused: {name}: error {found:.3g} exceeds {allowed:.3g}"
    return ""


# ---- rows ------------------------------------------------------------------------------------------------------------


def words(sizes: Mapping[str, Any]) -> str:
    return " ".join(f"{name}={size}" for name, size in sizes.items())


def time_rows(
    setup: Setup,
    op: str,
    sizes: str,
    measured: Mapping[str, Mapping[str, Spread]],
    refused: Mapping[str, str],
    goals: Mapping[str, Goal] | None = None,
    *,
    of: str = BOTH,
    unit: str = "ms",
    traffic: float | None = None,
    notes: Mapping[str, str] | None = None,
) -> Iterator[Row]:
    """Rows of every part of `measured`; `goals` by contestant, for the part `of`, to which `traffic` belongs."""
    factor = {"ms": 1e3, "us": 1e6}[unit]
    notes = notes or {}
    parts = list(next(iter(measured.values()), {of: None}))
    for part in parts:
        ours = measured[OURS][part].median if OURS in measured else math.nan
        for name in [*measured, *refused]:
            wanted = (goals or {}).get(name) if part == of else None
            if name in refused:
                if part == of:
                    yield Row(op, part, sizes, "float32", name, math.nan, unit, goal=wanted, note=refused[name])
                continue
            s = measured[name][part]
            yield Row(
                op, part, sizes, "float32", name, s.median * factor, unit, s.low * factor, s.high * factor,
                None if name == OURS else s.median / ours, wanted, setup.threads,
                traffic if name == OURS and part == of else None, note=notes.get(name, ""),
            )  # fmt: skip


def value_rows(
    setup: Setup,
    op: str,
    what: str,
    sizes: str,
    values: Mapping[str, Any],
    unit: str,
    goals: Mapping[str, Goal],
    note: str = "",
) -> Iterator[Row]:
    """Rows of figures that are counted, not timed. None: this system does not tell."""
    ours = values.get(OURS)
    for name, value in values.items():
        ratio = None if name == OURS or not ours or value is None else value / ours
        text = note if value is not None else "this system does not tell"
        number = math.nan if value is None else value
        yield Row(
            op,
            what,
            sizes,
            "float32",
            name,
            number,
            unit,
            ratio=ratio,
            goal=goals.get(name),
            threads=setup.threads,
            note=text,
        )
