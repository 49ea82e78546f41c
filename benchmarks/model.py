"""python -m benchmarks.model: what a GPU must take for each kernel, from counted bytes, exponentials and instructions.

A roofline: a kernel takes at least as long as its DRAM traffic, as its exponentials and as the issue of its instructions;
the longest of these is the prediction. It knows nothing of latency, which binds where a device is not full (a batch of
32 with 128 channels is 1.6 warps a scheduler of a T4), nor of launches: measured times lie above it.

Counts are those of gpu_checks/counts.csv where that file has them (counted by running the compiled kernels), else the
plans below, which are arithmetic. Measured times are rows of benchmarks/results/*.csv of the same device; where nobody
has measured, the column is empty.
"""

from __future__ import annotations

import argparse
import csv
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks import counts
from benchmarks.harness import OURS
from benchmarks.report import Records, figure, markdown, number, of

COUNTED = Path(__file__).parents[1] / "gpu_checks" / "counts.csv"


@dataclass(frozen=True)
class Gpu:
    """multiprocessors, clock in Hz; bytes/s that a kernel can count on; instructions and exponentials a clock of one
    multiprocessor (four schedulers of 32 lanes; four units of 4 lanes).
    """

    name: str
    multiprocessors: int
    clock: float
    bandwidth: float
    lanes: int = 128
    exps: int = 16


# T4: 1.59 GHz boost; of 320 GB/s a copy reaches about 230. H100 SXM: 1.98 GHz boost; of 3,350 GB/s about 3,000.
GPUS = {
    "t4": Gpu("Tesla T4", 40, 1.59e9, 230e9),
    "h100": Gpu("H100", 132, 1.98e9, 3000e9),
}


@dataclass(frozen=True)
class Plan:
    """Per (batch, seqlen, dim): DRAM bytes of the dim-sized tensors in float32, thread instructions; how often a pass takes
    each exponential.
    """

    backend: str
    op: str
    part: str
    bytes: float
    instructions: float
    exps: float = 1.0
    source: str = "plan"


# Bytes: which tensors a pass reads and writes. One direction: u, delta, z -> out is 16; with dout and three gradients 28.
# Both directions in two passes over time, the second adding to what the first wrote: 32 and 60. Instructions: issue slots
# of a warp-step at N = 16, counted in first kernels (Triton 204 and 660, CUDA C++ 129 and 611 a direction); of convolution
# and embedding an estimate. A pair of mamba_ssm's scans with flips, as Vision Mamba runs them, moves 84 and 192 bytes and
# spends 1,236 and 2,546.
PLANS = (
    Plan("cuda", "selective_scan", "forward", 16, 129),
    Plan("cuda", "selective_scan", "backward", 28, 611, 2),
    Plan("triton", "selective_scan", "forward", 16, 204),
    Plan("triton", "selective_scan", "backward", 28, 660, 2),
    Plan("cuda", "bidirectional_selective_scan", "forward", 32, 258),
    Plan("cuda", "bidirectional_selective_scan", "backward", 60, 1222, 2),
    Plan("triton", "bidirectional_selective_scan", "forward", 32, 408),
    Plan("triton", "bidirectional_selective_scan", "backward", 60, 1320, 2),
    Plan("mamba-ssm", "bidirectional_selective_scan", "forward", 84, 1236),
    Plan("mamba-ssm", "bidirectional_selective_scan", "backward", 192, 2546, 2),
    Plan("cuda", "causal_conv1d", "forward", 8, 16),
    Plan("cuda", "causal_conv1d", "backward", 12, 40),
    Plan("triton", "causal_conv1d", "forward", 8, 24),
    Plan("triton", "causal_conv1d", "backward", 12, 60),
    Plan("cuda", "pxby_embed", "forward", 4, 30, 0),
    Plan("cuda", "pxby_embed", "backward", 4, 60, 0),
    Plan("triton", "pxby_embed", "forward", 4, 40, 0),
    Plan("triton", "pxby_embed", "backward", 4, 80, 0),
)
SCANS = ("selective_scan", "bidirectional_selective_scan")
# batch, seqlen, dim: those of the benchmarks of a GPU that fill a T4
SIZES = {
    "selective_scan": [(32, 256, 128), (8, 1024, 512), (32, 1024, 256)],
    "bidirectional_selective_scan": [(32, 256, 128), (8, 1024, 512), (32, 1024, 256)],
    "causal_conv1d": [(32, 256, 128), (8, 1024, 512)],
    "pxby_embed": [(32, 256, 64), (32, 1024, 64)],
}
DSTATE = 16
COLUMNS = ("backend", "op", "part", "dtype", "dstate", "seqlen", "instructions", "bytes", "source")


