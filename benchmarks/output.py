"""Rows as a table on the terminal, as CSV and as JSON."""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks.harness import OURS, Goal, Row
from benchmarks.machine import copy_bandwidth, environment


def record(row: Row) -> dict[str, str | float | int | None]:
    """A row as it is written to files, with the machine it was measured on."""

    def number(x: float | None) -> float | None:
        return None if x is None or math.isnan(x) else float(f"{x:.6g}")

    seconds = row.value * {"ms": 1e-3, "us": 1e-6}.get(row.unit, math.nan)
    rate = row.traffic / seconds if row.traffic else None
    goal = row.goal
    return {
        "op": row.op,
        "what": row.what,
        "sizes": row.sizes,
        "dtype": row.dtype,
        "threads": row.threads,
        "contestant": row.contestant,
        "value": number(row.value),
        "quantile_20": number(row.low),
        "quantile_80": number(row.high),
        "unit": row.unit,
        "ratio": number(row.ratio),
        "must": goal.must if goal else None,
        "aim": goal.aim if goal else None,
        "goal_of": f"{goal.of} {'at least' if goal.at_least else 'at most'}" if goal else None,
        "verdict": row.verdict or None,
        "GB_per_s": number(rate / 1e9) if rate else None,
        "share_of_copy_bandwidth": number(rate / copy_bandwidth()) if rate else None,
        "GFLOP_per_s": number(row.gflops),
        "note": row.note or None,
        **environment(),
    }


def figure(x: float, unit: str = "") -> str:
    if math.isnan(x):
        return "-"
    if unit == "bytes":
        return f"{x / 1e6:,.2f} MB"
    return f"{x:,.0f}" if abs(x) >= 1000 else f"{x:.3g}" if abs(x) < 10 else f"{x:.1f}"


def cell(row: Row) -> str:
    """What a contestant's column says: ours the figure, others how many times ours; then goal and verdict."""
    if row.ratio is None:
        text = figure(row.value, row.unit)
        if not math.isnan(row.low):
            text += f" [{figure(row.low)}, {figure(row.high)}]"
    else:
        text = f"{figure(row.ratio)}x ({figure(row.value, row.unit)})"
    return text + goal_text(row.goal, row.verdict)


def goal_text(goal: Goal | None, verdict: str) -> str:
    if goal is None:
        return ""
    sign = "" if goal.at_least else "<= "
    aim = "" if goal.aim is None else f" / {sign}{goal.aim:g}"
    return f"  ({sign}{goal.must:g}{aim}: {verdict.upper() if verdict == 'missed' else verdict})"


def table(rows: Sequence[Row]) -> str:
    """One block for each op and measure: a line for each size, a column for each contestant; then the notes."""
    blocks: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        blocks.setdefault((row.op, row.what, row.unit), []).append(row)
    lines: list[str] = []
    for (op, what, unit), block in blocks.items():
        names = list(dict.fromkeys(row.contestant for row in block))
        header = ["", *(f"{unit} of {name}" if name == OURS else f"vs {name}" for name in names)]
        cells: dict[str, dict[str, str]] = {}
        for row in block:
            cells.setdefault(row.sizes, {})[row.contestant] = cell(row)
        body = [[sizes, *(of_size.get(name, "") for name in names)] for sizes, of_size in cells.items()]
        widths = [max(len(line[i]) for line in [header, *body]) for i in range(len(header))]
        lines.append(f"{op}: {what}, {unit}, {block[0].dtype}, {block[0].threads} thread(s)")
        for line in [header, *body]:
            lines.append(
                "  " + "   ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip()
            )
        notes = dict.fromkeys(f"  {row.contestant}: {row.note}" for row in block if row.note)
        lines += [*notes, ""]
    return "\n".join(lines)


def summary(rows: Iterable[Row]) -> str:
    verdicts = [row.verdict for row in rows if row.verdict]
    return (
        f"goals: {verdicts.count('aim met')} aims met, {verdicts.count('met')} met, {verdicts.count('missed')} missed"
    )


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    text = io.StringIO()
    records = [record(row) for row in rows]
    writer = csv.DictWriter(text, list(records[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    _write(path, text.getvalue())


def write_json(path: Path, rows: Sequence[Row]) -> None:
    _write(path, json.dumps([record(row) for row in rows], indent=1) + "\n")


def _write(path: Path, text: str) -> None:
    """Aside, then renamed: an earlier file stays whole whatever happens."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".part")
    try:
        aside.write_text(text, encoding="utf-8")
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
