"""Convolution, updates and embedding of the Triton backend, compiled for sm_75 and run on the CPU thread by thread."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


@pytest.mark.skipif("PTX_ON_CPU" not in os.environ, reason="PTX_ON_CPU names no folder with run_ptx.py")
def test_compiled_kernels_give_the_right_numbers():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "gpu_checks.ptx_ops", "--seqlen", "20"]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("the numbers are right") == 7
