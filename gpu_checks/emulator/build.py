"""Builds the module `_cuda` for the CPU, from the very sources of csrc/cuda, and loads it.

    python gpu_checks/emulator/build.py      builds and prints the file

The objects and the module lie under build/emulator (or the folder that PIXELBYTES_EMULATOR_BUILD names); what is up to date stays.
"""

from __future__ import annotations

import fcntl
import functools
import importlib.machinery
import importlib.util
import os
import platform
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "build_tools"))

from kernels_build import BuildError, Job, compile_all, find_cxx, link_command, run_tool  # noqa: E402

FLAGS = [
    "-O2",
    "-std=c++17",
    "-fPIC",
    "-fvisibility=hidden",
    "-DPIXELBYTES_EMULATE",
    '-DPIXELBYTES_CUDA_ARCHS="emulated"',
]
WARNINGS = ["-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Wno-maybe-uninitialized"]


CUDA, EMULATOR = ROOT / "csrc" / "cuda", ROOT / "gpu_checks" / "emulator"


def jobs(build: Path, cxx: list[str], sources: list[Path]) -> list[Job]:
    """One object for each source."""
    import pybind11

    folders = (EMULATOR, ROOT / "csrc", pybind11.get_include(), sysconfig.get_path("include"))
    command = [*cxx, *FLAGS, *WARNINGS, *(f"-I{folder}" for folder in folders)]
    return [Job(build / f"{p.name}.o", [*command, *quick(p), "-x", "c++", "-c", str(p)]) for p in sources]


def quick(source: Path) -> list[str]:
    """Bindings do no work worth an optimiser's time."""
    return ["-O0"] if source.name.startswith("bind") else []


def build_library(name: str, sources: list[Path], folder: Path | None = None) -> Path:
    """A shared library of `sources` and the emulator; what is up to date stays."""
    folder = folder or Path(os.environ.get("PIXELBYTES_EMULATOR_BUILD") or ROOT / "build" / "emulator")
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / f"{name}{importlib.machinery.EXTENSION_SUFFIXES[0]}"
    with open(folder / "lock", "w") as lock:  # several test processes may ask at once
        fcntl.flock(lock, fcntl.LOCK_EX)
        cxx = find_cxx(os.environ)
        wanted = jobs(folder, cxx, [*sources, EMULATOR / "emulator.cpp"])
        newest = max(job.object.stat().st_mtime_ns for job in wanted) if not compile_all(wanted, os.environ) else None
        if newest is None or not library.exists() or library.stat().st_mtime_ns < newest:
            aside = library.with_suffix(".new")
            run_tool([*link_command(cxx, [job.object for job in wanted], [], platform.system()), "-o", str(aside)])
            os.replace(aside, library)
    return library


def build_emulated(folder: Path | None = None) -> Path:
    """The path of the module, built anew where a source or header has changed."""
    return build_library("_cuda", [*sorted(CUDA.glob("*.cu")), *sorted(CUDA.glob("*.cpp"))], folder)


@functools.cache
def load_emulated() -> ModuleType:
    """The module, to be put in the place of `pixelbytes_kernels._cuda`. A build that failed is not tried again by this process."""
    path = built_once()
    if isinstance(path, BuildError):
        raise path
    # A name of its own: pybind11 keeps modules by name, and would give out the real one where that was imported before.
    spec = importlib.util.spec_from_file_location("gpu_checks.emulator._cuda", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def built_once() -> Path | BuildError:
    try:
        return build_emulated()
    except BuildError as error:
        return error


if __name__ == "__main__":
    print(build_emulated())
