"""Triton kernels compiled ahead of time, without a GPU, against gpu_checks/budgets/triton.csv.

The budget lists every configuration that the choosing functions can return. All of its rows are held to the rules here; compiled here are
one configuration in `EVERY` of each architecture, another one each, for time's sake. All of them: `python -m gpu_checks.triton_budget`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[2]
EVERY = 24

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
        "found = [{**r, 'spills': int(r['spills']), 'registers': int(r['registers']), 'shared': int(r['shared']), 'arch': int(r['arch'])}"
        " for r in budget]\n"
        "wrong = b.faults(found, budget)\n"
        "have = {(int(r['arch']), r['op'], r['kernel'] + ': ' + r['case']) for r in budget}\n"
        "want = {(arch, op, name) for op in b.OPS for name in b.launches(op) for arch in b.ARCHITECTURES}\n"
        "wrong += [f'{w} has no budget' for w in sorted(want - have)] + [f'{w} is in the budget only' for w in sorted(have - want)]\n"
        "assert not wrong, '; '.join(wrong[:10])\n"
    )


@pytest.mark.parametrize("arch", [75, 80, 90])
def test_compiled_kernels_are_within_their_budget(arch):
    outside(
        "import gpu_checks.triton_budget as b\n"
        f"work = [(op, name) for op in b.OPS for name in b.launches(op)][{arch % 7}::{EVERY}]\n"
        f"found = [b.row({arch}, op, name) for op, name in work]\n"
        "assert len(found) >= 4\n"
        "wrong = b.faults(found, b.read_budget())\n"
        "assert not wrong, '; '.join(wrong)\n"
    )
