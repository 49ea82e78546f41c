"""Triton kernels compiled ahead of time, without a GPU, against gpu_checks/budgets/triton.csv.

The budget lists every configuration that the choosing functions can return, for three architectures, with a fingerprint of its source,
types and options: it must be of the kernels as they are, and no row may spill. Compiling all of them takes six minutes of one core, so
that is done when a kernel changes (`python -m gpu_checks.triton_budget --write`); here one in `EVERY` is compiled once more, and must
give the recorded row.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[2]
EVERY = {75: 8, 80: 24, 90: 24}

if __name__ != "__main__" and sys.platform != "linux":
    pytest.skip("Triton compiles on Linux", allow_module_level=True)


def outside(code: str) -> str:
    """Runs Python where Triton compiles instead of interpreting."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_every_configuration_has_a_budget_within_the_rules():
    outside(
        "import gpu_checks.triton_budget as b\n"
        "budget = b.read_budget()\n"
        "found = [{**r, **{name: int(r[name]) for name in ('arch', 'registers', 'spills', 'shared')}} for r in budget]\n"
        "wrong = b.faults(found, budget) + b.stale(budget)\n"
        "assert len(budget) > 500 and not wrong, '; '.join(wrong[:10])\n"
    )


def test_a_changed_kernel_is_noticed():
    outside(
        "import gpu_checks.triton_budget as b\n"
        "import gpu_checks.ahead_of_time as a\n"
        "from pixelbytes_kernels.ops.selective_scan import triton_kernels as k\n"
        "launch = next(iter(b.launches('selective_scan').values()))\n"
        "before = a.fingerprint(launch, 75)\n"
        "assert before != a.fingerprint(launch, 80)\n"
        "assert before != a.fingerprint(launch._replace(max_registers=64), 75)\n"
        "k.softplus = k.sigmoid  # what a function calls that the kernel calls\n"
        "a.source_of.cache_clear()\n"
        "assert before != a.fingerprint(launch, 75)\n"
    )


@pytest.mark.parametrize(("arch", "first"), [(75, 1), (80, 3), (90, 6)])
def test_compiled_kernels_are_within_their_budget(arch, first):
    outside(
        "import gpu_checks.triton_budget as b\n"
        f"work = [(op, name) for op in b.OPS for name in b.launches(op, {arch})][{first}::{EVERY[arch]}]\n"
        f"found = [b.row({arch}, op, name) for op, name in work]\n"
        "assert len(found) >= 7\n"
        "wrong = b.faults(found, b.read_budget())\n"
        "assert not wrong, '; '.join(wrong)\n"
    )
