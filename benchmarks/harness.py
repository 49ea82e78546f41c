"""How everything here is measured: checked first, then alternated in one process, medians with quantiles, and bytes by
counting.

A row is one figure of one contestant. The contestant `OURS` of a group (op, what, sizes, dtype, device) is the backend
that "auto" takes there; the others carry how many times worse they are, as `ratio`.
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

from benchmarks.clock import Clock
from benchmarks.counts import Work
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
    threads: int = 1
    device: str = "cpu"
    backend: str = ""  # of ours: which one "auto" took
    work: Work | None = None  # what cannot be avoided: bytes moved and operations
    note: str = ""
    machine: str = ""  # where it was measured, if not here: a figure that somebody published


@dataclass(frozen=True)
class Setup:
    """What is measured on, and how thoroughly."""

    quick: bool = False
    threads: int = 1
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    seconds: float = 5.0  # that one group of contestants may take
    most: int = 25  # rounds
    least: int = 3
    without: tuple[str, ...] = ()  # backends and packages that are left out
    report: Callable[[str], None] = field(default=lambda text: None)

    @property
    def budget(self) -> float:
        return self.seconds / 4 if self.quick else self.seconds

    @property
    def on_gpu(self) -> bool:
        return self.device != "cpu"

    @property
    def kind(self) -> str:
        """ "cpu" or "cuda"."""
        return self.device.partition(":")[0]

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def itemsize(self) -> int:
        return torch.empty(0, dtype=self.dtype).element_size()

    def row(self, op: str, what: str, sizes: str, contestant: str, value: float, unit: str, **more: Any) -> Row:
        """A row made under this setup."""
        about = {"dtype": self.dtype_name, "threads": self.threads, "device": self.kind}
        return Row(op=op, what=what, sizes=sizes, contestant=contestant, value=value, unit=unit, **{**about, **more})

    def place(self, inputs: Mapping[str, Any]) -> Inputs:
        """The inputs on this device, with their strides."""
        return {k: v.to(self.device) if isinstance(v, Tensor) else v for k, v in inputs.items()}


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


def warmed(run: Run) -> float:
    """Seconds of a run after the first one or two, which compile and fill caches."""
    taken = 0.0
    for _ in range(2):  # a first run of some seconds tells enough by itself
        start = time.perf_counter()
        run()
        taken = time.perf_counter() - start
        if 2 < taken < 20:  # seconds; longer ones may have been compiling
            break
    return taken


def alternate(
    runs: Mapping[str, Run], budget: float, least: int = 3, most: int = 25, own: Mapping[str, float] | None = None
) -> dict[str, dict[str, Spread]]:
    """Seconds by contestant and part. Every round runs each contestant, beginning with another one each time.

    `own`: seconds of one run of each, if they are warm. A contestant that takes little time is run up to five times a
    round, so that a median of few rounds rests on more samples.
    """
    own = own or {name: warmed(run) for name, run in runs.items()}
    repeats = {name: max(1, min(5, int(0.05 / max(own[name], 1e-9)))) for name in runs}
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


def timed_pass(setup: Setup, call: Call, wanted: Sequence[Tensor]) -> Run:
    """A run of `call` and of the gradients of `wanted`, with the seconds of each and of both."""
    clock = Clock(setup.device)
    dout: list[Tensor] = []

    def run() -> dict[str, float]:
        clock.start()
        out = call()
        clock.mark()
        if not dout:
            dout.append(torch.randn_like(out))
        clock.mark()
        torch.autograd.grad(out, wanted, dout[0])
        clock.mark()
        forward, _, backward = clock.stop()
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


PEAK_OF = {"cpu": "peak resident memory above start", "cuda": "peak allocated memory above start"}


def peak_bytes(setup: Setup, op: str, contestant: str, sizes: Mapping[str, int], make: Callable[[], Run]) -> int | None:
    """Highest memory above the start of one pass; None where the system does not tell.

    On a GPU what the allocator gave out to the run that `make` returns; on a CPU what is resident, in a process of its
    own (see peak.py).
    """
    if setup.on_gpu:
        try:
            run = make()
            run()
            torch.cuda.reset_peak_memory_stats(setup.device)
            before = torch.cuda.memory_allocated(setup.device)
            run()
            return torch.cuda.max_memory_allocated(setup.device) - before
        except torch.cuda.OutOfMemoryError:
            return None
    arguments = [op, contestant, *(f"{name}={size}" for name, size in sizes.items())]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.peak", *arguments], capture_output=True, text=True, check=False, timeout=600
    )
    if done.returncode != 0:
        return None
    return int(done.stdout.split()[-1])


# ---- the gate --------------------------------------------------------------------------------------------------------


def why_not(failed: Exception) -> str:
    """What a contestant that raised says in the table, on one line."""
    return f"cannot run: {type(failed).__name__}: {' '.join(str(failed).split())[:200]}"


def refusal(
    op: Callable[..., Any], reference: Callable[..., Any], inputs: Inputs, options: Mapping[str, Any] | None = None
) -> str:
    """Empty if `op` keeps the numeric contract on `inputs`, outputs and gradients; else why it may not be timed."""
    try:
        assert_matches(op, reference, inputs, options=options)
    except AssertionError as failed:
        return f"refused: {failed}"
    except Exception as failed:  # peers and compilers raise what they like; the reason stands in the table
        return why_not(failed)
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
    *,
    of: str = BOTH,
    unit: str = "ms",
    work: Mapping[str, Work] | None = None,
    backend: str = "",
    notes: Mapping[str, str] | None = None,
) -> Iterator[Row]:
    """Rows of every part of `measured`; those in `refused` have one without a figure, for the part `of`."""
    factor = {"ms": 1e3, "us": 1e6}[unit]
    notes = notes or {}
    for part in list(next(iter(measured.values()), {of: None})):
        ours = measured[OURS][part].median if OURS in measured else math.nan
        for name in [*measured, *refused]:
            named = backend if name == OURS else ""
            if name in refused:
                if part == of:
                    yield setup.row(op, part, sizes, name, math.nan, unit, backend=named, note=refused[name])
                continue
            s = measured[name][part]
            ratio = None if name == OURS or math.isnan(ours) else s.median / ours
            yield setup.row(
                op, part, sizes, name, s.median * factor, unit, low=s.low * factor, high=s.high * factor,
                ratio=ratio, backend=named, work=(work or {}).get(part), note=notes.get(name, ""),
            )  # fmt: skip


def value_rows(
    setup: Setup, op: str, what: str, sizes: str, values: Mapping[str, Any], unit: str, note: str = ""
) -> Iterator[Row]:
    """Rows of figures that are counted, not timed. None: this system does not tell."""
    ours = values.get(OURS)
    for name, value in values.items():
        ratio = None if name == OURS or not ours or value is None else value / ours
        text = note if value is not None else "not to be had here: no /proc, or out of memory"
        number = math.nan if value is None else value
        yield setup.row(op, what, sizes, name, number, unit, ratio=ratio, note=text)


def measure(
    setup: Setup,
    op: str,
    sizes: str,
    runs: Mapping[str, Run],
    refused: Mapping[str, str],
    *,
    share: float = 1.0,
    least: int | None = None,
    **more: Any,
) -> Iterator[Row]:
    """Runs alternated and their rows. What runs out of memory or fails at full size joins the refused."""
    refused = dict(refused)
    own: dict[str, float] = {}
    for name, run in runs.items():
        try:
            own[name] = warmed(run)
        except Exception as failed:
            refused[name] = why_not(failed)
    able = {name: runs[name] for name in own}
    measured = alternate(able, setup.budget * share, least or setup.least, setup.most, own) if able else {}
    yield from time_rows(setup, op, sizes, measured, refused, **more)
