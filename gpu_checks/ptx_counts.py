"""`python -m gpu_checks.ptx_counts`: runs kernels compiled for sm_75 on the CPU, checks their numbers, counts instructions and bytes.

Needs the ptx_on_cpu runner (`run_ptx.py` with a function `run_ptx`) in the folder named by --runner or by PTX_ON_CPU.
A source of kernels is a function of SOURCES: it gives the cases, and puts a `run_launch` of this module between the op and the GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

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


class Runner:
    """Runs PTX on the CPU and counts."""

    def __init__(self, folder: Path, order: str) -> None:
        sys.path.insert(0, str(folder))
        import run_ptx

        self.folder, self.run_ptx, self.order, self.counts = folder, run_ptx.run_ptx, order, []

    def __call__(
        self, ptx: str, kernel: str, arguments: list[Any], grid: tuple[int, ...], threads: int, shared: int
    ) -> None:
        """`arguments`: tensors, which the kernel may change, and numpy scalars."""
        spans = [span(a) if isinstance(a, Tensor) else None for a in arguments]
        given = [a if s is None else s.numpy() for a, s in zip(arguments, spans, strict=True)]
        found = self.run_ptx(
            without_ldmatrix(ptx), kernel, given, grid, (threads,), shared, order=self.order, stats=True
        )
        for s, before, after in zip(spans, given, found["outputs"], strict=True):
            if s is not None and not np.array_equal(before, after, equal_nan=before.dtype.kind == "f"):
                s.copy_(torch.from_numpy(after))
        stats = found["stats"]
        atomics = sum(n for op, n in stats["by_op"].items() if op.startswith(("atom", "red")))
        self.counts.append(Count(kernel, stats["thread_insn"], stats["global_read"], stats["global_written"], atomics))


def span(t: Tensor) -> Tensor:
    """The memory from a tensor's first element to its last, as one row."""
    t = t.detach().view(DTYPES[t.dtype]) if t.dtype in DTYPES else t.detach()
    size = 1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) if t.numel() else 0
    return t.as_strided((size,), (1,))


# ---- Triton ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def triton_launches(runner: Runner) -> Iterator[None]:
    """Every Triton launch is compiled for sm_75 and run by `runner`."""
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

    with launched_by(run_launch, T4):
        yield


def triton_scan(runner: Runner, directions: int) -> Callable[..., Any]:
    from pixelbytes_kernels.ops.selective_scan.autograd import FIRST, scan

    def op(**kw: Any) -> Any:
        first = tuple(kw.get(name) for name in FIRST)
        options = (kw["z"], None, kw["delta_softplus"], 1.0, False, None)
        with triton_launches(runner):
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
LAUNCHES: dict[str, Callable[[Runner], contextlib.AbstractContextManager[None]]] = {
    "cuda": cuda_launches,
    "triton": triton_launches,
}

# ---- what is counted -----------------------------------------------------------------------------

# mamba_ssm's official kernels in fp32 at N = 16, one direction, counted by the same runner: instructions, bytes read, written, atomics.
MAMBA_SSM = {"forward": (618, 144.5, 8.1, 0), "backward": (1273, 156.5, 12.0, 32)}
# Bytes of dim-sized tensors that have to move at least once, fp32, with z: forward u, delta, z, out; backward u, delta, z, dout, du,
# ddelta, dz.
BOUND = {"forward": 16, "backward": 28}


def measure(
    source: str, runner: Runner, directions: int, sizes: tuple[int, int, int, int]
) -> list[tuple[str, float, float, float, int]]:
    """(pass, instructions, bytes read, bytes written, atomics) per (batch, seqlen, dim); raises where a number is wrong."""
    batch, seqlen, dim, dstate = sizes
    inputs = scan_inputs(batch, dim, seqlen, dstate, channels_last=True)
    for name in ("B", "C"):
        inputs[name] = inputs[name].transpose(1, 2).contiguous().transpose(1, 2)
    runner.counts.clear()
    reference = bidirectional_selective_scan_ref if directions == 2 else selective_scan_ref
    op = SOURCES[source](runner, directions)
    with LAUNCHES[source](runner):
        assert_matches(op, reference, inputs)
    rows = []
    for way in ("forward", "backward"):
        found = [c for c in runner.counts if ("backward" in c.kernel) == (way == "backward")]
        per = batch * seqlen * dim
        sums = [sum(c[i] for c in found) / per for i in (1, 2, 3)]
        rows.append((way, *sums, sum(c.atomics for c in found)))
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m gpu_checks.ptx_counts", description=__doc__)
    parser.add_argument(
        "--runner", default=os.environ.get("PTX_ON_CPU"), help="folder of run_ptx.py (default: PTX_ON_CPU)"
    )
    parser.add_argument("--source", choices=SOURCES, default="triton")
    parser.add_argument(
        "--sizes", type=int, nargs=4, default=(1, 128, 64, 16), metavar=("BATCH", "SEQLEN", "DIM", "DSTATE")
    )
    parser.add_argument("--directions", type=int, choices=(1, 2), default=2)
    parser.add_argument(
        "--order", choices=("forward", "reverse", "random"), default="forward", help="of threads between meetings"
    )
    parser.add_argument("--write", action="store_true", help="put the figures into docs/gpu.md")
    args = parser.parse_args()
    if not args.runner:
        parser.error("say with --runner or PTX_ON_CPU where run_ptx.py is")
    rows = measure(args.source, Runner(Path(args.runner), args.order), args.directions, tuple(args.sizes))
    sizes = f"batch, seqlen, dim, dstate {tuple(args.sizes)}, {args.directions} direction(s)"
    print(f"{args.source}, sm_75, fp32, {sizes}; per (batch, seqlen, dim)")
    if args.write:
        from gpu_checks.triton_budget import DOCS, write_table

        lines = [
            "| pass | thread instructions | bytes asked for: read | written | atomics "
            f"| mamba_ssm, {args.directions} x one direction: instructions | read | written | atomics |"
        ]
        lines.append("|---" * 9 + "|")
        for way, *found in rows:
            counted = [f"{x:.0f}" if i == 0 else f"{x:.1f}" if i < 3 else str(x) for i, x in enumerate(found)]
            lines.append(
                f"| {way} | " + " | ".join([*counted, *(f"{x * args.directions:g}" for x in MAMBA_SSM[way])]) + " |"
            )
        size = "batch {}, seqlen {}, dim {}, dstate {}".format(*args.sizes)
        lines.append(
            f"\nPer (batch, seqlen, dim); fp32, {size}, {args.directions} direction(s). "
            "Bytes count every lane, also lanes that repeat an address."
        )
        write_table(DOCS, f"{args.source} counts", "\n".join(lines))
    for way, instructions, read, written, atomics in rows:
        mamba = [n * args.directions for n in MAMBA_SSM[way]]
        print(
            f"{way:9} {instructions:7.0f} instructions, {read:6.1f} bytes read, {written:5.1f} written, {atomics} atomics"
            f"   (mamba_ssm x {args.directions}: {mamba[0]}, {mamba[1]:.1f}, {mamba[2]:.1f}, {mamba[3]};"
            f" least dim-sized bytes: {BOUND[way]})"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
