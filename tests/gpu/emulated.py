"""The backend "cuda" on CPU tensors: the sources of csrc/cuda, compiled by g++ (gpu_checks/emulator)."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import pixelbytes_kernels
from pixelbytes_kernels import _backend
from pixelbytes_kernels.testing import run

sys.path.insert(0, str(Path(__file__).parents[2]))

from gpu_checks.emulator.build import load_emulated  # noqa: E402

# Order of the threads between barriers, its seed, and whether a tensor ends or starts at its guard page.
ORDERS = (("forward", 0, True), ("reverse", 0, False), ("random", 1, True), ("random", 2, False))


def poisoned(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`make` with its result filled with NaN, or the largest integer."""

    def call(*arguments: Any, **options: Any) -> Tensor:
        tensor = make(*arguments, **options)
        if tensor.device.type == "meta" or tensor.dtype == torch.bool:
            return tensor
        return tensor.fill_(torch.nan if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max)

    return call


@contextlib.contextmanager
def emulated(order: str = "forward", seed: int = 0, at_end: bool = True) -> Iterator[Any]:
    """Makes `backend="cuda"` run on CPU tensors. Uninitialised memory (outputs, scratch) is poisoned."""
    module = load_emulated()
    module.emulator_configure(order, seed, at_end)
    real = _backend.choose_backend

    def choose(asked: str, device: str, usable: Any, implemented: tuple[str, ...], op: str, *more: Any) -> str:
        return "cuda" if asked == "cuda" and "cuda" in implemented else real(asked, device, usable, implemented, op, *more)

    name = "pixelbytes_kernels._cuda"
    before = sys.modules.get(name)
    with contextlib.ExitStack() as stack:
        for owner, attribute in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
            stack.enter_context(mock.patch.object(owner, attribute, poisoned(getattr(owner, attribute))))
        stack.enter_context(mock.patch.object(pixelbytes_kernels, "_cuda", module, create=True))
        stack.enter_context(mock.patch.object(_backend, "choose_backend", choose))
        sys.modules[name] = module
        forget_extensions()
        try:
            yield module
        finally:
            del sys.modules[name]
            if before is not None:
                sys.modules[name] = before
            forget_extensions()


def forget_extensions() -> None:
    _backend.load_extension.cache_clear()
    _backend.available_backends.cache_clear()


def run_in_every_order(op: Callable[..., Any], inputs: Mapping[str, Any], **options: Any) -> dict[str, Tensor]:
    """Outputs and gradients, which must be the same bits for every thread order; a race would show as a difference."""
    first: dict[str, Tensor] = {}
    for order, seed, at_end in ORDERS:
        with emulated(order, seed, at_end):
            found = run(op, inputs, backend="cuda", **options)
        first = first or found
        for name, tensor in found.items():
            same = torch.equal(tensor.contiguous().view(torch.uint8), first[name].contiguous().view(torch.uint8))
            assert same, f"{name} differs between thread orders {ORDERS[0]} and {(order, seed, at_end)}"
    return first
