"""Rows as a table on the terminal, as CSV and as JSON."""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.goals import goal_of, judged, verdict
from benchmarks.harness import OURS, Goal, Row
from benchmarks.machine import copy_bandwidth, environment, peak_flops

Record = dict[str, Any]
KEY = ("op", "what", "sizes", "dtype", "device", "threads", "contestant")  # of a row in a file


def record(row: Row, device: str = "cpu") -> Record:
    """A row as it is written to files, with the machine it was measured on (`device`: "cpu", "cuda:0", ...)."""

    def number(x: float | None) -> float | None:
        return None if x is None or math.isnan(x) else float(f"{x:.6g}")

    seconds = row.value * {"ms": 1e-3, "us": 1e-6}.get(row.unit, math.nan)
    bandwidth, peak = (copy_bandwidth(device), peak_flops(device)) if row.work else (math.nan, math.nan)
    rate, speed = (row.work.bytes / seconds, row.work.flops / seconds) if row.work else (math.nan, math.nan)
    goal = goal_of(row)
    about = environment(device)
    return {
        "op": row.op,
        "what": row.what,
        "sizes": row.sizes,
        "dtype": row.dtype,
        "device": row.device,
        "threads": row.threads,
        "contestant": row.contestant,
        "backend": row.backend or None,
        "value": number(row.value),
        "quantile_20": number(row.low),
        "quantile_80": number(row.high),
        "unit": row.unit,
        "ratio": number(row.ratio),
        "must": goal.must if goal else None,
        "aim": goal.aim if goal else None,
        "goal_of": f"{goal.of} {'at least' if goal.at_least else 'at most'}" if goal else None,
        "verdict": verdict(row) or None,
        "GB_per_s": number(rate / 1e9),
        "percent_of_copy": number(100 * rate / bandwidth),
        "GFLOP_per_s": number(speed / 1e9),
        "percent_of_peak": number(100 * speed / peak),
        "copy_GB_per_s": number(bandwidth / 1e9),
        "peak_GFLOP_per_s": number(peak / 1e9),
        "note": row.note or None,
        **({**dict.fromkeys(about), "machine": row.machine} if row.machine else about),
    }


# ---- on the terminal -------------------------------------------------------------------------------------------------


def figure(x: float, unit: str = "") -> str:
    if math.isnan(x):
        return "-"
    if unit == "bytes":
        return f"{x / 1e6:,.2f} MB"
    return f"{x:,.0f}" if abs(x) >= 1000 else f"{x:.3g}"


def cell(row: Row) -> str:
    """What a contestant's column says: ours the figure, others how many times ours; then goal and verdict."""
    if row.ratio is None:
        text = figure(row.value, row.unit)
        if not math.isnan(row.low):
            text += f" [{figure(row.low)}, {figure(row.high)}]"
    else:
        text = f"{figure(row.ratio)}x ({figure(row.value, row.unit)})"
    return text + goal_text(goal_of(row), verdict(row))


def goal_text(goal: Goal | None, verdict: str) -> str:
    if goal is None:
        return ""
    sign = "" if goal.at_least else "<= "
    aim = "" if goal.aim is None else f" / {sign}{goal.aim:g}"
    return f"  ({sign}{goal.must:g}{aim}: {verdict.upper() if verdict == 'missed' else verdict})"


def roofs(row: Row, device: str) -> str:
    """GB/s and GFLOP/s of what cannot be avoided, and their shares of the machine's copy bandwidth and peak."""
    if row.work is None or math.isnan(row.value):
        return ""
    seconds = row.value * {"ms": 1e-3, "us": 1e-6}[row.unit]
    rate, speed = row.work.bytes / seconds, row.work.flops / seconds
    copied, reached = 100 * rate / copy_bandwidth(device), 100 * speed / peak_flops(device)
    return f"{figure(rate / 1e9)} ({copied:.0f} %), {figure(speed / 1e9)} ({reached:.0f} %)"