def counted(path: Path = COUNTED) -> list[dict[str, str]]:
    """The counts of the compiled kernels; empty where the file is not there.

    Raises:
        ValueError: it lacks a column; the message names the file.
    """
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        missing = set(COLUMNS) - set(reader.fieldnames or ())
        if missing:
            raise ValueError(f"{path}: columns {', '.join(sorted(missing))} are missing")
        return list(reader)


def plan_for(backend: str, op: str, part: str, seqlen: int, dtype: str, found: list[dict[str, str]]) -> Plan | None:
    """The plan, with what was counted in its place; bytes are those of `dtype`.

    Of counts at several lengths the longest up to `seqlen` is taken, else the shortest; an empty cell leaves the plan's.
    """
    plan = next((p for p in PLANS if (p.backend, p.op, p.part) == (backend, op, part)), None)
    if plan is None:
        return None
    plan = replace(plan, bytes=plan.bytes * (0.5 if dtype == "float16" else 1.0))
    key = (backend, op, part, dtype)
    rows = [
        r for r in found if (r["backend"], r["op"], r["part"], r["dtype"]) == key and int(r["dstate"]) in (0, DSTATE)
    ]
    if not rows:
        return plan
    row = min(rows, key=lambda r: (int(r["seqlen"]) > seqlen, abs(int(r["seqlen"]) - seqlen)))
    counted_here: dict[str, Any] = {name: float(row[name]) for name in ("bytes", "instructions") if row[name]}
    source = {0: "plan", 1: f"{', '.join(counted_here)} counted", 2: "counted"}[len(counted_here)]
    return replace(plan, **counted_here, source=source)


def beside(op: str, part: str, batch: int, seqlen: int, itemsize: int) -> float:
    """Bytes that do not go with dim: B and C, and their gradients, once (a second reading hits the L2 cache); the ids."""
    if op in SCANS:
        return (2 if part == "forward" else 4) * batch * seqlen * DSTATE * itemsize
    return batch * seqlen * 9 * 8 if op == "pxby_embed" else 0.0


def name_of(op: str, batch: int, seqlen: int, dim: int) -> str:
    """The sizes as the benchmarks write them."""
    if op in SCANS:
        return f"batch={batch} seqlen={seqlen} dim={dim} dstate={DSTATE}"
    if op == "pxby_embed":
        return f"batch={batch} seqlen={seqlen} vocab=113 dim={dim} ids=int64"
    return f"batch={batch} seqlen={seqlen} dim={dim} channels last"


@dataclass(frozen=True)
class Prediction:
    """Milliseconds; `bound` is what the kernel waits for."""

    backend: str
    op: str
    part: str
    sizes: str
    dtype: str
    dram: float
    exps: float
    issue: float
    source: str

    @property
    def ms(self) -> float:
        return max(self.dram, self.exps, self.issue)

    @property
    def bound(self) -> str:
        return max(("DRAM", self.dram), ("exponentials", self.exps), ("issue", self.issue), key=lambda x: x[1])[0]


