"""The built module _cuda: it loads without a driver, links no CUDA library, shows no symbols, and carries code for a T4."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys

import pytest
import torch

from pixelbytes_kernels import available_backends

spec = importlib.util.find_spec("pixelbytes_kernels._cuda")
if spec is None or spec.origin is None:
    pytest.skip("_cuda was not built: it needs nvcc when the package is installed", allow_module_level=True)
MODULE = spec.origin


def lines(*command: str) -> list[str]:
    if shutil.which(command[0]) is None:
        pytest.skip(f"needs {command[0]}")
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


def test_it_imports_and_says_what_the_driver_says():
    code = "import torch; from pixelbytes_kernels import _cuda; print(_cuda.archs); print(*_cuda.device_count())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    archs, devices = done.stdout.splitlines()
    assert archs
    count, _, reason = devices.partition(" ")
    assert (int(count) == 0) == bool(reason)
    if not torch.cuda.is_available():
        usable, why = available_backends()["cuda"]
        assert not usable and "CUDA" in why


def test_it_links_no_cuda_library():
    needed = [line for line in lines("readelf", "-d", MODULE) if "NEEDED" in line]
    assert needed and not [line for line in needed if "cuda" in line.lower() or "torch" in line.lower()]


def test_it_shows_nothing_but_its_entry():
    shown = [line.split()[-1] for line in lines("nm", "-D", "--defined-only", MODULE)]
    ours = [name for name in shown if "cuda" in name.lower() or "pixelbytes" in name]  # the rest are templates of std
    assert ours == ["PyInit__cuda"], shown