def columns(lines: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return [
        "  " + "   ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    ]


def table(rows: Sequence[Row], device: str = "cpu") -> str:
    """One block for each op and measure: a line for each size, a column for each contestant; then the notes."""
    blocks: dict[tuple[str, str, str, str], list[Row]] = {}
    for row in rows:
        blocks.setdefault((row.op, row.what, row.unit, row.dtype), []).append(row)
    lines: list[str] = []
    for (op, what, unit, dtype), block in blocks.items():
        names = sorted(dict.fromkeys(row.contestant for row in block), key=lambda name: name != OURS)
        backend = next((row.backend for row in block if row.backend), "")
        own = f"{unit} of ours" + (f" ({backend})" if backend else "")
        header = ["", *(own if name == OURS else f"vs {name}" for name in names)]
        cells: dict[str, dict[str, str]] = {}
        shares: dict[str, str] = {}
        for row in block:
            cells.setdefault(row.sizes, {})[row.contestant] = cell(row)
            if row.contestant == OURS:
                shares[row.sizes] = roofs(row, device)
        body = [[sizes, *(of_size.get(name, "") for name in names)] for sizes, of_size in cells.items()]
        if any(shares.values()):
            header.append("ours: GB/s (of copy), GFLOP/s (of peak)")
            body = [[*line, shares.get(line[0], "")] for line in body]
        lines.append(f"{op}: {what}, {unit}, {dtype}, {block[0].device}, {block[0].threads} thread(s)")
        lines += columns([header, *body])
        notes = dict.fromkeys(f"  {row.contestant}: {row.note}" for row in block if row.note)
        lines += [*notes, ""]
    return "\n".join(lines)


def goals_table(rows: Sequence[Row]) -> str:
    """Every goal that these rows decide, one a line, the missed ones in capitals."""
    lines = [["what", "sizes", "against", "must", "aim", "got", ""]]
    for row, goal, said in judged(rows):
        sign = "" if goal.at_least else "<= "
        got = row.value if goal.of == "value" else (math.nan if row.ratio is None else row.ratio)
        unit = row.unit if goal.of == "value" else "x"
        lines.append(
            [
                f"{row.op}: {row.what}", row.sizes, row.contestant if goal.of == "ratio" else "-",
                sign + figure(goal.must, unit), "-" if goal.aim is None else sign + figure(goal.aim, unit),
                figure(got, unit), said.upper() if said == "missed" else said,
            ]
        )  # fmt: skip
    return "\n".join(["goals", *columns(lines), "", summary(rows)]) if len(lines) > 1 else summary(rows)


def summary(rows: Iterable[Row]) -> str:
    verdicts = [said for row in rows if (said := verdict(row))]
    return (
        f"goals: {verdicts.count('aim met')} aims met, {verdicts.count('met')} met, {verdicts.count('missed')} missed"
    )


# ---- files -----------------------------------------------------------------------------------------------------------


def _key(row: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(str(row[name]) for name in KEY)


def read_csv(path: Path) -> list[dict[str, str]]:
    """The rows of a file of results, all values as text.

    Raises:
        ValueError: it is not one; the message names the file.
    """
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        found = list(reader)
        if not set(KEY) <= set(reader.fieldnames or ()):
            raise ValueError(f"{path}: not a file of results, columns {', '.join(KEY)} are wanted")
    return found


def merged(old: Sequence[Mapping[str, Any]], new: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """`old` without the figures that were measured again, then `new`, in the order in which ops first came."""
    measured = {_key(row) for row in new}
    kept = [row for row in old if _key(row) not in measured]
    ops = list(dict.fromkeys([row["op"] for row in old] + [row["op"] for row in new]))
    return sorted([*kept, *new], key=lambda row: ops.index(row["op"]))


def write_csv(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    text = io.StringIO()
    names = list(dict.fromkeys(name for row in records for name in row))
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    write_text(path, text.getvalue())


def write_json(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    write_text(path, json.dumps(records, indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    """Aside, then renamed: an earlier file stays whole whatever happens."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".part")
    try:
        aside.write_text(text, encoding="utf-8")
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
