"""`python -m gpu_checks.ptx_counts`: runs kernels compiled for sm_75 on the CPU, checks their numbers, counts instructions and bytes.

Needs the ptx_on_cpu runner (`run_ptx.py` with a function `run_ptx`) in the folder named by --runner or by PTX_ON_CPU.
A source of kernels is a function of SOURCES, its launches one of LAUNCHES.
Bytes are those that lanes ask for; which of them repeat what another lane of the warp asks for at the same time, gpu_checks/ptx_asked.py
finds in the addresses. --write records the Triton scan's counts in gpu_checks/counts.csv (bytes there: of tensors of the size (batch,
seqlen, dim), without repetition) and gpu_checks/asked.csv, and makes docs/gpu.md's table of both.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from gpu_checks.ptx_asked import Asked, taken, traced
from pixelbytes_kernels import (
    bidirectional_selective_scan,
    bidirectional_selective_scan_ref,
    selective_scan,
    selective_scan_ref,
)
from pixelbytes_kernels.testing import assert_matches, scan_inputs

DTYPES = {torch.bfloat16: torch.int16}  # of those that numpy lacks, one as wide


def without_ldmatrix(ptx: str) -> str:
    """The runner has no ldmatrix: lane i of matrix k reads word i % 4 of the row whose address lane 8 k + i / 4 holds."""
    pattern = re.compile(r"ldmatrix\.sync\.aligned\.m8n8\.x\d\.shared\.b16 \{([^}]*)\}, \[(%r\d+)(?:\+(\d+))?\];")

    def words(match: re.Match[str]) -> str:
        lines = [
            "mov.u32 %lm_lane, %tid.x;",
            "and.b32 %lm_word, %lm_lane, 3;",
            "shl.b32 %lm_word, %lm_word, 2;",
            "shr.u32 %lm_lane, %lm_lane, 2;",
            "and.b32 %lm_lane, %lm_lane, 7;",
        ]
        for k in range(match[1].count(",") + 1):
            lines += [
                f"add.s32 %lm_from, %lm_lane, {8 * k};",
                f"shfl.sync.idx.b32 %lm_at{k}, {match[2]}, %lm_from, 31, -1;",
                f"add.s32 %lm_at{k}, %lm_at{k}, %lm_word;",
                f"ld.shared.b32 %lm_to{k}, [%lm_at{k}+{match[3] or 0}];",
            ]
        lines += [f"mov.b32 {register.strip()}, %lm_to{k};" for k, register in enumerate(match[1].split(","))]
        return "\n\t".join(lines)

    ptx, count = pattern.subn(words, ptx)
    registers = (
        "\t.reg .b32 %lm_lane, %lm_word, %lm_from, " + ", ".join(f"%lm_at{k}, %lm_to{k}" for k in range(4)) + ";\n"
    )
    return re.sub(r"(\t\.reg )", registers.replace("\\", "") + r"\1", ptx, count=1) if count else ptx


class Count(NamedTuple):
    """What one kernel did, over all of its threads."""

    kernel: str
    instructions: int
    read: int  # bytes, as every lane asks for them
    written: int
    atomics: int
    asked: tuple[Asked, ...] = ()  # the same by tensor, where it was traced


class Runner:
    """Runs PTX on the CPU and counts."""

    def __init__(self, folder: Path, order: str) -> None:
        sys.path.insert(0, str(folder))
        import ptx2cpp
        import run_ptx

        self.folder, self.run_ptx, self.order, self.counts = folder, run_ptx.run_ptx, order, []
        self.compiler = ptx2cpp

    def __call__(
        self, ptx: str, kernel: str, arguments: list[Any], grid: tuple[int, ...], threads: int, shared: int
    ) -> None:
        """`arguments`: tensors, which the kernel may change, and numpy scalars."""
        spans = [span(a) if isinstance(a, Tensor) else None for a in arguments]
        given = [a if s is None else s.numpy() for a, s in zip(arguments, spans, strict=True)]
        ptx = without_ldmatrix(ptx) + "\n// traced\n"  # which the runner's cache tells from the same untraced
        with traced(self.compiler):
            found = self.run_ptx(ptx, kernel, given, grid, (threads,), shared, order=self.order, stats=True)
            library, _ = self.compiler.compile_kernel(ptx, kernel, shared, stats=True)  # the one that has just run
        for s, before, after in zip(spans, given, found["outputs"], strict=True):
            if s is not None and not np.array_equal(before, after, equal_nan=before.dtype.kind == "f"):
                s.copy_(torch.from_numpy(after))
        stats = found["stats"]
        atomics = sum(n for op, n in stats["by_op"].items() if op.startswith(("atom", "red")))
        asked = taken(library, [tuple(a.shape) for a in arguments if isinstance(a, Tensor)])
        read, written = (sum(a[i] for a in asked) for i in (1, 3))
        if (read, written) != (stats["global_read"], stats["global_written"]):
            raise RuntimeError(f"{kernel}: the trace has {read}, {written} bytes, the runner {stats}")
        self.counts.append(Count(kernel, stats["thread_insn"], read, written, atomics, tuple(asked)))


def span(t: Tensor) -> Tensor:
    """The memory from a tensor's first element to its last, as one row."""
    t = t.detach().view(DTYPES[t.dtype]) if t.dtype in DTYPES else t.detach()
    size = 1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) if t.numel() else 0
    return t.as_strided((size,), (1,))


