"""`python -m gpu_checks.cuda_counts`: instructions and bytes of the CUDA kernels, per element of (batch, seqlen, dim).

Bytes are what the emulator counts on tensors of that size: every element that a kernel asks for, so a second reading from a cache
counts again. With --runner (or PTX_ON_CPU), the folder of the ptx_on_cpu runner, the compiled PTX is run too: its results must be the
emulator's up to rounding, and its thread instructions are counted.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from gpu_checks.cuda_budget import whole_scan_inputs, write_docs
from gpu_checks.emulator.backend import emulated
from gpu_checks.emulator.build import ROOT
from pixelbytes_kernels import _cuda_launch, bidirectional_selective_scan, causal_conv1d, pxby_embed, selective_scan
from pixelbytes_kernels.testing import conv_inputs, embed_inputs, error

CSV = ROOT / "gpu_checks" / "counts.csv"
COLUMNS = ("backend", "op", "part", "dtype", "dstate", "seqlen", "instructions", "bytes", "source")
SOURCE = "python -m gpu_checks.cuda_counts"
Phases = dict[str, tuple[dict[str, torch.Tensor], list[Any]]]  # forward, backward: results, and what was counted


class Case(NamedTuple):
    """Sizes and dtype of one call; `dim_sized`: shapes of the tensors whose bytes count."""

    op: Callable[..., Any]
    inputs: dict[str, Any]
    options: dict[str, Any]
    dtype: torch.dtype
    dstate: int
    shape: tuple[int, int, int]  # batch, dim, seqlen

    @property
    def dim_sized(self) -> tuple[tuple[int, ...], ...]:
        batch, dim, seqlen = self.shape
        return (batch, dim, seqlen), (batch, seqlen, dim), (batch * seqlen, dim)


def cases() -> list[Case]:
    found = []
    for op in (selective_scan, bidirectional_selective_scan):
        for seqlen, dim, dtype in ((256, 32, torch.float32), (1024, 32, torch.float32), (256, 32, torch.float16)):
            inputs = whole_scan_inputs(1, dim, seqlen, 16, dtype=dtype)
            found.append(Case(op, inputs, {}, dtype, 16, (1, dim, seqlen)))
    for dtype in (torch.float32, torch.float16):
        conv = conv_inputs(1, 64, 512, 4, channels_last=True, dtype=dtype)
        found.append(Case(causal_conv1d, conv, {"activation": "silu"}, dtype, 0, (1, 64, 512)))
        embed = embed_inputs(1, 2048, 16, 64, dtype=dtype, ids=torch.uint8)
        found.append(Case(pxby_embed, embed, {}, dtype, 0, (1, 64, 2048)))
    return found


def phases(case: Case, counted: Callable[[], list[Any]]) -> Phases:
    """Runs forward and all gradients; after each, `counted` says what happened since it was asked last."""
    leaves = {
        k: v.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        if isinstance(v, torch.Tensor) and v.is_floating_point()
        else v
        for k, v in case.inputs.items()
    }
    counted()
    out = case.op(**leaves, **case.options, backend="cuda")
    forward = {"out": out.detach()}, counted()
    wanted = {k: v for k, v in leaves.items() if isinstance(v, torch.Tensor) and v.requires_grad}
    gradient = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    gradient = torch.empty_like(out).copy_(gradient)
    grads = torch.autograd.grad(out, list(wanted.values()), gradient)
    return {"forward": forward, "backward": (dict(zip(wanted, grads, strict=True)), counted())}


def emulator_bytes(case: Case) -> tuple[Phases, dict[str, float]]:
    """The results, and by pass the bytes of dim-sized tensors an element."""
    with emulated() as module:

        def counted() -> list[Any]:
            rows = module.emulator_counts()
            module.emulator_reset_counts()
            return rows

        found = phases(case, counted)
    size = case.shape[0] * case.shape[1] * case.shape[2]
    return found, {
        part: sum(read + written for _, shape, _, read, written in rows if shape in case.dim_sized) / size
        for part, (_, rows) in found.items()
    }


def ptx_instructions(case: Case, emulated_results: Phases, folder: Path) -> dict[str, float]:
    """Thread instructions an element of the compiled PTX, by pass."""
    from gpu_checks.cuda_ptx import cuda_launches

    counts: list[int] = []

    def counted() -> list[int]:
        taken = counts.copy()
        counts.clear()
        return taken

    with cuda_launches(folder, "forward", lambda name, stats: counts.append(stats["thread_insn"])):
        found = phases(case, counted)
    for part, (results, _) in found.items():
        for name, tensor in results.items():
            wanted = emulated_results[part][0][name]
            bound = 1e-5 if tensor.dtype == torch.float32 else 4 * torch.finfo(tensor.dtype).eps
            if not error(tensor, wanted) <= bound:
                raise AssertionError(
                    f"{case.op.__name__}, {part}: the PTX gives another {name}: {error(tensor, wanted):.3g}"
                )
    size = case.shape[0] * case.shape[1] * case.shape[2]
    return {part: sum(rows) / size for part, (_, rows) in found.items()}


def measured(folder: Path | None) -> list[dict[str, Any]]:
    _cuda_launch.T4_MULTIPROCESSORS = 1  # a device that the few rows of a case fill: no row is cut into stretches
    rows = []
    for case in cases():
        results, moved = emulator_bytes(case)
        instructions = ptx_instructions(case, results, folder) if folder else {}
        for part in moved:
            row = ("cuda", case.op.__name__, part, str(case.dtype).removeprefix("torch."), case.dstate, case.shape[2])
            count = f"{instructions[part]:.0f}" if part in instructions else ""
            rows.append(dict(zip(COLUMNS, (*row, count, f"{moved[part]:.1f}", SOURCE), strict=True)))
            print(rows[-1], flush=True)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    names = ("op", "part", "dtype", "seqlen", "instructions", "bytes")
    lines = [f"| {' | '.join(names)} |", "|" + "---|" * len(names)]
    return "\n".join([*lines, *("| " + " | ".join(str(row[name]) for name in names) + " |" for row in rows)])


def write_csv(rows: list[dict[str, Any]]) -> None:
    """Replaces the lines of this backend; other backends' stay."""
    kept = []
    if CSV.exists():
        with open(CSV, newline="") as file:
            kept = [row for row in csv.DictReader(file) if row["backend"] != "cuda"]
    with open(CSV, "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows([*rows, *kept])


def main() -> int:
    parser = argparse.ArgumentParser(prog=SOURCE, description=__doc__)
    parser.add_argument(
        "--runner", default=os.environ.get("PTX_ON_CPU"), help="folder of run_ptx.py (default: PTX_ON_CPU)"
    )
    parser.add_argument("--write", action="store_true", help="write gpu_checks/counts.csv and the table in docs/gpu.md")
    args = parser.parse_args()
    with contextlib.suppress(KeyboardInterrupt):
        rows = measured(Path(args.runner) if args.runner else None)
        print(table(rows))
        if args.write:
            write_csv(rows)
            write_docs("cuda counts", table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
