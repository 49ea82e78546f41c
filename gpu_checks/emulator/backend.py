"""The backend "cuda" on CPU tensors: the sources of csrc/cuda, compiled by g++."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import pixelbytes_kernels
from gpu_checks.emulator.build import load_emulated
from pixelbytes_kernels import _backend

NAME = "pixelbytes_kernels._cuda"


@contextlib.contextmanager
def emulated(order: str = "forward", seed: int = 0, at_end: bool = True) -> Iterator[Any]:
    """Makes `backend="cuda"` run on CPU tensors. Uninitialised memory (outputs, scratch) is poisoned.

    order: of the threads between barriers: "forward", "reverse" or "random" by `seed`. at_end: tensors end at a guard page, rather
    than start at one.
    """
    module = load_emulated()
    module.emulator_configure(order, seed, at_end)
    real = _backend.choose_backend

    def choose(asked: str, *rest: Any, **more: Any) -> str:
        implemented = more.get("implemented") or next(a for a in rest if isinstance(a, tuple))
        return "cuda" if asked == "cuda" and "cuda" in implemented else real(asked, *rest, **more)

    before = sys.modules.get(NAME)
    with contextlib.ExitStack() as stack:
        for owner, attribute in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
            stack.enter_context(mock.patch.object(owner, attribute, poisoned(getattr(owner, attribute))))
        stack.enter_context(mock.patch.object(pixelbytes_kernels, "_cuda", module, create=True))
        stack.enter_context(mock.patch.object(_backend, "choose_backend", choose))
        sys.modules[NAME] = module
        forget_extensions()
        try:
            yield module
        finally:
            del sys.modules[NAME]
            if before is not None:
                sys.modules[NAME] = before
            forget_extensions()


def poisoned(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`make` with its result filled with NaN, or the largest integer."""

    def call(*arguments: Any, **options: Any) -> Tensor:
        tensor = make(*arguments, **options)
        if tensor.device.type == "meta" or tensor.dtype == torch.bool:
            return tensor
        return tensor.fill_(torch.nan if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max)

    return call


def forget_extensions() -> None:
    _backend.load_extension.cache_clear()
    _backend.available_backends.cache_clear()


@contextlib.contextmanager
def launches_go_to(handler: Callable[..., None]) -> Iterator[Any]:
    """`emulated`, with every launch given to `handler` instead of run; see bind() in emulator.cpp for what it gets."""
    with emulated() as module:
        module.emulator_handler(handler)
        try:
            yield module
        finally:
            module.emulator_handler(None)