# ---- Triton ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def triton_launches(runner: Runner, multiprocessors: int = 40) -> Iterator[None]:
    """Every Triton launch is compiled for sm_75 and run by `runner`; block sizes are those for a T4 with so many multiprocessors."""
    from gpu_checks.ahead_of_time import compiled, specialised
    from pixelbytes_kernels._triton import T4, Launch, launched_by

    def run_launch(launch: Launch) -> None:
        kernel = compiled(launch, 75)
        signature, constants, _ = specialised(launch)
        scalars = {"i32": np.int32, "i64": np.int64, "fp32": np.float32}
        values = [
            v if isinstance(v, Tensor) else scalars[signature[name]](v)
            for name, v in launch.arguments.items()
            if name not in constants
        ]
        scratch = [np.uint64(0)] * 2  # two pointers of Triton's own
        runner(
            kernel.asm["ptx"],
            kernel.metadata.name,
            values + scratch,
            launch.grid,
            32 * launch.num_warps,
            kernel.metadata.shared,
        )

    with launched_by(run_launch, T4._replace(multiprocessors=multiprocessors)):
        yield


def triton_scan(runner: Runner, directions: int) -> Callable[..., Any]:
    from pixelbytes_kernels.ops.selective_scan.autograd import FIRST, scan

    def op(**kw: Any) -> Any:
        first = tuple(kw.get(name) for name in FIRST)
        options = (kw["z"], None, kw["delta_softplus"], 1.0, False, None)
        return scan("triton", first, (None,) * 7 if directions == 2 else None, *options)[0]

    return op


# ---- CUDA C++ -------------------------------------------------------------------------------------


@contextlib.contextmanager
def cuda_launches(runner: Runner) -> Iterator[None]:
    """Every CUDA launch is compiled for sm_75 and run."""
    from gpu_checks import cuda_ptx

    def record(name: str, stats: dict[str, Any]) -> None:
        atomics = sum(n for op, n in stats["by_op"].items() if op.startswith(("atom", "red")))
        runner.counts.append(Count(name, stats["thread_insn"], stats["global_read"], stats["global_written"], atomics))

    with cuda_ptx.cuda_launches(runner.folder, runner.order, record):
        yield


def cuda_scan(runner: Runner, directions: int) -> Callable[..., Any]:
    op = bidirectional_selective_scan if directions == 2 else selective_scan
    return lambda **kw: op(**kw, backend="cuda")


