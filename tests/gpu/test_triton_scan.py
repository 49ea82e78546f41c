"""The Triton scan in Triton's interpreter: options, sizes, dtypes and strides against the oracle, margins, determinism."""

from __future__ import annotations

import os

import pytest
import torch

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("runs in Triton's interpreter; a real GPU has test_device.py", allow_module_level=True)

from poisoned import poisoned_allocations  # noqa: E402

import pixelbytes_kernels.ops.selective_scan.triton as backend  # noqa: E402
from pixelbytes_kernels import (  # noqa: E402
    bidirectional_selective_scan,
    bidirectional_selective_scan_ref,
    selective_scan,
    selective_scan_ref,
)
from pixelbytes_kernels._triton import A100, H100, T4, launched_by  # noqa: E402
from pixelbytes_kernels.testing import assert_matches, run, scan_inputs  # noqa: E402

OWN = ("u", "delta", "A", "B", "C", "D", "delta_bias")


def check(inputs, **shared):
    shared.setdefault("return_last_state", True)
    assert_matches(selective_scan, selective_scan_ref, inputs, options={"backend": "triton"}, **shared)


def check_both(inputs, own=(), other=None, **shared):
    inputs = {**inputs, **{f"{n}_rev": other[n] for n in own}} if own else inputs
    assert_matches(
        bidirectional_selective_scan, bidirectional_selective_scan_ref, inputs, options={"backend": "triton"}, **shared
    )


both_ways = pytest.mark.parametrize("reverse", [False, True], ids=["up", "down"])


# Lengths around a block of 4 steps and a chunk of 32; dims that are no tile; dstates that are no power of two.
@both_ways
@pytest.mark.parametrize(
    ("dim", "seqlen", "dstate"), [(1, 1, 1), (5, 3, 3), (3, 4, 16), (33, 5, 2), (2, 33, 4), (3, 7, 40), (2, 2, 256)]
)
def test_sizes(reverse, dim, seqlen, dstate):
    check([scan_inputs(2, dim, seqlen, dstate, initial_state=True, seed=s) for s in range(2)], reverse=reverse)
