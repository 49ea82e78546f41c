"""Results as Markdown and plots: what `--out` writes, and what the README is made from (readme.py).

Works on records, the rows of a file of results; nothing is measured here.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import BOTH, OURS
from benchmarks.output import write_text

Records = Sequence[Mapping[str, Any]]
SPEED = ("forward", "backward", BOTH, "a token", "training step")
MARK = "results"  # the entry of a PNG that holds the digest of what it shows
INK = ("#1f6feb", "#d29922", "#2da44e", "#cf222e", "#8250df", "#57606a", "#bf3989", "#1b7c83")


# ---- small things ----------------------------------------------------------------------------------------------------


def number(record: Mapping[str, Any], name: str = "value") -> float | None:
    text = record[name]
    return None if text in (None, "") else float(text)


def figure(x: float | None, unit: str = "") -> str:
    """Three digits that count."""
    if x is None:
        return "-"
    if unit == "bytes":
        x, unit = x / 1e6, "MB"
    text = f"{x:,.0f}" if abs(x) >= 1000 else f"{x:.3g}"
    return f"{text} {unit}" if unit in ("MB", "%") else text


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """A table; the first line is its head."""
    head, *body = lines
    rule = ["---"] + ["---:"] * (len(head) - 1)
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, rule, *body])


def of(records: Records, **wanted: Any) -> list[Mapping[str, Any]]:
    return [r for r in records if all(r[k] in v if isinstance(v, tuple) else r[k] == v for k, v in wanted.items())]


def unique(values: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(values))


def made_by(records: Records) -> str:
    """Where and with what: one sentence."""
    own = [r for r in records if r.get("commit")]
    first = own[0]
    commits, dates = unique(r["commit"] for r in own), sorted({r["date"][:10] for r in own})
    threads = unique(r["threads"] for r in own if r["op"] != "scaling")
    cpu = f", {', '.join(map(str, threads))} thread(s)" if first["device"] == "cpu" else ""
    cuda = "" if first["cuda"] in ("", "none", None) else f", CUDA {first['cuda']}"
    triton = "" if first["triton"] in ("", "none", None) or first["device"] == "cpu" else f", triton {first['triton']}"
    roof = next((r for r in own if r["copy_GB_per_s"] not in (None, "")), None)
    roofs = (
        f" Roofs measured there: copy {figure(number(roof, 'copy_GB_per_s'))} GB/s, "
        f"float32 matrix product {figure(number(roof, 'peak_GFLOP_per_s'))} GFLOP/s."
        if roof
        else ""
    )
    return (
        f"{first['machine']}{cpu}; python {first['python']}, torch {first['torch']}{cuda}{triton}; "
        f"commit {', '.join(commits)}; {' to '.join(unique([dates[0], dates[-1]]))}.{roofs}"
    )


# ---- tables ----------------------------------------------------------------------------------------------------------


def against(record: Mapping[str, Any]) -> str:
    """How many times ours a contestant takes; "not timed" where the gate refused it."""
    ratio = number(record, "ratio")
    if ratio is not None:
        return f"{figure(ratio)}x"
    return "not timed" if number(record) is None else figure(number(record), record["unit"])


def pivot(records: Records, what: str, label: str) -> str:
    """Sizes down, contestants across: ours its figure, the others how many times ours."""
    found = of(records, what=what)
    names = sorted(unique(r["contestant"] for r in found), key=lambda name: name != OURS)
    lines = [[label, *(f"ours, {found[0]['unit']}" if n == OURS else f"{n}, times ours" for n in names)]]
    shares = any(r["percent_of_copy"] not in (None, "") for r in found if r["contestant"] == OURS)
    if shares:
        lines[0] += ["of copy bandwidth", "of peak"]
    for sizes, dtype in unique((r["sizes"], r["dtype"]) for r in found):
        line = {r["contestant"]: r for r in of(found, sizes=sizes, dtype=dtype)}
        cells = [f"{sizes}, {dtype}" if len(unique(r["dtype"] for r in found)) > 1 else sizes]
        for n in names:
            r = line.get(n)
            if r is None:
                cells.append("")
            elif n == OURS and number(r) is not None:
                low, high = number(r, "quantile_20"), number(r, "quantile_80")
                backend = f" ({r['backend']})" if r["backend"] else ""
                span = "" if low is None else f" [{figure(low)}, {figure(high)}]"
                cells.append(f"{figure(number(r), r['unit'])}{span}{backend}")
            else:
                cells.append(against(r))
        if shares:
            own = line.get(OURS)
            for name in ("percent_of_copy", "percent_of_peak"):
                cells.append("" if own is None else figure(number(own, name), "%"))
        lines.append(cells)
    return markdown(lines)


def goals(records: Records) -> str:
    """Every figure that has a goal, with its verdict."""
    lines = [["figure", "sizes", "against", "must", "aim", "got", "verdict"]]
    for r in records:
        if r["verdict"] in (None, ""):
            continue
        value = r["goal_of"].startswith("value")
        unit = r["unit"] if value else ""
        sign = "at most " if r["goal_of"].endswith("most") else ""
        got = number(r) if value else number(r, "ratio")
        times = "" if value else "x"
        aim = number(r, "aim")
        lines.append(
            [
                f"{r['op']}: {r['what']}", r["sizes"], "-" if value else r["contestant"],
                f"{sign}{figure(number(r, 'must'), unit)}{times}",
                "-" if aim is None else f"{sign}{figure(aim, unit)}{times}",
                f"{figure(got, unit)}{times}" if got is not None else "-",
                f"**{r['verdict']}**" if r["verdict"] == "missed" else r["verdict"],
            ]
        )  # fmt: skip
    return markdown(lines) if len(lines) > 1 else ""


def notebook(records: Records) -> str:
    """Iterations per second of the notebook's models, beside its own figure, and where an iteration goes."""
    found = of(records, op="trainer", unit=("it/s", "%"))
    if not found:
        return ""
    shares = [w for w in unique(r["what"] for r in found) if w.endswith("share of an iteration")]
    lines = [["model", "dtype", "it/s here", "it/s in the notebook (Tesla T4)", *(s.split(",")[0] for s in shares)]]
    for sizes, dtype in unique((r["sizes"], r["dtype"]) for r in found):
        of_model = of(found, sizes=sizes)
        mine = {r["what"]: r for r in of(of_model, dtype=dtype, contestant=OURS)}
        published = next((figure(number(r)) for r in of_model if r["contestant"] == "notebook"), "-")
        rate = mine.get("iterations per second")
        cells = [figure(number(mine[s]), "%") if s in mine else "" for s in shares]
        model = sizes.split()[0].removeprefix("model=")
        lines.append([model, dtype, figure(number(rate)) if rate else "-", published, *cells])
    return markdown(lines)