SOURCES: dict[str, Callable[[Runner, int], Callable[..., Any]]] = {"cuda": cuda_scan, "triton": triton_scan}
# With one multiprocessor a small batch is as a large one is with all of them: the scan takes the sizes of a GPU that has enough to do.
LAUNCHES: dict[str, Callable[[Runner], contextlib.AbstractContextManager[None]]] = {
    "cuda": cuda_launches,
    "triton": lambda runner: triton_launches(runner, 1),
}

# ---- what is counted -----------------------------------------------------------------------------

# mamba_ssm's official kernels in fp32 at N = 16, one direction, counted by the same runner: instructions, bytes read, written, atomics.
MAMBA_SSM = {"forward": (618, 144.5, 8.1, 0), "backward": (1273, 156.5, 12.0, 32)}
# Bytes of dim-sized tensors that have to move at least once, fp32, with z: forward u, delta, z, out; backward u, delta, z, dout, du,
# ddelta, dz.
BOUND = {"forward": 16, "backward": 28}


LIMITS = {"forward": 450, "backward": 1500}  # thread instructions, both directions, N = 16
CASES = ((1, torch.float32), (2, torch.float32), (1, torch.float16), (2, torch.float16))
SIZES = (4, 256, 32, 16)
OPS = {1: "selective_scan", 2: "bidirectional_selective_scan"}
COUNTS, ASKED = (Path(__file__).parent / name for name in ("counts.csv", "asked.csv"))
KEY = ("backend", "op", "part", "dtype", "dstate", "seqlen")
COLUMNS = (*KEY, "instructions", "bytes", "source")  # of counts.csv, which other backends have lines in
ASKED_COLUMNS = (*KEY, "read", "read_again", "written", "written_again", "atomics")
Row = dict[str, str]


def measure(
    source: str, runner: Runner, directions: int, dtype: torch.dtype, sizes: tuple[int, ...]
) -> list[tuple[Row, Row]]:
    """Lines of counts.csv and asked.csv, forward and backward, all per (batch, seqlen, dim); raises where a number is wrong."""
    batch, seqlen, dim, dstate = sizes
    cases = []
    for seed in range(1 if dtype == torch.float32 else 3):
        inputs = scan_inputs(batch, dim, seqlen, dstate, channels_last=True, dtype=dtype, seed=seed)
        for name in ("B", "C"):
            inputs[name] = inputs[name].transpose(1, 2).contiguous().transpose(1, 2)
        cases.append(inputs)
    runner.counts.clear()
    reference = bidirectional_selective_scan_ref if directions == 2 else selective_scan_ref
    op = SOURCES[source](runner, directions)
    with LAUNCHES[source](runner):
        assert_matches(op, reference, cases if len(cases) > 1 else cases[0])
    elements = batch * seqlen * dim * len(cases)
    passes: dict[str, list[Count]] = {"forward": [], "backward": []}
    part = "forward"
    for count in runner.counts:
        part = next((name for name in passes if name in count.kernel), part)  # sums belong to the pass that they follow
        passes[part].append(count)
    rows = []
    for part, found in passes.items():
        key = (source, OPS[directions], part, str(dtype).removeprefix("torch."), dstate, seqlen)
        asked = [a for c in found for a in c.asked]
        ours = sum(
            a.read - a.read_again + a.written - a.written_again for a in asked if a.shape[-3:] == (batch, dim, seqlen)
        )
        moved = f"{ours / elements:.1f}" if asked else ""
        instructions = f"{sum(c.instructions for c in found) / elements:.0f}"
        sums = [
            sum(c.read for c in found),
            sum(a.read_again for a in asked),
            sum(c.written for c in found),
            sum(a.written_again for a in asked),
        ]
        per = [f"{x / elements:.1f}" if asked or i % 2 == 0 else "" for i, x in enumerate(sums)]
        texts = (
            dict(zip(COLUMNS, map(str, (*key, instructions, moved, "python -m gpu_checks.ptx_counts")), strict=True)),
            dict(zip(ASKED_COLUMNS, map(str, (*key, *per, sum(c.atomics for c in found))), strict=True)),
        )
        rows.append(texts)
    return rows


