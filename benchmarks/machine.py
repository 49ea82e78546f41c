"""Where a measurement was made: the machine, the versions, the commit, and the roofs it is held against."""

from __future__ import annotations

import datetime
import functools
import importlib.metadata
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.clock import Clock
from benchmarks.contestants import peer_versions
from pixelbytes_kernels import available_backends


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def machine_name(device: str) -> str:
    """The processor with its cores, or the GPU with its architecture and memory."""
    if device == "cpu":
        return f"{_processor()} ({os.cpu_count()} cores, {platform.machine()})"
    about = torch.cuda.get_device_properties(device)
    return f"{about.name} (sm_{about.major}{about.minor}, {about.total_memory / 2**30:.0f} GiB)"


def commit() -> str:
    """The commit of the checkout this file lies in, with "+" where files differ from it.

    A copy of the files without their history may say it in the variable BENCHMARKS_COMMIT; else it is "unknown".
    """
    folder = Path(__file__).parent

    def git(*arguments: str) -> str:
        try:
            done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=False)
        except OSError:
            return ""
        return done.stdout.strip() if done.returncode == 0 else ""

    name = git("rev-parse", "--short", "HEAD")
    code = (":(top)pixelbytes", ":(top)pixelbytes_kernels", ":(top)csrc", ":(top)benchmarks/*.py")  # not the results
    changed = name and git("status", "--porcelain", "--untracked-files=no", "--", *code)
    return name + ("+" if changed else "") or os.environ.get("BENCHMARKS_COMMIT", "unknown")


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "none"


@functools.cache
def environment(device: str = "cpu") -> dict[str, str]:
    """What every row carries."""
    return {
        "machine": machine_name(device),
        "system": platform.system(),
        "backends": ", ".join(f"{name} ({about})" for name, (usable, about) in available_backends().items() if usable),
        "python": ".".join(map(str, sys.version_info[:3])),
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda) if device != "cpu" else "none",
        "triton": _version("triton"),
        "peers": peer_versions(),
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


@functools.cache
def copy_bandwidth(device: str = "cpu") -> float:
    """Bytes read and written per second by a large copy; on a CPU with torch's present number of threads."""
    size = 1 << (26 if device == "cpu" else 29)
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    clock, times = Clock(device), []
    for _ in range(9):
        clock.start()
        target.copy_(source)
        clock.mark()
        times += clock.stop()
    return 2 * size / statistics.median(times)


@functools.cache
def peak_flops(device: str = "cpu") -> float:
    """float32 operations per second of a large matrix product (no TF32): what the multiply-add units reach."""
    side = 1024 if device == "cpu" else 4096
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        a, b = torch.ones(side, side, device=device), torch.ones(side, side, device=device)
        out = torch.empty_like(a)
        clock, times = Clock(device), []
        for _ in range(9):
            clock.start()
            torch.mm(a, b, out=out)
            clock.mark()
            times += clock.stop()
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    return 2 * side**3 / min(times)
