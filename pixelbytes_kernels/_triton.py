"""What the Triton backends of all ops share: device properties, the launch, the grid's limits.

A launch goes through `launch`, which usually runs the kernel. Inside of `launched_by(handler, device)` the handler gets it instead, as
data: that is how kernels are compiled ahead of time for a GPU that is not here, and run on the CPU from their PTX.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

MAX_GRID = (2**31 - 1, 65535, 65535)


class Device(NamedTuple):
    """What block sizes may depend on."""

    kind: str  # "cuda", "hip", "xpu", or "cpu": the interpreter
    arch: int  # 75 for sm_75; 0 where there is no such number
    multiprocessors: int
    warp: int = 32  # threads


T4 = Device("cuda", 75, 40)
A100 = Device("cuda", 80, 108)
H100 = Device("cuda", 90, 132)
_INTERPRETER = Device("cpu", 0, 1)


class Launch(NamedTuple):
    """One kernel launch. `arguments`: every parameter of the kernel by name, in order, constexprs too."""

    op: str
    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    num_warps: int
    max_registers: int | None = None  # a thread; None: as the compiler likes

    def options(self, kind: str) -> dict[str, int]:
        """Triton's options on a device of this kind."""
        limit = {} if self.max_registers is None or kind != "cuda" else {"maxnreg": self.max_registers}
        return {"num_warps": self.num_warps, "num_stages": 1, **limit}


class Case(NamedTuple):
    """What an op's `aot_cases()` lists: calls that together make every launch the op can make, but for sizes and strides.

    `run` calls the op's `forward` or `backward` with small CPU tensors, whose contents do not matter.
    """

    name: str
    run: Callable[[], Any]


_handler: Callable[[Launch], None] | None = None
_handler_device = T4


@contextlib.contextmanager
def launched_by(handler: Callable[[Launch], None], device: Device) -> Iterator[None]:
    """Gives every launch to `handler`; block sizes are chosen for `device`. For one thread: tests and budgets."""
    global _handler, _handler_device
    before = _handler, _handler_device
    _handler, _handler_device = handler, device
    try:
        yield
    finally:
        _handler, _handler_device = before


def device_of(tensor: Tensor) -> Device:
    """Properties of the tensor's device."""
    return _handler_device if _handler else _properties(tensor.device)


@functools.cache
def _properties(device: torch.device) -> Device:
    if device.type == "cpu":
        return _INTERPRETER
    if device.type == "xpu":
        return Device("xpu", 0, getattr(torch.xpu.get_device_properties(device), "max_compute_units", 1))
    found = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return Device("hip", 0, found.multi_processor_count, getattr(found, "warp_size", 64))
    return Device("cuda", 10 * found.major + found.minor, found.multi_processor_count)


def launch(
    op: str,
    kernel: Any,
    grid: tuple[int, ...],
    like: Tensor,
    *,
    num_warps: int,
    max_registers: int | None = None,
    **arguments: Any,
) -> None:
    """Runs `kernel` on the device of `like`, on torch's current stream of it. `arguments` in the order of the kernel's parameters.

    Raises:
        ValueError: the grid is larger than a GPU allows.
        RuntimeError: a tensor is lazily negated: a kernel would read its memory without the sign.
    """
    check_grid(op, grid)
    if 0 in grid:
        return
    if any(isinstance(value, Tensor) and value.is_neg() for value in arguments.values()):
        raise RuntimeError(
            f"{op}: a tensor has its negative bit set, as that of x.conj().imag; call resolve_neg() on it"
        )
    made = Launch(op, kernel, grid, arguments, num_warps, max_registers)
    if _handler:
        _handler(made)
        return
    with on_device(like):
        kernel[grid](**arguments, **made.options(device_of(like).kind))


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Makes the tensor's device the current one, on which Triton launches."""
    if tensor.device.type == "cpu":
        return contextlib.nullcontext()
    return getattr(torch, tensor.device.type).device(tensor.device)


def check_grid(op: str, grid: tuple[int, ...]) -> None:
    if any(size > limit for size, limit in zip(grid, MAX_GRID, strict=False)):
        limits = MAX_GRID[: len(grid)]
        raise ValueError(
            f"{op}: these sizes need a grid of {grid} blocks; a GPU takes at most {limits}: split the batch"
        )


def cdiv(a: int, b: int) -> int:
    return (a + b - 1) // b


def next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()
