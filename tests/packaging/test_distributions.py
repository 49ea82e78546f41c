"""Real builds under build isolation: sdist, wheel from it, no compiler at all. Needs a package index."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytest.importorskip("setuptools", reason="the build needs setuptools")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.name != "posix", reason="the kernels are built on Linux and macOS"),
]

USE = """
import sys
from pathlib import Path
# An editable install of this project would lend the wheel the modules that it lacks.
sys.meta_path = [finder for finder in sys.meta_path if "Editable" not in getattr(finder, "__name__", "")]
import torch
import pixelbytes_kernels
from pixelbytes_kernels import available_backends, pxby_embed, pxby_embed_ref
from pixelbytes_kernels.testing import embed_inputs
assert Path(pixelbytes_kernels.__file__).is_relative_to(sys.argv[1]), pixelbytes_kernels.__file__
inputs = embed_inputs(2, 300)
assert torch.allclose(pxby_embed(**inputs), pxby_embed_ref(**inputs), atol=1e-5)
print(available_backends()["cpu"])
"""


def run(*command: object, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("PIXELBYTES_", "PYTHONPATH"))}
    return subprocess.run(
        [str(c) for c in command], cwd=cwd, env={**clean, **env}, capture_output=True, text=True, check=False
    )


def unpack_and_use(wheel: Path, target: Path) -> str:
    """What USE prints when the unpacked wheel is the only pixelbytes there is."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    done = run(sys.executable, "-W", "ignore", "-c", USE, target, cwd=target, PYTHONPATH=str(target))
    assert done.returncode == 0, done.stderr
    return done.stdout


def build_wheel(sdist: Path, folder: Path, **env: str) -> subprocess.CompletedProcess[str]:
    return run(sys.executable, "-m", "pip", "wheel", "-v", "--no-deps", "-w", folder, sdist, cwd=folder.parent, **env)


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    """Made from a copy of the tree, so that nothing is written beside the sources."""
    tree = tmp_path_factory.mktemp("sdist") / "tree"
    ignored = shutil.ignore_patterns(
        "build", "dist", ".git", ".venv", "*.egg-info", "__pycache__", "*.so", "runs", ".*_cache"
    )
    shutil.copytree(ROOT, tree, ignore=ignored)
    code = "from setuptools import build_meta; print(build_meta.build_sdist('dist'))"
    done = run(sys.executable, "-c", code, cwd=tree)
    assert done.returncode == 0, done.stderr
    return tree / "dist" / done.stdout.split()[-1]


def data_files() -> set[str]:
    return {
        str(p.relative_to(ROOT))
        for p in (ROOT / "pixelbytes" / "data").rglob("*")
        if p.is_file() and p.suffix != ".pyc"
    }


def test_sdist_carries_what_the_build_and_the_package_need(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    sources = {str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*") if p.is_file()}
    assert sources and data_files()
    assert sources | data_files() | {"build_tools/kernels_build.py", "setup.py", "LICENSE", "README.md"} <= names
    assert not [name for name in names if name.endswith((".so", ".pyc"))]


def test_wheel_from_the_sdist_runs_compiled_kernels(sdist, tmp_path):
    # nvcc is out of sight, and only the baseline has to be optimised well enough to run.
    done = build_wheel(sdist, tmp_path / "wheels", PIXELBYTES_CPU="1", PIXELBYTES_CPU_FLAGS="-O1", PIXELBYTES_CUDA="0")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (wheel,) = (tmp_path / "wheels").glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert data_files() <= names
    assert [name for name in names if name.startswith("pixelbytes_kernels/_cpu.")]
    assert not [name for name in names if name.startswith(("csrc", "tests", "build_tools"))]
    assert "C++" in unpack_and_use(wheel, tmp_path / "unpacked")


def test_without_a_compiler_it_installs_with_a_warning_and_pytorch_serves(sdist, tmp_path):
    done = build_wheel(sdist, tmp_path / "wheels", CXX="no-such-compiler")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    output = done.stdout + done.stderr
    assert "WARNING: _cpu is not built" in output and "CXX=no-such-compiler is not found" in output
    (wheel,) = (tmp_path / "wheels").glob("*.whl")
    assert not [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".so")]
    assert "was not built" in unpack_and_use(wheel, tmp_path / "unpacked")


def test_kernels_demanded_without_a_compiler_is_an_error(sdist, tmp_path):
    done = build_wheel(sdist, tmp_path / "wheels", CXX="no-such-compiler", PIXELBYTES_CPU="1")
    assert done.returncode != 0
    assert "demanded by PIXELBYTES_CPU=1 and cannot be built: no C++ compiler" in done.stdout + done.stderr
