"""Which implementation runs: the backends, whether each is usable here and why not, and one pure function that chooses.

reference   plain torch, the definition; any device, slow
torch       pure PyTorch that is lean in memory; the fallback where nothing compiled is usable
cpu         C++ kernels of `_cpu` (CPU tensors)
cuda        CUDA C++ kernels of `_cuda` (NVIDIA, sm_75 and up)
triton      Triton kernels (any GPU that Triton knows)
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import os
import warnings
from collections.abc import Iterator, Mapping
from types import ModuleType

import torch

BACKENDS = ("reference", "torch", "cpu", "cuda", "triton")
_PREFERENCE = {"cpu": ("cpu", "torch"), "cuda": ("cuda", "triton", "torch"), "xpu": ("triton", "torch")}
GPU_BACKENDS = ("cuda", "triton")
INTERPRETER = "Triton interpreter, slow: for tests"
_asked = "auto"


def set_backend(name: str) -> None:
    """Makes `name` what `backend="auto"` means from now on, in every thread. "auto" restores the choice by device.

    Raises:
        ValueError: unknown name. RuntimeError: the backend is not usable here; the message says why.
    """
    global _asked
    if name != "auto":
        if name not in BACKENDS:
            raise ValueError(f"backend must be one of {('auto', *BACKENDS)}, got {name!r}")
        usable, reason = available_backends()[name]
        if not usable:
            raise RuntimeError(f"backend {name!r} cannot run: {reason}")
    _asked = name


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """`set_backend` for the length of a with block."""
    before = _asked
    set_backend(name)
    try:
        yield
    finally:
        set_backend(before)


@functools.cache
def load_extension(name: str) -> tuple[ModuleType | None, str]:
    """The compiled module `_cpu` or `_cuda`, or None and the reason why it does not load."""
    if importlib.util.find_spec(f"pixelbytes_kernels.{name}") is None:
        return None, f"the extension {name} was not built when this package was installed"
    try:
        return importlib.import_module(f"pixelbytes_kernels.{name}"), ""
    except (ImportError, RuntimeError) as error:
        return None, f"the extension {name} does not load: {error}"


@functools.cache
def available_backends() -> dict[str, tuple[bool, str]]:
    """Every backend with whether it can run on this machine, and the reason."""
    cpu, cpu_error = load_extension("_cpu")
    found = {
        "reference": (True, "plain torch"),
        "torch": (True, "plain torch, chunked"),
        "cpu": (True, f"C++, instruction set {cpu.isa}") if cpu else (False, cpu_error),
    }
    cuda, cuda_error = load_extension("_cuda")
    if cuda and not torch.cuda.is_available():
        found_devices, driver_error = cuda.device_count()
        built = "this PyTorch was built without CUDA" if torch.version.cuda is None else "PyTorch finds no CUDA device"
        cuda, cuda_error = None, f"{built}; {driver_error or f'the driver finds {found_devices}'}"
    found["cuda"] = (True, "CUDA C++") if cuda else (False, cuda_error)
    if importlib.util.find_spec("triton") is None:
        found["triton"] = (False, "triton is not installed")
    elif os.environ.get("TRITON_INTERPRET") == "1":
        found["triton"] = (True, INTERPRETER)
    elif not (torch.cuda.is_available() or (hasattr(torch, "xpu") and torch.xpu.is_available())):
        found["triton"] = (False, "no GPU")
    else:
        found["triton"] = (True, "Triton")
    return found


def choose_backend(
    asked: str,
    device: str,
    usable: Mapping[str, tuple[bool, str]],
    implemented: tuple[str, ...],
    op: str,
    dtype: torch.dtype = torch.float32,
    bfloat16: bool = True,
) -> str:
    """The backend for tensors of `dtype` on `device` ("cpu", "cuda", ...), which may lack `bfloat16`; pure.

    `implemented` are the backends that have `op`.

    Raises:
        ValueError: unknown name. RuntimeError: the named backend cannot run; the message says why.
    """
    if device != "cpu" and asked in ("auto", *GPU_BACKENDS) and dtype == torch.bfloat16 and not bfloat16:
        raise RuntimeError(
            f"{op}: this GPU has no bfloat16, which starts with sm_80; use float16, or float32, or backend='torch'"
        )
    if asked == "auto":
        for name in _PREFERENCE.get(device, ("torch",)):
            able = usable[name][0] and usable[name][1] != INTERPRETER
            if name in implemented and able and (name not in GPU_BACKENDS or dtype != torch.float64):
                return name
        return "reference"
    if asked not in BACKENDS:
        raise ValueError(f"{op}: backend must be one of {('auto', *BACKENDS)}, got {asked!r}")
    if asked not in implemented:
        raise RuntimeError(f"{op}: backend {asked!r} has no kernel for this operation; there are {implemented}")
    if not usable[asked][0]:
        raise RuntimeError(f"{op}: backend {asked!r} cannot run: {usable[asked][1]}")
    gpus = ("cpu",) if usable["triton"][1] == INTERPRETER else ("cuda", "xpu")
    home = {"cpu": ("cpu",), "cuda": ("cuda",), "triton": gpus}.get(asked, (device,))
    if device not in home:
        raise RuntimeError(f"{op}: backend {asked!r} cannot run on tensors on {device!r}")
    if asked in GPU_BACKENDS and dtype == torch.float64:
        raise RuntimeError(f"{op}: backend {asked!r} has no float64; use backend='torch' on a GPU, or float32")
    return asked


def _constant_backends() -> dict[str, tuple[bool, str]]:
    """`available_backends`, run rather than traced by torch.compile, which cannot trace an import."""
    return available_backends()


@functools.cache
def _devices_without_bfloat16() -> tuple[int, ...]:
    if torch.version.hip or not torch.cuda.is_available():
        return ()
    return tuple(i for i in range(torch.cuda.device_count()) if torch.cuda.get_device_capability(i) < (8, 0))


def _without_bfloat16() -> tuple[int, ...]:
    """Numbers of the NVIDIA GPUs below sm_80; as `_constant_backends`."""
    return _devices_without_bfloat16()


# What torch.compiler.assume_constant_result does, without its import of torch._dynamo: seconds for every import of this.
_constant_backends._dynamo_marked_constant = True  # type: ignore[attr-defined]
_without_bfloat16._dynamo_marked_constant = True  # type: ignore[attr-defined]


def resolve(op: str, asked: str, tensor: torch.Tensor, implemented: tuple[str, ...]) -> str:
    """`choose_backend` for this machine and the backend set by `set_backend`; warns once about a slow automatic choice."""
    device = tensor.device.type
    if asked == "auto":
        asked = _asked
        if asked not in ("auto", "reference", "torch") and asked not in implemented:
            asked = "auto"  # set_backend names a preference; an op without such a kernel goes its own way
    bfloat16 = tensor.device.index not in _without_bfloat16()
    name = choose_backend(asked, device, _constant_backends(), implemented, op, tensor.dtype, bfloat16)
    no_choice = device != "cpu" and tensor.dtype == torch.float64
    if asked == "auto" and name in ("torch", "reference") and not no_choice and not torch.compiler.is_compiling():
        _warn_slow(device, name)
    return name


@functools.cache
def _warn_slow(device: str, name: str) -> None:
    wanted = _PREFERENCE.get(device, ("torch",))[0]
    reason = available_backends().get(wanted, (False, "no kernels for this device"))[1]
    warnings.warn(
        f"pixelbytes_kernels runs on the slow backend {name!r} for {device} tensors, since {wanted!r} cannot be used: {reason}",
        RuntimeWarning,
        stacklevel=4,
    )
