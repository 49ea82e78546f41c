"""What the CUDA C++ backends of all ops share: the extension, and where a kernel is to run."""

from __future__ import annotations

import functools
from types import ModuleType

import torch
from torch import Tensor

from ._backend import load_extension

T4_MULTIPROCESSORS = 40


def extension() -> ModuleType:
    """The module `_cuda`. Raises RuntimeError with the reason where it does not load."""
    cuda, reason = load_extension("_cuda")
    if cuda is None:
        raise RuntimeError(reason)
    return cuda


def where(tensor: Tensor) -> tuple[int, int]:
    """Index of the tensor's device, and torch's current stream of it: the first two arguments of every bound function."""
    if tensor.device.type != "cuda":
        return 0, 0  # the emulator of gpu_checks, on CPU tensors
    return tensor.device.index, torch.cuda.current_stream(tensor.device).cuda_stream


def multiprocessors(tensor: Tensor) -> int:
    """Of the tensor's device; a T4's under the emulator."""
    return _multiprocessors(tensor.device) if tensor.device.type == "cuda" else T4_MULTIPROCESSORS


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def fp32(tensor: Tensor | None) -> Tensor | None:
    """Small operands as the kernels take them: contiguous float32. The tensor itself where it is that already."""
    return None if tensor is None else tensor.detach().to(torch.float32).contiguous()
