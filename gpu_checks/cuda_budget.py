"""`python -m gpu_checks.cuda_budget`: what every CUDA kernel takes of a T4's multiprocessor, against gpu_checks/budgets/cuda.csv.

Registers, stack (spilled registers live there) and static shared memory are read from the sm_75 code of the built extension `_cuda`,
or, where it is missing or older than its sources, from objects that nvcc compiles under build/cuda_budget. Threads of a block and
dynamic shared memory come from the launches themselves, recorded by the emulator. Needs cuobjdump: on PATH, or of the triton package.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from gpu_checks.emulator.backend import launches_go_to
from gpu_checks.emulator.build import CUDA, ROOT
from pixelbytes_kernels import (
    bidirectional_selective_scan,
    causal_conv1d,
    causal_conv1d_update,
    pxby_embed,
    selective_scan,
    selective_state_update,
)
from pixelbytes_kernels.testing import conv_inputs, embed_inputs, run, scan_inputs, update_inputs

BUDGET = ROOT / "gpu_checks" / "budgets" / "cuda.csv"
DOCS = ROOT / "docs" / "gpu.md"
REGISTERS, SHARED, THREADS, BLOCKS = 65536, 65536, 1024, 16  # of a multiprocessor, sm_75
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Missing(Exception):
    """A tool that is not here, as a sentence."""


class Resources(NamedTuple):
    """What one kernel takes; bytes but for registers a thread and threads a block."""

    registers: int
    stack: int
    shared: int
    threads: int

    @property
    def occupancy(self) -> float:
        """Warps of a T4 multiprocessor that can be resident, over the 32 that it has room for."""
        warps = -(-self.threads // 32)
        by_registers = (
            4 * (REGISTERS // 4 // (-(-self.registers * 32 // 256) * 256)) // warps
        )  # four parts, each with its own
        by_shared = SHARED // (-(-self.shared // 256) * 256) if self.shared else BLOCKS
        return min(by_registers, by_shared, THREADS // (32 * warps), BLOCKS) * warps / 32


# ---- tools ------------------------------------------------------------------------------------------------------------


def nvidia_tool(name: str) -> str:
    """cuobjdump or nvdisasm."""
    found = shutil.which(name)
    triton = importlib.util.find_spec("triton")
    if not found and triton and triton.origin:
        found = shutil.which(str(Path(triton.origin).parent / "backends" / "nvidia" / "bin" / name))
    if not found:
        raise Missing(f"no {name}: neither on PATH nor in the triton package")
    return found


def demangled(names: Iterable[str]) -> list[str]:
    """Kernel and template arguments, without namespaces and parameters: "conv_forward_time<float, 4>"."""
    done = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
    return [plain(line) for line in done.stdout.splitlines()]


def plain(signature: str) -> str:
    name = re.sub(r"pixelbytes::cuda::|\(anonymous namespace\)::", "", signature).removeprefix("void ")
    return re.sub(
        r"\)(\d)", r"\1", name.replace("(int)", "").replace("(bool)1", "true").replace("(bool)0", "false")
    ).split("(")[0]


def machine_code() -> list[Path]:
    """Files with the sm_75 code of every kernel."""
    spec = importlib.util.find_spec("pixelbytes_kernels")
    assert spec is not None and spec.origin is not None
    newest = max(p.stat().st_mtime_ns for folder in (CUDA, CUDA.parent) for p in folder.iterdir() if p.is_file())
    for module in Path(spec.origin).parent.glob("_cuda.*so"):
        if module.stat().st_mtime_ns > newest and "sm_75" in listing([module]):
            return [module]
    from kernels_build import BuildError, compile_all, cuda_jobs, find_cxx, find_nvcc, toolkit_root

    try:
        nvcc = find_nvcc(os.environ)
    except BuildError as error:
        raise Missing(str(error)) from None
    build = ROOT / "build" / "cuda_budget"
    build.mkdir(parents=True, exist_ok=True)
    jobs = cuda_jobs(ROOT, build, nvcc, find_cxx(os.environ), ["75"], [f"-I{toolkit_root(nvcc) / 'include'}"])
    jobs = [job for job in jobs if job.object.name.endswith(".cu.o")]
    compile_all(jobs, os.environ)
    return [job.object for job in jobs]


def listing(files: list[Path]) -> str:
    return "".join(
        subprocess.run([nvidia_tool("cuobjdump"), "-lelf", f], capture_output=True, text=True, check=False).stdout
        for f in files
    )


def compiled() -> dict[str, tuple[int, int, int]]:
    """Registers, stack and static shared memory by kernel."""
    found: dict[str, tuple[int, int, int]] = {}
    for file in machine_code():
        command = [nvidia_tool("cuobjdump"), "-res-usage", "-arch", "sm_75", str(file)]
        text = subprocess.run(command, capture_output=True, text=True, check=False).stdout
        rows = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", text)
        for name, row in zip(demangled(row[0] for row in rows), rows, strict=True):
            registers, stack, shared, local = map(int, row[1:])
            found[name] = registers, stack + local, shared
    return found


# ---- launches ---------------------------------------------------------------------------------------------------------


def kernel_names(module_file: str) -> dict[int, str]:
    """Offset of every function in a shared library -> its name, demangled."""
    text = subprocess.run(["nm", "--defined-only", module_file], capture_output=True, text=True, check=True).stdout
    symbols = [line.split() for line in text.splitlines() if " t " in line.lower()]
    return dict(zip((int(s[0], 16) for s in symbols), demangled(s[2] for s in symbols), strict=True))


def whole_scan_inputs(*sizes: int, **options: Any) -> dict[str, Any]:
    """Inputs with the states of B and C next to each other, as a projection leaves them: where sizes fit, kernels for `Whole` run."""
    inputs = scan_inputs(*sizes, **{"channels_last": True, **options})
    return {k: v.mT.contiguous().mT if k in ("B", "C") else v for k, v in inputs.items()}


def cases() -> list[tuple[Any, dict[str, Any]]]:
    """(op, inputs) that together launch every kernel there is; see the test."""
    found: list[tuple[Any, dict[str, Any]]] = []
    for dtype in DTYPES:
        for channels_last in (False, True):
            found.append((causal_conv1d, conv_inputs(1, 8, 8, 4, dtype=dtype, channels_last=channels_last)))
        found.append((causal_conv1d, conv_inputs(1, 3, 3, 4, dtype=dtype)))
        # Enough tokens that a table is cheaper.
        found.extend((pxby_embed, embed_inputs(1, 2000, 4, dim, dtype=dtype)) for dim in (64, 81, 288))
        for dstate in (8, 16, 32, 64, 128, 256):
            for constant in ("", "BC"):
                inputs = scan_inputs(1, 4, 4, dstate, dtype=dtype, constant=constant)
                found += [(selective_scan, inputs), (bidirectional_selective_scan, inputs)]
        for dstate in (8, 16):
            found.append((bidirectional_selective_scan, whole_scan_inputs(1, 16, 32, dstate, dtype=dtype)))
    return found


def launches() -> dict[str, tuple[int, int]]:
    """The most threads of a block and bytes of dynamic shared memory that each kernel is launched with."""
    found: dict[str, tuple[int, int]] = {}

    def record(
        name: str, offset: int, grid: Any, block: tuple[int, ...], shared: int, values: Any, regions: Any
    ) -> None:
        kernel, threads = names[offset], block[0] * block[1] * block[2]
        before = found.get(kernel, (0, 0))
        found[kernel] = max(before[0], threads), max(before[1], shared)

    with launches_go_to(record) as module:
        names = kernel_names(module.__file__)
        for op, inputs in cases():
            run(op, inputs, backend="cuda")
        selective_state_update(**update_inputs(), backend="cuda")
        causal_conv1d_update(torch.zeros(1, 4), torch.zeros(1, 4, 3), torch.zeros(4, 4), backend="cuda")
    return found


def measured() -> dict[str, Resources]:
    """Every compiled kernel, by name."""
    launched = launches()
    rows = {}
    for name, (registers, stack, shared) in sorted(compiled().items()):
        threads, dynamic = launched.get(name, (0, 0))
        rows[name] = Resources(registers, stack, shared + dynamic, threads)
    return rows


# ---- the budget -------------------------------------------------------------------------------------------------------


def read_budget() -> dict[str, tuple[int, float]]:
    """Stack at most and occupancy at least, by kernel."""
    with open(BUDGET, newline="") as file:
        return {row["kernel"]: (int(row["stack"]), float(row["occupancy"])) for row in csv.DictReader(file)}


def violations(rows: dict[str, Resources], budget: dict[str, tuple[int, float]]) -> list[str]:
    """Sentences. A kernel that no case launches is one too: its block is not known."""
    found = [f"{name}: in the budget, but not compiled" for name in budget if name not in rows]
    for name, r in rows.items():
        if r.threads == 0:
            found.append(f"{name}: launched by no case of gpu_checks/cuda_budget.py")
        elif name not in budget:
            found.append(f"{name}: not in {BUDGET.name}; write it with --write")
        else:
            stack, occupancy = budget[name]
            if r.stack > stack:
                found.append(f"{name}: {r.stack} bytes of stack, budget {stack}")
            if r.occupancy < occupancy:
                found.append(f"{name}: occupancy {r.occupancy:.1%}, budget {occupancy:.1%}")
    return found


def table(rows: dict[str, Resources]) -> str:
    lines = ["| kernel | registers | stack | shared memory | threads | T4 occupancy |", "|---|---|---|---|---|---|"]
    for name, r in rows.items():
        if "bfloat16" not in name:  # not for a T4
            lines.append(f"| `{name}` | {r.registers} | {r.stack} | {r.shared} | {r.threads} | {r.occupancy:.1%} |")
    return "\n".join(lines)


def write_docs(name: str, text: str) -> None:
    """Puts `text` between the markers `name` of docs/gpu.md."""
    begin, end = f"<!-- begin: {name} -->", f"<!-- end: {name} -->"
    page = DOCS.read_text()
    before, _, rest = page.partition(begin)
    _, _, after = rest.partition(end)
    if not rest:
        raise SystemExit(f"{DOCS} has no {begin}")
    DOCS.write_text(f"{before}{begin}\n{text}\n{end}{after}")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m gpu_checks.cuda_budget", description=__doc__)
    parser.add_argument(
        "--write", action="store_true", help="make what is measured the budget, and the table in docs/gpu.md"
    )
    args = parser.parse_args()
    try:
        rows = measured()
    except Missing as error:
        print(f"cuda_budget: {error}", file=sys.stderr)
        return 2
    print(table(rows))
    if args.write:
        with open(BUDGET, "w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["kernel", "stack", "occupancy"])
            writer.writerows([name, r.stack, r.occupancy] for name, r in rows.items())
        write_docs("cuda budget", table(rows))
    found = violations(rows, read_budget())
    print("\n".join(found))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