def capacity(records: Records) -> str:
    found = of(records, op="capacity", unit=("bytes", "windows"))
    if not found:
        return ""
    lines = [["BysMamba", "dtype", "bytes a window, ours", "reference", "largest batch in 15 GB, ours", "reference"]]
    for sizes, dtype in unique((r["sizes"], r["dtype"]) for r in found):
        cells = [sizes, dtype]
        for what in ("bytes a window", "largest batch"):
            for contestant in (OURS, "reference"):
                r = of(found, sizes=sizes, dtype=dtype, what=what, contestant=contestant)
                cells.append(figure(number(r[0]), r[0]["unit"] if what != "largest batch" else "") if r else "-")
        lines.append(cells)
    return markdown(lines)


def exponents(records: Records) -> str:
    found = [r for r in of(records, op="scaling") if r["what"].startswith("exponent")]
    lines = [["exponent of", "", "measured", "linear"]]
    for r in found:
        lines.append(
            [
                r["what"].removeprefix("exponent of "),
                r["sizes"],
                figure(number(r)),
                "-1" if "threads" in r["sizes"] else "1",
            ]
        )
    return markdown(lines) if len(lines) > 1 else ""


def notes(records: Records) -> str:
    found = unique(f"- {r['op']}, {r['contestant']}: {r['note']}" for r in records if r["note"] and not number(r))
    return "\n".join(found)


def sections(records: Records) -> list[tuple[str, str]]:
    """Title and Markdown of every table there is something for."""
    numerics = of(records, op="numerics")
    passed = sum(number(r) == 1 for r in numerics)
    found = [("Numerics", f"{passed} of {len(numerics)} checks against the float64 oracle passed." if numerics else "")]
    found.append(("Goals", goals(records)))
    for op in unique(r["op"] for r in records):
        if op in ("numerics", "trainer", "capacity", "scaling"):
            continue
        mine = of(records, op=op)
        for what in unique(r["what"] for r in mine):
            if any(number(r) is not None for r in of(mine, what=what)):
                found.append((f"{op}: {what}", pivot(mine, what, "sizes")))
    found += [
        ("The notebook's own case", notebook(records)),
        ("The largest batch", capacity(records)),
        ("Growth", exponents(records)),
        ("What was not timed, and remarks", notes(records)),
    ]
    return [(title, text) for title, text in found if text]


# ---- plots -----------------------------------------------------------------------------------------------------------


def plot_data(records: Records) -> dict[str, dict[str, Any]]:
    """By file name, what a plot shows: plain values, so that a digest of them tells whether it is up to date."""
    data: dict[str, dict[str, Any]] = {}
    for dtype in unique(r["dtype"] for r in records):
        bars: dict[str, dict[str, float]] = {}
        for r in of(records, dtype=dtype, what=(BOTH, "a token", "training step")):
            ratio = number(r, "ratio")
            if ratio is not None and r["op"] != "scaling":
                bars.setdefault(f"{r['op']} {r['sizes']}", {})[r["contestant"]] = ratio
        if bars:
            data[f"speed_{dtype}.png"] = {"kind": "bars", "title": f"times ours, {dtype}", "bars": bars}
        lines: dict[str, list[tuple[float, float]]] = {}
        for r in of(records, op="scaling", dtype=dtype, what=f"{BOTH}, growth with seqlen"):
            value = number(r)
            if value is not None:
                op, *pairs = r["sizes"].split()
                seqlen = float(dict(p.split("=") for p in pairs)["seqlen"])
                lines.setdefault(op, []).append((seqlen, value))
        if lines:
            data[f"growth_{dtype}.png"] = {"kind": "lines", "title": f"forward + backward, {dtype}", "lines": lines}
        parts: dict[str, dict[str, float]] = {}
        for r in of(records, op="trainer", dtype=dtype, unit="%"):
            share = number(r)
            if share is not None:
                parts.setdefault(r["sizes"].split()[0].removeprefix("model="), {})[r["what"].split(",")[0]] = share
        if parts:
            data[f"iteration_{dtype}.png"] = {"kind": "stack", "title": "where an iteration goes", "parts": parts}
    return data