def exponentials(op: str, part: str, batch: int, seqlen: int, dim: int) -> float:
    """Of a pass that takes each exponential once; a `Plan` says how often it does."""
    if op in SCANS:
        sizes = {"batch": batch, "seqlen": seqlen, "dim": dim, "dstate": DSTATE}
        return counts.scan(sizes, 4, op.startswith("bi"))[part].exps
    return counts.conv(batch, seqlen, dim, 4, 4)[part].exps


def predictions(gpu: Gpu, found: list[dict[str, str]] | None = None) -> Iterator[Prediction]:
    found = counted() if found is None else found
    rate = gpu.multiprocessors * gpu.clock
    cases = [(op, case) for op, of_op in SIZES.items() for case in of_op]
    for (op, (batch, seqlen, dim)), dtype, part, backend in itertools.product(
        cases, ("float32", "float16"), ("forward", "backward"), ("cuda", "triton", "mamba-ssm")
    ):
        plan = plan_for(backend, op, part, seqlen, dtype, found)
        if plan is None:
            continue
        steps, itemsize = batch * seqlen * dim, 4 if dtype == "float32" else 2
        moved = plan.bytes * steps + beside(op, part, batch, seqlen, itemsize)
        exps = plan.exps * exponentials(op, part, batch, seqlen, dim)
        yield Prediction(
            backend, op, part, name_of(op, batch, seqlen, dim), dtype, 1e3 * moved / gpu.bandwidth,
            1e3 * exps / (rate * gpu.exps), 1e3 * plan.instructions * steps / (rate * gpu.lanes), plan.source,
        )  # fmt: skip


def measured(p: Prediction, gpu: Gpu, results: Mapping[str, Records]) -> float | None:
    """The median that a file of results holds for it: the row of that backend, or ours where "auto" took it."""
    for records in results.values():
        rows = of(records, op=p.op, what=p.part, sizes=p.sizes, dtype=p.dtype, device="cuda")
        for row in rows:
            named = row["backend"] if row["contestant"] == OURS else row["contestant"]
            if gpu.name in row["machine"] and named == p.backend and number(row) is not None:
                return number(row)
    return None


def table(gpu: Gpu, results: Mapping[str, Records]) -> str:
    limits = ("DRAM, ms", "exponentials, ms", "issue, ms")
    lines = [
        ["kernel", "sizes", "dtype", *limits, "predicted, ms", "bound by", "counts", "measured, ms", "over predicted"]
    ]
    for p in predictions(gpu):
        got = measured(p, gpu, results)
        lines.append(
            [
                f"{p.op}, {p.part}, {p.backend}", p.sizes, p.dtype, figure(p.dram), figure(p.exps), figure(p.issue),
                figure(p.ms), p.bound, p.source, "" if got is None else figure(got),
                "" if got is None else figure(got / p.ms),
            ]
        )  # fmt: skip
    return markdown(lines)


def section(results: Mapping[str, Records]) -> str:
    """The predictions for a T4, and for every other known GPU that somebody measured, as a test of the model."""
    parts = [
        "A roofline (`benchmarks/model.py`): the longest of DRAM traffic, exponentials and issued instructions. Measured "
        "times lie above it where latency binds. Columns of measured times are empty until somebody runs "
        "`python -m benchmarks cuda` there and the file of results is committed.",
    ]
    for key, gpu in GPUS.items():
        there = any(
            gpu.name in r["machine"] and r["device"] == "cuda" and r["commit"] for rs in results.values() for r in rs
        )
        if key == "t4" or there:
            parts.append(f"### {gpu.name}\n\n{table(gpu, results)}")
    return "\n\n".join(parts)


def main(arguments: list[str] | None = None) -> int:
    from benchmarks.readme import ROOT
    from benchmarks.readme import results as committed

    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.model", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("gpu", nargs="?", choices=tuple(GPUS), default="t4", help="default: t4")
    args: Any = parser.parse_args(arguments)
    print(table(GPUS[args.gpu], committed(ROOT)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