def table(rows: list[tuple[Row, Row]]) -> str:
    """Markdown, mamba_ssm's kernels beside."""
    lines = [
        "| op | part | dtype | thread instructions | bytes read | repetition | bytes written | repetition | atomics "
        "| of dim-sized tensors | least | mamba_ssm: instructions | read | written | atomics |",
        "|---" * 15 + "|",
    ]
    for counts, asked in rows:
        part, times = counts["part"], 2 if counts["op"] == OPS[2] else 1
        least = BOUND[part] // (1 if counts["dtype"] == "float32" else 2)
        theirs = [f"{x * times:g}" if counts["dtype"] == "float32" else "" for x in MAMBA_SSM[part]]
        numbers = [asked[name] for name in ("read", "read_again", "written", "written_again", "atomics")]
        cells = [
            counts["op"],
            part,
            counts["dtype"],
            counts["instructions"],
            *numbers,
            counts["bytes"],
            str(least),
            *theirs,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def recorded(backend: str = "triton") -> list[tuple[Row, Row]]:
    """What the files have of a backend's scans."""
    tables = []
    for path in (COUNTS, ASKED):
        with path.open(newline="", encoding="utf-8") as file:
            tables.append(
                {tuple(row[k] for k in KEY): row for row in csv.DictReader(file) if row["backend"] == backend}
            )
    return [(row, tables[1][key]) for key, row in tables[0].items() if key in tables[1]]


def write(rows: list[tuple[Row, Row]]) -> None:
    """Puts lines in the place of the backend's own in both files, aside and then there; other backends' stay."""
    backend = rows[0][0]["backend"]
    for path, columns, own in ((COUNTS, COLUMNS, [r[0] for r in rows]), (ASKED, ASKED_COLUMNS, [r[1] for r in rows])):
        kept = []
        if path.exists():
            with path.open(newline="", encoding="utf-8") as file:
                kept = [row for row in csv.DictReader(file) if row["backend"] != backend]
        aside = path.with_suffix(".new")
        with aside.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows([*kept, *own])
        os.replace(aside, path)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m gpu_checks.ptx_counts",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--runner", default=os.environ.get("PTX_ON_CPU"), help="folder of run_ptx.py (default: PTX_ON_CPU)"
    )
    parser.add_argument("--source", choices=SOURCES, default="triton")
    parser.add_argument("--sizes", type=int, nargs=4, default=SIZES, metavar=("BATCH", "SEQLEN", "DIM", "DSTATE"))
    parser.add_argument("--directions", type=int, choices=(1, 2), default=2)
    parser.add_argument("--dtype", choices=("float32", "float16"), default="float32")
    parser.add_argument(
        "--order", choices=("forward", "reverse", "random"), default="forward", help="of threads between meetings"
    )
    parser.add_argument(
        "--write",
        action="store_true",
        help="count every case of the Triton scan, record it, and make the table in docs/gpu.md",
    )
    parser.add_argument("--check", action="store_true", help="fail where the counts are not the recorded ones")
    args = parser.parse_args()
    if not args.runner:
        parser.error("say with --runner or PTX_ON_CPU where run_ptx.py is")
    if args.write and (args.source != "triton" or tuple(args.sizes) != SIZES):
        parser.error("--write records the Triton scan at the sizes that are the default")
    runner = Runner(Path(args.runner), args.order)
    cases = CASES if args.write else ((args.directions, getattr(torch, args.dtype)),)
    rows = [
        row for directions, dtype in cases for row in measure(args.source, runner, directions, dtype, tuple(args.sizes))
    ]
    print(f"{args.source}, sm_75, batch, seqlen, dim, dstate {tuple(args.sizes)}; per (batch, seqlen, dim)")
    print(table(rows))
    if args.write:
        from gpu_checks.triton_budget import DOCS, write_table

        write(rows)
        write_table(DOCS, "triton counts", table(rows))
    if args.check:
        wrong = [row for row in rows if row not in recorded(args.source)]
        for row in wrong:
            print(f"not as recorded: {row}")
        return 1 if wrong else 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
