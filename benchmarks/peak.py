"""Peak resident memory of one contestant, above what the process held when the pass began. Run in a process of its own:

python -m benchmarks.peak selective_scan pscan batch=8 seqlen=1024 dim=128 dstate=16
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import torch

from benchmarks.harness import Setup

STATUS = Path("/proc/self/status")


def _kibibytes(name: str) -> int:
    for line in STATUS.read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1])
    raise OSError(f"{STATUS} does not name {name}")


def peak(op: str, contestant: str, sizes: dict[str, int]) -> int:
    """Bytes.

    Raises:
        OSError: no /proc here.
    """
    torch.set_num_threads(1)
    bench, setup = importlib.import_module(f"benchmarks.bench_{op}"), Setup()
    small = {name: size if name in ("dim", "dstate", "vocab") else min(size, 32) for name, size in sizes.items()}
    bench.workload(setup, contestant, small)()  # loads libraries and allocates what is allocated once
    run = bench.workload(setup, contestant, sizes)
    start = _kibibytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    run()
    return (_kibibytes("VmHWM") - start) * 1024


if __name__ == "__main__":
    pairs = (argument.split("=") for argument in sys.argv[3:])
    print(peak(sys.argv[1], sys.argv[2], {name: int(size) for name, size in pairs}))