def digest(data: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def draw(data: Mapping[str, Any]) -> bytes:
    """The PNG of one entry of `plot_data`, which carries its digest."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    draw_one = {"bars": _bars, "lines": _lines, "stack": _stack}[data["kind"]]
    made = draw_one(pyplot, data)
    png = io.BytesIO()
    made.savefig(png, format="png", dpi=110, bbox_inches="tight", metadata={MARK: digest(data)})
    pyplot.close(made)
    return png.getvalue()


def _bars(pyplot: Any, data: Mapping[str, Any]) -> Any:
    """How many times ours each contestant takes, on a log scale; ours is the line at one."""
    cases = list(data["bars"])
    names = unique(n for case in cases for n in data["bars"][case])
    made, axes = pyplot.subplots(figsize=(9, 0.8 + 0.4 * len(cases)))
    for i, name in enumerate(names):
        for k, case in enumerate(cases):
            there = list(data["bars"][case])
            if name not in there:
                continue
            high = 0.8 / len(there)
            place = k + (there.index(name) - (len(there) - 1) / 2) * high
            axes.barh(place, data["bars"][case][name] - 1, high, left=1, color=INK[i % len(INK)])
        axes.barh(0, 0, 0, label=name, color=INK[i % len(INK)])
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xscale("log")
    axes.set_yticks(range(len(cases)), cases, fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel(data["title"] + " (right of the line: slower than ours)")
    axes.legend(fontsize=7, loc="lower right")
    return made


def _lines(pyplot: Any, data: Mapping[str, Any]) -> Any:
    made, axes = pyplot.subplots(figsize=(6, 4))
    for i, (name, points) in enumerate(data["lines"].items()):
        axes.loglog(*zip(*points, strict=True), marker="o", label=name, color=INK[i % len(INK)])
    axes.set_xlabel("seqlen")
    axes.set_ylabel("ms")
    axes.set_title(data["title"], fontsize=9)
    axes.legend(fontsize=7)
    return made


def _stack(pyplot: Any, data: Mapping[str, Any]) -> Any:
    models = list(data["parts"])
    made, axes = pyplot.subplots(figsize=(8, 0.8 + 0.5 * len(models)))
    left = [0.0] * len(models)
    for i, part in enumerate(unique(p for m in models for p in data["parts"][m])):
        widths = [data["parts"][m].get(part, 0.0) for m in models]
        axes.barh(models, widths, left=left, label=part, color=INK[i % len(INK)])
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.set_xlabel(f"{data['title']}, % (medians)")
    axes.legend(fontsize=7, ncols=6, loc="lower center", bbox_to_anchor=(0.5, 1))
    return made


# ---- a folder --------------------------------------------------------------------------------------------------------


def predicted(records: Records) -> list[tuple[str, str]]:
    """The roofline beside what was measured, where the GPU is one that the model knows."""
    from benchmarks import model  # which is made of this module's tables

    known = [gpu for gpu in model.GPUS.values() if any(gpu.name in r["machine"] and r["commit"] for r in records)]
    return [(f"Predicted and measured: {gpu.name}", model.table(gpu, {"": records})) for gpu in known]


def summary(records: Records, plots: Iterable[str] = ()) -> str:
    """The whole report in Markdown."""
    parts = ["# PixelBytes kernels: benchmark report", made_by(records)]
    parts += [f"## {title}\n\n{text}" for title, text in sections(records)]
    parts += [f"## {title}\n\n{text}" for title, text in predicted(records)]
    parts += [f"![{name}]({name})" for name in plots]
    return "\n\n".join(parts) + "\n"


def write(folder: Path, records: Records) -> list[Path]:
    """summary.md and the plots; without matplotlib the plots are left out, and the summary says so."""
    if not records:
        return []
    written: list[Path] = []
    drawn: list[str] = []
    if importlib.util.find_spec("matplotlib") is not None:
        for name, data in plot_data(records).items():
            write_bytes(folder / name, draw(data))
            written.append(folder / name)
            drawn.append(name)
    text = summary(records, drawn)
    if not drawn:
        text += "\nNo plots: matplotlib is not installed.\n"
    write_text(folder / "summary.md", text)
    return [folder / "summary.md", *written]


def write_bytes(path: Path, data: bytes) -> None:
    """Aside, then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".part")
    try:
        aside.write_bytes(data)
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
