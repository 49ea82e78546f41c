"""`selective_scan`: one direction. What is measured stands in scans.py."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from benchmarks import scans
from benchmarks.harness import Row, Run, Setup

OP = "selective_scan"


def rows(setup: Setup) -> Iterator[Row]:
    yield from scans.rows(setup, OP)


def workload(setup: Setup, contestant: str, sizes: Mapping[str, int]) -> Run:
    return scans.workload(setup, OP, contestant, sizes)
