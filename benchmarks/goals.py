"""What the figures have to reach, as data: the least that counts (must) and what is hoped for (aim).

They were set for one thread of a CPU in float32. A ratio is that of a contestant over ours; `contestant` ours means the
figure itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from benchmarks.harness import BOTH, OURS, Goal, Row

SCANS = ("selective_scan", "bidirectional_selective_scan")
SAVED = "saved for backward"


@dataclass(frozen=True)
class Target:
    """A goal and the rows it is for: those of `op` and `what` whose sizes begin with `sizes`."""

    ops: tuple[str, ...]
    what: str
    sizes: tuple[str, ...]
    contestant: str
    goal: Goal
    dtype: str = "float32"
    device: str = "cpu"
    threads: int | None = 1  # None: any

    def fits(self, row: Row) -> bool:
        return (
            row.op in self.ops
            and row.what == self.what
            and row.contestant == self.contestant
            and (row.dtype, row.device) == (self.dtype, self.device)
            and self.threads in (None, row.threads)
            and row.sizes.startswith(self.sizes)
        )


def at_most(must: float, aim: float | None = None) -> Goal:
    return Goal(must, aim, at_least=False, of="value")


def _scan(sizes: str, pscan: tuple[float, float], compiled: tuple[float, float]) -> list[Target]:
    return [
        Target(SCANS, BOTH, (sizes,), "pscan", Goal(*pscan)),
        Target(SCANS, BOTH, (sizes,), "mambapy", Goal(*pscan)),  # the package whose formulation pscan is
        Target(SCANS, BOTH, (sizes,), "compile", Goal(*compiled)),
    ]


LARGE_CONVOLUTIONS = ("batch=2 seqlen=256 dim=128", "batch=32 seqlen=256 dim=128", "batch=8 seqlen=1024 dim=512")
PEAK = "peak resident memory above start"
TARGETS: tuple[Target, ...] = (
    *_scan("batch=2 seqlen=256 dim=128 dstate=16", (15, 25), (6, 10)),
    *_scan("batch=32 seqlen=256 dim=128 dstate=16", (40, 75), (15, 35)),
    *_scan("batch=8 seqlen=1024 dim=512 dstate=16", (50, 90), (15, 35)),
    Target(SCANS, "share of the multiply-add pipe, forward", ("",), OURS, Goal(50, 75, of="value")),
    Target(SCANS, "share of the multiply-add pipe, backward", ("",), OURS, Goal(45, 65, of="value")),
    Target(SCANS, "dim 162 over dim 160, per state update", ("",), OURS, at_most(1.4)),
    Target(SCANS[1:], f"{SAVED}, inputs included", ("",), OURS, at_most(7.2, 6.3)),
    Target(SCANS, PEAK, ("batch=32 ", "batch=8 "), "pscan", Goal(10, 18)),
    Target(("causal_conv1d",), BOTH, LARGE_CONVOLUTIONS, "F.conv1d", Goal(2.5, 5)),
    Target(("causal_conv1d",), SAVED, ("",), OURS, at_most(1)),
    Target(("mamba_step",), "a token", ("layers=8 d_model=64 batch=1",), OURS, at_most(40, 12)),
    Target(("bysmamba",), "training step", ("batch=32 seqlen=256 dim=64 depth=8",), "pscan", Goal(10, 20)),
    Target(("bysmamba",), SAVED, ("batch=32 seqlen=256 dim=256 depth=8",), OURS, at_most(1.0e9, 0.5e9)),
    Target(("pxby_embed",), BOTH, ("batch=32 seqlen=256 vocab=113 dim=64 ids=int64",), "reference", Goal(8, 12)),
    Target(("pxby_embed",), BOTH, ("batch=32 seqlen=1024 vocab=113 dim=64 ids=int64",), "reference", Goal(12, 20)),
    Target(
        ("pxby_embed",), SAVED,
        ("batch=32 seqlen=256 vocab=113 dim=64 ids=int64", "batch=32 seqlen=1024 vocab=113 dim=64 ids=int64"),
        "reference", Goal(8),
    ),
    Target(("trainer",), "data loading, share of an iteration", ("",), OURS, at_most(5), threads=None),
    Target(("trainer",), "data loading, share of an iteration", ("",), OURS, at_most(5), device="cuda", threads=None),
)  # fmt: skip


def goal_of(row: Row) -> Goal | None:
    return next((target.goal for target in TARGETS if target.fits(row)), None)


def verdict(row: Row) -> str:
    """ "" where the row has no goal."""
    goal = goal_of(row)
    if goal is None:
        return ""
    figure = row.value if goal.of == "value" else row.ratio
    return goal.verdict(math.nan if figure is None else figure)


def judged(rows: Sequence[Row]) -> Iterator[tuple[Row, Goal, str]]:
    """The rows that have a goal, with it and its verdict."""
    for row in rows:
        goal = goal_of(row)
        if goal is not None:
            yield row, goal, verdict(row)
