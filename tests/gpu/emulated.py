"""The backend "cuda" on CPU tensors: the sources of csrc/cuda, compiled by g++ (gpu_checks/emulator)."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pixelbytes_kernels.testing import run

sys.path.insert(0, str(Path(__file__).parents[2]))

from gpu_checks.emulator.backend import emulated, load_emulated  # noqa: E402

__all__ = ["ORDERS", "emulated", "load_emulated", "run_in_every_order"]

# Order of the threads between barriers, its seed, and whether a tensor ends or starts at its guard page.
ORDERS = (("forward", 0, True), ("reverse", 0, False), ("random", 1, True), ("random", 2, False))


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
