"""`python -m pixelbytes_kernels`: what is built, found and usable, and a numeric self-test of every usable backend.

Exits with 1 when a backend gives a wrong number.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch

import pixelbytes_kernels as kernels
from pixelbytes_kernels._backend import GPU_BACKENDS, INTERPRETER
from pixelbytes_kernels.testing import assert_matches, embed_inputs, scan_inputs


def on_device(op: Callable[..., Any], backend: str, device: str) -> Callable[..., Any]:
    """`op` for tensors on the CPU, run on `device`: so the oracle stays on the CPU."""

    def moved(**inputs: Any) -> Any:
        there = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
        return op(**{**there, "backend": backend}).cpu()

    return moved


def checks(backend: str) -> dict[str, Callable[[], None]]:
    """Each op against the float64 oracle, outputs and gradients, on a small input, on the device of the backend."""
    device = "cpu"
    if backend in GPU_BACKENDS and kernels.available_backends()[backend][1] != INTERPRETER:
        device = "cuda" if torch.cuda.is_available() else "xpu"
    slow = kernels.available_backends()[backend][1] == INTERPRETER
    scan = scan_inputs(1, 4, 6, 4) if slow else scan_inputs(2, 20, 70, 16)
    conv = {
        "x": scan["u"],
        "weight": torch.randn(len(scan["A"]), 4, generator=torch.Generator().manual_seed(0)),
        "bias": scan["D"],
    }
    embed = embed_inputs(1, 8) if slow else embed_inputs(2, 37)

    def check(name: str, inputs: dict[str, Any], **shared: Any) -> Callable[[], None]:
        op, reference = getattr(kernels, name), getattr(kernels, f"{name}_ref")
        return lambda: assert_matches(on_device(op, backend, device), reference, inputs, **shared)

    return {
        "selective_scan": check("selective_scan", scan),
        "bidirectional_selective_scan": check("bidirectional_selective_scan", scan),
        "causal_conv1d": check("causal_conv1d", conv, activation="silu"),
        "pxby_embed": check("pxby_embed", embed),
    }


def main() -> int:
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    wrong = 0
    for name, (usable, reason) in kernels.available_backends().items():
        print(f"{name:10} {'usable' if usable else 'not usable'}: {reason}")
        if not usable or name == "reference":
            continue
        for op, check in checks(name).items():
            try:
                check()
            except AssertionError as error:
                wrong += 1
                print(f"           {op}: WRONG: {error}")
            else:
                print(f"           {op}: ok")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
