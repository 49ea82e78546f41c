"""What the compiled CUDA kernels take of a T4, against the committed budget."""

from __future__ import annotations

import pytest
from emulated import emulated  # noqa: F401, puts the repository on the path

from gpu_checks.cuda_budget import Missing, Resources, measured, read_budget, violations


@pytest.fixture(scope="module")
def rows():
    try:
        return measured()
    except Missing as error:
        pytest.skip(f"needs nvcc and cuobjdump: {error}")


@pytest.mark.slow
def test_every_kernel_keeps_to_its_budget(rows):
    assert not violations(rows, read_budget())


# The forward scan: nothing spilled, 37.5 % of a T4's warps; the backward 25 %.
@pytest.mark.slow
def test_what_was_promised_of_the_scans(rows):
    scans = {name: r for name, r in rows.items() if name.startswith("scan_")}
    assert any("forward" in name for name in scans) and any("backward" in name for name in scans)
    for name, r in scans.items():
        assert r.occupancy >= (0.375 if "forward" in name else 0.25), name
        assert r.stack == 0 or "backward" in name, name


# Known from NVIDIA's occupancy calculator for compute capability 7.5.
@pytest.mark.parametrize(
    ("registers", "shared", "threads", "occupancy"),
    [(32, 0, 128, 1.0), (64, 0, 256, 1.0), (65, 0, 256, 0.75), (96, 0, 128, 0.625), (255, 0, 128, 0.25), (32, 44 * 1024, 128, 0.125),
     (32, 0, 32, 0.5), (32, 32768, 256, 0.5)],
)  # fmt: skip
def test_occupancy(registers, shared, threads, occupancy):
    assert Resources(registers, 0, shared, threads).occupancy == occupancy


def test_the_comparison_finds_what_is_over():
    rows = {
        "a": Resources(64, 0, 0, 128),
        "b": Resources(255, 16, 0, 128),
        "c": Resources(32, 0, 0, 128),
        "d": Resources(32, 0, 0, 0),
    }
    budget = {"a": (0, 1.0), "b": (0, 0.5), "gone": (0, 1.0)}
    found = violations(rows, budget)
    assert [sentence.split(":")[0] for sentence in found] == ["gone", "b", "b", "c", "d"]
