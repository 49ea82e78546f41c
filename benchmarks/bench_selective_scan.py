"""`selective_scan`: one direction. What is measured stands in scans.py."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping

from benchmarks import scans
from benchmarks.harness import Row, Run, Setup

OP = "selective_scan"


PARTS: dict[str, Callable[[Setup], Iterator[Row]]] = {
    part: functools.partial(call, name=OP) for part, call in scans.PARTS.items()
}


def workload(setup: Setup, contestant: str, sizes: Mapping[str, int]) -> Run:
    return scans.workload(setup, OP, contestant, sizes)
