"""Triton kernels compiled ahead of time for a GPU that need not be here, from recorded launches."""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import re
import subprocess
import tempfile
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from pixelbytes_kernels._triton import Device, Launch, launched_by

DTYPES = {
    torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.float64: "fp64", torch.bool: "i1",
    torch.uint8: "u8", torch.int8: "i8", torch.int16: "i16", torch.int32: "i32", torch.int64: "i64",
}  # fmt: skip


class Resources(NamedTuple):
    """What one compiled kernel takes of a multiprocessor."""

    registers: int  # a thread
    spills: int  # bytes
    shared: int  # bytes a block
    threads: int  # of a block


def recorded(run: Callable[[], Any], device: Device) -> list[Launch]:
    """The launches that `run` makes for `device`; none of them runs."""
    launches: list[Launch] = []
    with launched_by(launches.append, device):
        run()
    return launches


def specialised(launch: Launch) -> tuple[dict[str, str], dict[str, Any], set[str]]:
    """Signature, constants and the names of arguments divisible by 16, as Triton's own launch would find them."""
    signature, constants, divisible = {}, {}, set()
    for parameter in launch.kernel.params:
        name, value = parameter.name, launch.arguments[parameter.name]
        if parameter.is_constexpr or value is None:
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[name] = "*" + DTYPES[value.dtype]
            if value.data_ptr() % 16 == 0:
                divisible.add(name)
        elif isinstance(value, float):
            signature[name] = "fp32"
        elif value == 1 and not parameter.do_not_specialize:
            signature[name], constants[name] = "constexpr", 1
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0 and not parameter.do_not_specialize:
                divisible.add(name)
    return signature, constants, divisible


@functools.cache
def source_of(kernel: Any) -> str:
    """The syntax tree of a kernel and of all that it calls, without comments, docstrings and places; and the constants that they name."""
    parts: dict[str, str] = {}
    waiting = [kernel]
    while waiting:
        made = waiting.pop()
        tree = ast.parse(textwrap.dedent(inspect.getsource(made.fn)))
        if ast.get_docstring(tree.body[0]) is not None:  # type: ignore[arg-type]
            del tree.body[0].body[0]  # type: ignore[attr-defined]
        parts[made.__name__] = ast.dump(tree)
        for name in sorted({node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}):
            found = made.fn.__globals__.get(name)
            if isinstance(found, tl.constexpr):
                parts[name] = repr(found.value)
            elif isinstance(found, triton.JITFunction) and found.__name__ not in parts:
                waiting.append(found)
    return repr(sorted(parts.items()))


def fingerprint(launch: Launch, arch: int) -> str:
    """Changes with whatever decides the compiled code, but for Triton's version: source, types, constants, divisibility, options."""
    signature, constants, divisible = specialised(launch)
    told = source_of(launch.kernel), signature, constants, sorted(divisible), launch.options("cuda"), arch
    return hashlib.sha256(repr(told).encode()).hexdigest()[:12]


def compiled(launch: Launch, arch: int) -> Any:
    """Triton's compiled kernel; `.asm["ptx"]`, `.asm["cubin"]`."""
    signature, constants, divisible = specialised(launch)
    position = {p.name: i for i, p in enumerate(launch.kernel.params)}
    source = ASTSource(
        launch.kernel,
        signature,
        {(position[name],): value for name, value in constants.items()},
        {(position[name],): [["tt.divisibility", 16]] for name in divisible},
    )
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=launch.options("cuda"))


def resources(kernel: Any) -> Resources:
    """Read from the machine code by cuobjdump, which Triton brings along."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    # Spilled registers live on the stack or in local memory, and nothing else of these kernels does.
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", text)}
    return Resources(
        found["REG"], found["STACK"] + found["LOCAL"], kernel.metadata.shared, 32 * kernel.metadata.num_warps
    )


def t4_occupancy(r: Resources) -> float:
    """Share of a T4 multiprocessor's 1,024 threads that registers (64 K) and shared memory (64 KB) leave room for.

    The limit of 16 blocks is left out: it binds programs of one warp, however little they take.
    """
    warps = r.threads // 32
    by_registers = 65536 // (-(-r.registers * 32 // 256) * 256) // warps
    by_shared = 65536 // r.shared if r.shared else 10**9
    return min(1.0, min(by_registers, by_shared) * r.threads / 1024)
