"""Rows cut into stretches of time where too few of them leave a device idle: the cut, what is carried, and the scans by the emulator."""

from __future__ import annotations

import pytest
import torch
from emulated import emulated

from pixelbytes_kernels import (
    bidirectional_selective_scan,
    bidirectional_selective_scan_ref,
    selective_scan,
    selective_scan_ref,
)
from pixelbytes_kernels.ops.selective_scan.stretches import carried, stretch_steps
from pixelbytes_kernels.testing import assert_matches, scan_inputs

OWN = ("u", "delta", "A", "B", "C", "D", "delta_bias")
LONG = 520  # on a device of 40 multiprocessors three stretches of 160 steps and one of 40


@pytest.mark.parametrize(
    ("blocks", "seqlen", "steps"),
    [
        (1, 511, 0),  # stretches of less than 128 steps
        (1, 512, 128),
        (1, 600, 160),
        (1, 65536, 576),  # 120 wanted, 114 of whole chunks
        (29, 65536, 16384),
        (31, 65536, 0),  # a quarter of the device is busy
        (4096, 65536, 0),
        (0, 512, 128),
    ],
)
def test_steps_of_a_stretch(blocks, seqlen, steps):
    assert stretch_steps(blocks, seqlen, multiprocessors=40, chunk=32) == steps
    assert steps % 32 == 0


@pytest.mark.parametrize("downwards", [False, True], ids=["up", "down"])
def test_what_is_carried(downwards):
    g = torch.Generator().manual_seed(0)
    alone, shares = torch.randn(5, 2, 3, 4, generator=g), torch.rand(5, 2, 3, 4, generator=g)
    first = torch.randn(2, 3, 4, generator=g)
    reached = alone.clone()
    entry = 4 if downwards else 0
    reached[entry] += shares[entry] * first
    state, wanted = first, torch.empty_like(alone)
    for i in reversed(range(5)) if downwards else range(5):
        wanted[i] = state
        state = alone[i] + shares[i] * state
    torch.testing.assert_close(carried(reached, shares, downwards, first), wanted)


def check(op, reference, inputs, **shared):
    with emulated():
        assert_matches(op, reference, inputs, options={"backend": "cuda"}, **shared)


@pytest.mark.parametrize("reverse", [False, True], ids=["up", "down"])
@pytest.mark.parametrize("initial_state", [False, True], ids=["from zero", "from a state"])
def test_one_direction(reverse, initial_state):
    inputs = scan_inputs(1, 3, LONG, 4, initial_state=initial_state)
    check(selective_scan, selective_scan_ref, inputs, reverse=reverse, return_last_state=True)


@pytest.mark.parametrize(
    ("own", "constant"),
    [((), ""), (("A", "delta_bias"), ""), (OWN, ""), ((), "BC")],
    ids=["shared", "A-delta_bias", "all", "constant"],
)
def test_both_directions(own, constant):
    inputs, other = (scan_inputs(1, 3, LONG, 4, constant=constant, seed=s) for s in (0, 1))
    inputs |= {f"{name}_rev": other[name] for name in own}
    check(bidirectional_selective_scan, bidirectional_selective_scan_ref, inputs)


@pytest.mark.parametrize(
    "options",
    [{"dtype": torch.float16}, {"z": False, "D": False, "delta_bias": False, "delta_softplus": False}, {"groups": 2}],
    ids=["fp16", "bare", "groups"],
)
def test_options(options):
    check(
        bidirectional_selective_scan,
        bidirectional_selective_scan_ref,
        [scan_inputs(1, 2, LONG, 4, seed=s, **options) for s in range(2)],
    )


def test_every_row_of_a_batch_has_its_own_states():
    check(
        selective_scan,
        selective_scan_ref,
        scan_inputs(2, 3, LONG, 4, initial_state=True),
        reverse=True,
        return_last_state=True,
    )
    check(bidirectional_selective_scan, bidirectional_selective_scan_ref, scan_inputs(2, 3, LONG, 4, constant="B"))


def test_packed_rows_stay_whole():
    """A share of a state that restarts is not what the steps say."""
    check(bidirectional_selective_scan, bidirectional_selective_scan_ref, scan_inputs(1, 2, LONG, 4, seq_idx=True))


def test_the_cut_is_made(monkeypatch):
    """Twice the traffic of the rows that stay whole on a smaller device, and the same result up to rounding."""
    inputs = scan_inputs(1, 16, LONG, 4)
    found = {}
    for multiprocessors in (40, 1):
        monkeypatch.setattr("pixelbytes_kernels._cuda_launch.T4_MULTIPROCESSORS", multiprocessors)
        with emulated() as module:
            module.emulator_reset_counts()
            out = selective_scan(**inputs, backend="cuda")
            found[multiprocessors] = out, sum(row[3] for row in module.emulator_counts() if row[1] == (1, 16, LONG))
    assert found[40][1] == 2 * found[1][1]
    torch.testing.assert_close(found[40][0], found[1][0], rtol=1e-5, atol=1e-5)
