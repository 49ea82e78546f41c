"""build_ext for kernels: per-instruction-set objects for `_cpu`, nvcc for `_cuda`, and a switch for each."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent.parent
X86 = platform.machine().lower() in ("x86_64", "amd64")

# name -> compiler flags; the name is also the C++ namespace. A processor runs the last one that it supports.
INSTRUCTION_SETS = {"baseline": []}
if X86:
    INSTRUCTION_SETS["v3"] = ["-mavx2", "-mfma", "-mf16c", "-mbmi2"]
    INSTRUCTION_SETS["v4"] = [
        *INSTRUCTION_SETS["v3"],
        *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512cd", "-mprefer-vector-width=512"),
    ]

CXX_FLAGS = ["-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math", "-Wall", "-Wextra", "-Wno-maybe-uninitialized"]


def cuda_sources() -> list[str]:
    return sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc" / "cuda").glob("*.cu"))


class BuildKernels(build_ext):
    def build_extension(self, ext) -> None:
        self._build_cpu(ext)

    def _build_cpu(self, ext) -> None:
        import pybind11
        import sysconfig

        cxx = os.environ.get("CXX", "g++")
        extra = os.environ.get("PIXELBYTES_CPU_FLAGS", "").split()
        build = Path(self.build_temp) / "cpu"
        build.mkdir(parents=True, exist_ok=True)
        kernels = sorted((ROOT / "csrc" / "cpu").glob("*.cpp"))
        jobs = []
        includes = [f"-I{ROOT / 'csrc'}", f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
        headers = max(p.stat().st_mtime for p in (ROOT / "csrc").rglob("*.h"))
        objects = []

        def add(src: Path, obj: Path, flags: list[str]) -> None:
            objects.append(str(obj))
            if obj.exists() and obj.stat().st_mtime > max(src.stat().st_mtime, headers):
                return
            jobs.append([cxx, *CXX_FLAGS, "-fopenmp", *flags, *extra, *includes, "-c", str(src), "-o", str(obj)])

        add(ROOT / "csrc" / "bindings.cpp", build / "bindings.o", [f"-DPIXELBYTES_X86={int(X86)}"])
        for name, flags in INSTRUCTION_SETS.items():
            for src in kernels:
                add(src, build / f"{src.stem}.{name}.o", [f"-DPIXELBYTES_ISA={name}", *flags])
        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            list(pool.map(lambda c: subprocess.run(c, check=True), jobs))
        out = Path(self.get_ext_fullpath(ext.name))
        out.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run([cxx, "-shared", *objects, "-fopenmp", *extra, "-o", str(out)], check=True)
