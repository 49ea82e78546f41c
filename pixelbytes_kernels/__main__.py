"""`python -m pixelbytes_kernels`: what is built, found and usable, and a numeric self-test of every usable backend.

Exits with 1 when a backend gives a wrong number.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch

import pixelbytes_kernels as kernels
from pixelbytes_kernels.testing import assert_matches, embed_inputs, scan_inputs


def checks(backend: str) -> dict[str, Callable[[], None]]:
    """Each op against the float64 oracle, outputs and gradients, on a small input."""
    options = {"backend": backend}
    scan = scan_inputs(2, 20, 70, 16)
    conv = {"x": scan["u"], "weight": torch.randn(20, 4, generator=torch.Generator().manual_seed(0)), "bias": scan["D"]}
    return {
        "selective_scan": lambda: assert_matches(
            kernels.selective_scan, kernels.selective_scan_ref, scan, options=options
        ),
        "bidirectional_selective_scan": lambda: assert_matches(
            kernels.bidirectional_selective_scan, kernels.bidirectional_selective_scan_ref, scan, options=options
        ),
        "causal_conv1d": lambda: assert_matches(
            kernels.causal_conv1d, kernels.causal_conv1d_ref, conv, options=options, activation="silu"
        ),
        "pxby_embed": lambda: assert_matches(
            kernels.pxby_embed, kernels.pxby_embed_ref, embed_inputs(2, 37), options=options
        ),
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
