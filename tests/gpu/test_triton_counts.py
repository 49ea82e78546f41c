"""Instructions and bytes of the Triton scan, as recorded: within what was promised, in the docs, and still so."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from gpu_checks.ptx_counts import CASES, LIMITS, OPS, recorded, table

ROOT = Path(__file__).resolve().parents[2]


def test_what_was_promised_of_both_directions():
    rows = [counts for counts, _ in recorded() if counts["op"] == OPS[2]]
    assert len(rows) == len(CASES)
    for counts in rows:
        if counts["dtype"] == "float32":
            assert int(counts["instructions"]) <= LIMITS[counts["part"]]


def test_no_atomics_and_repetition_is_a_part():
    rows = [asked for _, asked in recorded()]
    assert len(rows) == 2 * len(CASES)
    for asked in rows:
        assert asked["atomics"] == "0"
        assert 0 < float(asked["read_again"]) < float(asked["read"])
        assert 0 <= float(asked["written_again"]) < float(asked["written"])


def test_the_table_of_the_docs_is_that_of_the_record():
    page = (ROOT / "docs" / "gpu.md").read_text(encoding="utf-8")
    shown = page.split("<!-- begin: triton counts -->\n")[1].split("\n<!-- end: triton counts -->")[0]
    assert shown == table(recorded())


@pytest.mark.skipif("PTX_ON_CPU" not in os.environ, reason="PTX_ON_CPU names no folder with run_ptx.py")
def test_the_record_holds():
    """Runs the compiled kernels: right numbers, the recorded counts."""
    pytest.importorskip("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "gpu_checks.ptx_counts", "--check"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
