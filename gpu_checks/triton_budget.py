"""`python -m gpu_checks.triton_budget`: what every Triton kernel takes of a multiprocessor, against gpu_checks/budgets/triton.csv.

Every op's `aot_cases()` reach every configuration that its choosing function can return. Their launches are recorded for a T4, compiled
ahead of time for each architecture, and read: registers, spilled bytes, shared memory. No kernel may spill; what is left of a T4 must
hold half of its threads, in a backward kernel a quarter. A row's fingerprint says of which source, types and options it was read.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import csv
import functools
import importlib
import os
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton

from gpu_checks.ahead_of_time import compiled, fingerprint, recorded, resources, t4_occupancy
from pixelbytes_kernels._triton import T4, Launch

ROOT = Path(__file__).resolve().parents[1]
BUDGET = ROOT / "gpu_checks" / "budgets" / "triton.csv"
DOCS = ROOT / "docs" / "gpu.md"
OPS = ("selective_scan", "causal_conv1d", "causal_conv1d_update", "selective_state_update", "pxby_embed")
ARCHITECTURES = (75, 80, 90)
KEY = ("arch", "op", "kernel", "case")
COLUMNS = (*KEY, "registers", "spills", "shared", "threads", "t4_occupancy", "triton", "fingerprint")
SLACK = 8  # registers that another patch release of the compiler may take more


@functools.cache
def launches(op: str, arch: int = 75) -> dict[str, Launch]:
    """Every different kernel of an op, by case: the same code for two cases counts once. Nothing is computed: tensors are on "meta".

    The sizes are those for a GPU of this architecture with as many multiprocessors as a T4.
    """
    found: dict[str, Launch] = {}
    seen = set()
    module = importlib.import_module(f"pixelbytes_kernels.ops.{op}.triton")
    without = mock.patch.object(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # it does not know "meta"
    with torch.device("meta"), without:
        recordings = [(case, recorded(case.run, T4._replace(arch=arch))) for case in module.aot_cases()]
    for case, made in recordings:
        for launch in made:
            key = fingerprint(launch, arch)
            if key not in seen:
                seen.add(key)
                name = f"{launch.kernel.__name__}: {case.name}"
                found[name if name not in found else f"{name} ({len(found)})"] = launch
    return found


def row(arch: int, op: str, name: str) -> dict[str, Any]:
    launch = launches(op, arch)[name]
    kernel, case = name.split(": ", 1)
    r = resources(compiled(launch, arch))
    occupancy = f"{t4_occupancy(r):.0%}" if arch == 75 else ""
    made = (arch, op, kernel, case, *r, occupancy, triton.__version__, fingerprint(launch, arch))
    return dict(zip(COLUMNS, made, strict=True))


def fingerprints(ops: tuple[str, ...] = OPS) -> dict[tuple[str, str, str, str], str]:
    """Of every kernel that there is, by (arch, op, kernel, case). Compiles nothing."""
    return {
        (str(arch), op, *name.split(": ", 1)): fingerprint(launch, arch)
        for op in ops
        for arch in ARCHITECTURES
        for name, launch in launches(op, arch).items()
    }


def rows(architectures: tuple[int, ...], ops: tuple[str, ...], jobs: int) -> list[dict[str, Any]]:
    """One row a kernel and architecture, compiled by `jobs` processes."""
    work = [(arch, op, name) for op in ops for arch in architectures for name in launches(op, arch)]
    done = []
    with concurrent.futures.ProcessPoolExecutor(jobs) as pool:
        for i, found in enumerate(pool.map(row, *zip(*work, strict=True), chunksize=1)):
            done.append(found)
            if sys.stderr.isatty():
                print(f"\r{i + 1} of {len(work)}", end="", file=sys.stderr)
    return done


def faults(found: list[dict[str, Any]], budget: list[dict[str, str]]) -> list[str]:
    """Sentences about kernels that break the rules or their budget."""
    allowed = {tuple(str(b[c]) for c in KEY): b for b in budget}
    sentences = []
    for f in found:
        name = f"{f['op']} {f['kernel']} ({f['case']}), sm_{f['arch']}"
        limit = allowed.get(tuple(str(f[c]) for c in KEY))
        if f["spills"]:
            sentences.append(f"{name} spills {f['spills']} bytes")
        if f["arch"] == 75:
            least = 25 if "backward" in f["kernel"] else 50
            if int(f["t4_occupancy"].rstrip("%")) < least:
                sentences.append(f"{name} leaves a T4 at {f['t4_occupancy']} of its threads, under {least} %")
        if limit is None:
            sentences.append(f"{name} has no budget; run python -m gpu_checks.triton_budget --write")
        elif f["registers"] > int(limit["registers"]) + SLACK or f["shared"] > int(limit["shared"]):
            sentences.append(
                f"{name} takes {f['registers']} registers and {f['shared']} bytes of shared memory; the budget is"
                f" {limit['registers']} + {SLACK} and {limit['shared']}"
            )
    return sentences


def stale(budget: list[dict[str, str]]) -> list[str]:
    """Sentences about rows of the budget that are not, or no longer, about a kernel that there is."""
    listed = {tuple(b[c] for c in KEY): b["fingerprint"] for b in budget}
    there = fingerprints()
    found = []
    for key in sorted(listed.keys() | there.keys()):
        if listed.get(key) != there.get(key):
            what = "is not in" if key not in listed else "is only in" if key not in there else "has changed since"
            found.append(f"{' '.join(key)} {what} the budget; run python -m gpu_checks.triton_budget --write")
    return found


def table(found: list[dict[str, Any]]) -> str:
    """Markdown: the hungriest case of every kernel for sm_75."""
    lines = [
        "| op | kernel | cases | registers | spilled bytes | shared memory | threads | T4 threads resident |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for op in OPS:
        for kernel in dict.fromkeys(f["kernel"] for f in found if f["op"] == op):
            of = [f for f in found if (f["op"], f["kernel"], int(f["arch"])) == (op, kernel, 75)]
            most = {c: max(int(f[c]) for f in of) for c in ("registers", "spills", "shared", "threads")}
            least = min(int(str(f["t4_occupancy"]).rstrip("%")) for f in of)
            lines.append(
                f"| {op} | `{kernel}` | {len(of)} | {most['registers']} | {most['spills']} | {most['shared']} B "
                f"| {most['threads']} | {least} % |"
            )
    return "\n".join(lines)


def write_table(path: Path, name: str, text: str) -> None:
    """Puts `text` between the markers of `name`, aside and then in place."""
    begin, end = f"<!-- begin: {name} -->", f"<!-- end: {name} -->"
    before, rest = path.read_text(encoding="utf-8").split(begin)
    _, after = rest.split(end)
    aside = path.with_suffix(".new")
    aside.write_text(f"{before}{begin}\n{text}\n{end}{after}", encoding="utf-8")
    os.replace(aside, path)


def read_budget() -> list[dict[str, str]]:
    with BUDGET.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m gpu_checks.triton_budget",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--arch", type=int, nargs="+", default=ARCHITECTURES, help="compute capabilities times ten")
    parser.add_argument("--op", nargs="+", choices=OPS, default=OPS)
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument(
        "--write", action="store_true", help="make what is found the budget and the table of docs/gpu.md"
    )
    args = parser.parse_args()
    start = time.time()
    found = rows(tuple(args.arch), tuple(args.op), args.jobs)
    for f in found:
        print(" ".join(str(f[c]) for c in COLUMNS))
    if args.write:
        kept = [
            b
            for b in (read_budget() if BUDGET.exists() else [])
            if b["op"] not in args.op or int(b["arch"]) not in args.arch
        ]
        everything = sorted(
            [*kept, *found], key=lambda f: (OPS.index(f["op"]), str(f["kernel"]), str(f["case"]), int(f["arch"]))
        )
        BUDGET.parent.mkdir(exist_ok=True)
        with BUDGET.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(everything)
        write_table(DOCS, "triton budget", table(everything))
    wrong = faults(found, read_budget() if BUDGET.exists() else [])
    for sentence in wrong:
        print(f"OVER: {sentence}")
    print(f"{len(found)} kernels, Triton {triton.__version__}, {time.time() - start:.0f} s, {len(wrong)} over")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
