"""The compact subset of the kernel tests in processes of their own: under every instruction set, with memory filled by
malloc, and under AddressSanitizer and UndefinedBehaviorSanitizer."""

from __future__ import annotations

import functools
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from kernel_forms import needs_cpu

from pixelbytes_kernels._backend import load_extension

ROOT = Path(__file__).resolve().parents[2]
SUBSET = Path(__file__).with_name("compact_subset.py")
pytestmark = needs_cpu


@functools.cache
def run_subset(**variables):
    env = {**os.environ, "OMP_NUM_THREADS": "2", **variables}
    return subprocess.run([sys.executable, str(SUBSET)], env=env, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("isa", ["baseline", "v3", "v4"])
def test_instruction_set(isa):
    done = run_subset(PIXELBYTES_CPU_ISA=isa)
    if "has no such instruction set" in done.stderr:
        pytest.skip(f"this build or processor has no {isa}")
    assert done.returncode == 0, done.stderr
    assert f"instruction set {isa}" in done.stderr
    assert len(done.stdout.splitlines()) > 25


def test_best_instruction_set_is_the_default():
    """The one in use here is the last that a process can be forced to."""
    cpu, _ = load_extension("_cpu")
    code = (
        "from pixelbytes_kernels._backend import load_extension as l; print(l('_cpu')[0].isa if l('_cpu')[0] else '')"
    )
    can_run = []
    for isa in ("baseline", "v3", "v4"):
        env = {**os.environ, "PIXELBYTES_CPU_ISA": isa}
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
        can_run += [isa] * (done.stdout.strip() == isa)
    assert can_run[0] == "baseline"
    assert cpu.isa == os.environ.get("PIXELBYTES_CPU_ISA", can_run[-1])


def test_uninitialised_memory_is_never_seen():
    """The same bits whatever malloc hands out, scratch of the kernels included: glibc fills it with 0x01."""
    if platform.libc_ver()[0] != "glibc":
        pytest.skip("MALLOC_PERTURB_ is a feature of glibc")
    cpu, _ = load_extension("_cpu")
    plain = run_subset(PIXELBYTES_CPU_ISA=cpu.isa)
    filled = run_subset(PIXELBYTES_CPU_ISA=cpu.isa, MALLOC_PERTURB_="254", MALLOC_MMAP_THRESHOLD_=str(1 << 30))
    assert filled.returncode == 0, filled.stderr
    assert filled.stdout == plain.stdout
    assert len(plain.stdout.splitlines()) > 25


# Without optimisation: with it, the sanitizers take the compiler minutes for one kernel.
SANITIZE = "-fsanitize=address,undefined -fno-sanitize-recover=all -g1 -O0"


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory):
    """A copy of the package whose `_cpu` is built with sanitizers, and their runtime library."""
    if platform.system() != "Linux" or not (ROOT / "csrc").is_dir():
        pytest.skip("needs Linux and the sources")
    pytest.importorskip("pybind11", reason="the build needs pybind11")
    cxx = shutil.which("g++")
    if cxx is None:
        pytest.skip("needs g++")
    runtime = subprocess.run([cxx, "-print-file-name=libasan.so"], capture_output=True, text=True, check=True).stdout
    if not Path(runtime.strip()).is_absolute():
        pytest.skip("this g++ has no libasan")
    tree = tmp_path_factory.mktemp("sanitized")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    for name in ("build_tools", "csrc", "pixelbytes_kernels"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    env = {**os.environ, "CXX": cxx, "PIXELBYTES_CPU": "1", "PIXELBYTES_CUDA": "0", "PIXELBYTES_CPU_FLAGS": SANITIZE}
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return tree, runtime.strip()


@pytest.mark.slow
@pytest.mark.parametrize("isa", ["baseline", "v3", "v4"])
def test_sanitizers(sanitized, isa):
    tree, runtime = sanitized
    done = run_subset(
        PIXELBYTES_CPU_ISA=isa,
        PYTHONPATH=str(tree),
        LD_PRELOAD=runtime,
        ASAN_OPTIONS="detect_leaks=0",  # CPython keeps what it interned
    )
    if "has no such instruction set" in done.stderr:
        pytest.skip(f"this build or processor has no {isa}")
    assert done.returncode == 0, done.stderr[-4000:]
    assert f"instruction set {isa} from {tree}" in done.stderr
    assert len(done.stdout.splitlines()) > 25
