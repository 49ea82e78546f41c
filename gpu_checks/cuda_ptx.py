"""The CUDA C++ kernels for gpu_checks/ptx_counts.py: compiled to PTX by nvcc; the emulator's launches, run on its tensors."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from gpu_checks.cuda_budget import demangled, kernel_names
from gpu_checks.emulator.backend import launches_go_to
from gpu_checks.emulator.build import CUDA, ROOT

ARCH = "75"


class Kernel(NamedTuple):
    ptx: str
    symbol: str


class Library:
    """PTX of the kernels by their demangled names, compiled file by file when first asked for."""

    def __init__(self) -> None:
        self.kernels: dict[str, Kernel] = {}
        self.files = {p: p.read_text() for p in sorted(CUDA.glob("*.cu"))}
        self.headers = {p: p.read_text() for p in sorted(CUDA.glob("*.h"))}

    def __getitem__(self, name: str) -> Kernel:
        plain = name.partition("<")[0]
        while name not in self.kernels:
            path = next((p for p in self.files if self.defines(p, plain)), None)
            if path is None:
                raise KeyError(f"no file of csrc/cuda compiles {name}")
            self.files.pop(path)
            ptx = compile_ptx(path)
            symbols = re.findall(r"\.entry (\w+)\(", ptx)
            self.kernels |= {n: Kernel(ptx, s) for n, s in zip(demangled(symbols), symbols, strict=True)}
        return self.kernels[name]

    def defines(self, path: Path, kernel: str) -> bool:
        text = self.files[path] + "".join(t for p, t in self.headers.items() if f'"{p.name}"' in self.files[path])
        return re.search(rf"__global__[^;{{]*\b{kernel}\(", text) is not None


def compile_ptx(path: Path) -> str:
    """PTX for sm_75, kept under build/cuda_ptx."""
    from kernels_build import Job, compile_all, find_nvcc

    build = ROOT / "build" / "cuda_ptx"
    build.mkdir(parents=True, exist_ok=True)
    command = [find_nvcc(os.environ), "-O3", "-std=c++17", "-ptx", f"-arch=compute_{ARCH}", str(path)]
    job = Job(build / f"{path.name}.ptx", command)
    compile_all([job], os.environ)
    return job.object.read_text()


def run_raw(
    runner_module: Any,
    kernel: Kernel,
    parameters: list[bytes],
    regions: list[tuple[int, int]],
    grid: Any,
    block: Any,
    shared: int,
    order: str,
) -> dict[str, Any]:
    """Runs PTX on memory that is there already: parameters hold addresses inside of `regions`. Returns the runner's counts."""
    library, program = runner_module.compile_kernel(kernel.ptx, kernel.symbol, shared, "-O1", True)
    packed = bytearray(max(program.psize, 8) + 16)
    for value, (name, size, _) in zip(parameters, program.params, strict=True):
        assert len(value) == size, f"{kernel.symbol}: parameter {name} has {size} bytes, the launch gave {len(value)}"
        packed[program.offs[name] : program.offs[name] + size] = value
    buffer = (ctypes.c_char * len(packed)).from_buffer(packed)
    three, flat = ctypes.c_uint32 * 3, [word for region in regions for word in region]
    error = library.emu_run(
        three(*grid), three(*block), ctypes.byref(buffer), ctypes.c_uint64(program.shn), (ctypes.c_uint64 * max(1, len(flat)))(*flat),
        len(regions), ("forward", "reverse", "random").index(order), ctypes.c_uint64(0), ctypes.byref(ctypes.c_double()),
        ctypes.byref(ctypes.c_uint64()),
    )  # fmt: skip
    if error:
        raise RuntimeError(f"{kernel.symbol}: {error.decode()}")
    counters = (ctypes.c_uint64 * max(1, len(program.stats))).in_dll(library, "CNT")
    found: dict[str, Any] = {"thread_insn": sum(counters), "by_op": {}, "global_read": 0, "global_written": 0}
    for count, (_, opcode) in zip(counters, program.stats, strict=False):
        found["by_op"][opcode] = found["by_op"].get(opcode, 0) + count
        parts = opcode.split(".")
        if "global" in parts and parts[0] in ("ld", "st"):
            types = [p for p in parts if p in runner_module.SZ]
            lanes = next((int(p[1]) for p in parts if p in ("v2", "v4")), 1)
            found["global_read" if parts[0] == "ld" else "global_written"] += (
                count * runner_module.SZ[types[-1]] * lanes
            )
    ctypes.memset(ctypes.addressof(counters), 0, ctypes.sizeof(counters))
    return found


@contextlib.contextmanager
def cuda_launches(folder: Path, order: str, record: Any) -> Iterator[None]:
    """Every launch of the backend "cuda" runs as PTX; record(name, counts) after each."""
    sys.path.insert(0, str(folder))
    import ptx2cpp

    library = Library()

    def handler(
        name: str, offset: int, grid: Any, block: Any, shared: int, parameters: list[bytes], regions: Any
    ) -> None:
        kernel = library[names[offset]]
        record(name, run_raw(ptx2cpp, kernel, parameters, regions, grid, block, shared, order))

    with launches_go_to(handler) as module:
        names = kernel_names(module.__file__)
        yield
