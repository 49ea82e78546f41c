"""Builds the extension modules: `_cpu` (one object per source and instruction set), and `_cuda` where there are
sources and an nvcc.

Neither needs torch at build time: the sources see pointers, sizes and strides only. Environment:
    PIXELBYTES_CPU=auto|1|0      auto: a missing or failing C++ compiler warns and installs without `_cpu`; 1: it is
    an error; 0: never PIXELBYTES_CUDA=auto|1|0     the same for nvcc and `_cuda`
    PIXELBYTES_CUDA_ARCHS        e.g. "75,80+PTX"; default: TORCH_CUDA_ARCH_LIST, else sm_75 and sm_80 code plus PTX
    PIXELBYTES_CPU_FLAGS         extra compiler flags for `_cpu`, e.g. "-fsanitize=address,undefined -g"
    CXX, CUDA_HOME, CUDA_PATH    where the compilers are; MAX_JOBS: how many run at once
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from setuptools import Extension, setup

sys.path.insert(0, str(Path(__file__).parent / "build_tools"))

from kernels_build import BuildKernels, cuda_sources, switch  # noqa: E402

extensions = [Extension("pixelbytes_kernels._cpu", ["csrc/bindings.cpp"])]
if cuda_sources():
    extensions.append(Extension("pixelbytes_kernels._cuda", cuda_sources()))
elif switch("PIXELBYTES_CUDA", os.environ) == "1":
    raise SystemExit("pixelbytes: PIXELBYTES_CUDA=1, but this version has no CUDA sources (csrc/cuda/*.cu)")

setup(ext_modules=extensions, cmdclass={"build_ext": BuildKernels})
