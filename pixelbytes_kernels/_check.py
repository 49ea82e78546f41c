"""Checks at the door of every op: a sentence that names the op, the argument, what was wanted and what came."""

from __future__ import annotations

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
INTS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def fit(first: Tensor, *wanted: tuple[Tensor | None, tuple[int, ...]]) -> bool:
    """Whether every tensor has a floating dtype, the device of `first` and exactly its shape; None fits.

    The usual call passes its checks by this alone, which is fast. False says no more than: check each by name.
    """
    device = first.device
    for tensor, shape in wanted:
        if tensor is not None and (tensor.shape != shape or tensor.dtype not in FLOATS or tensor.device != device):
            return False
    return True


def require_shape(op: str, name: str, tensor: Tensor | None, **sizes: int) -> None:
    """`sizes` are the wanted sizes in order, by name; a size of -1 takes any."""
    if tensor is None:
        return
    wanted, got = tuple(sizes.values()), tuple(tensor.shape)
    if got == wanted:  # nearly always; what follows takes longer than the rest of a call's checks
        return
    if len(got) != len(wanted) or any(w != -1 and w != g for w, g in zip(wanted, got, strict=True)):
        words = ", ".join(key if size == -1 else f"{key}={size}" for key, size in sizes.items())
        raise ValueError(f"{op}: {name} must have shape ({words}), got {got}")


def require_floats(op: str, **tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype not in FLOATS:
            if tensor.is_complex():
                raise TypeError(f"{op}: {name} is {tensor.dtype}; complex numbers are not supported, A must be real")
            raise TypeError(f"{op}: {name} must be float32, float64, float16 or bfloat16, got {tensor.dtype}")


def require_ints(op: str, **tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype not in INTS:
            raise TypeError(f"{op}: {name} must be an integer tensor, got {tensor.dtype}")


def require_device(op: str, first: Tensor, **tensors: Tensor | None) -> None:
    device = first.device
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != device:
            raise ValueError(f"{op}: {name} must be on {device} like the first argument, got {tensor.device}")
