"""Where a measurement was made: the machine, the versions, the commit, and the roofs it is held against."""

from __future__ import annotations

import datetime
import functools
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from pixelbytes_kernels import available_backends


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def commit() -> str:
    """The commit of the checkout this file lies in, with "+" where files differ from it; "unknown" outside of one."""
    folder = Path(__file__).parent

    def git(*arguments: str) -> str:
        try:
            done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=False)
        except OSError:
            return ""
        return done.stdout.strip() if done.returncode == 0 else ""

    name = git("rev-parse", "--short", "HEAD")
    return name + ("+" if name and git("status", "--porcelain", "--untracked-files=no") else "") or "unknown"


@functools.cache
def environment() -> dict[str, str]:
    """What every row carries."""
    return {
        "machine": f"{_processor()} ({os.cpu_count()} cores, {platform.machine()})",
        "system": platform.system(),
        "backend": available_backends()["cpu"][1],
        "python": ".".join(map(str, sys.version_info[:3])),
        "torch": torch.__version__,
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


@functools.cache
def copy_bandwidth(size: int = 1 << 26) -> float:
    """Bytes read and written per second by a large copy, with torch's present number of threads."""
    source = torch.ones(size, dtype=torch.uint8)
    target = torch.empty_like(source)
    times = []
    for _ in range(9):
        start = time.perf_counter()
        target.copy_(source)
        times.append(time.perf_counter() - start)
    return 2 * size / statistics.median(times)
