"""python -m benchmarks.readme: writes the tables of the README, docs/benchmarks.md and the plots from the results that are
committed; --check only says whether they agree.

Every file benchmarks/results/NAME.csv that `python -m benchmarks --csv` wrote gives a part of docs/benchmarks.md and
plots in docs/benchmarks/NAME/, and tables in the README. Text between

    <!-- begin: NAME --> and <!-- end: NAME -->

belongs to this script.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks import model
from benchmarks.harness import BOTH, OURS
from benchmarks.output import read_csv, write_text
from benchmarks.report import (
    MARK,
    Records,
    against,
    capacity,
    digest,
    draw,
    figure,
    made_by,
    markdown,
    notebook,
    number,
    of,
    plot_data,
    sections,
    write_bytes,
)

ROOT = Path(__file__).parents[1]
RESULTS = Path("benchmarks/results")
DOCS = Path("docs/benchmarks.md")
PLOTS = Path("docs/benchmarks")
BESIDE = (  # the contestants in the order of the columns
    "pscan", "mambapy", "compile", "F.conv1d", "reference", "torch", "triton", "cuda", "mamba-ssm", "causal-conv1d",
    "flash-linear-attention", "ours, CUDA graph",
)  # fmt: skip


def results(root: Path) -> dict[str, list[dict[str, str]]]:
    """The files of results by name, that of the CPU first; other tables in the folder are passed over."""
    found: dict[str, list[dict[str, str]]] = {}
    for path in sorted((root / RESULTS).glob("*.csv"), key=lambda p: (p.stem != "cpu", p.stem)):
        try:
            found[path.stem] = read_csv(path)
        except ValueError:
            continue
    return found


# ---- the README ------------------------------------------------------------------------------------------------------


def speed_table(records: Records) -> str:
    """Whole passes and steps: ours, and how many times longer the others take."""
    rows = [r for r in of(records, what=(BOTH, "a token", "training step"), dtype="float32") if r["op"] != "scaling"]
    names = [n for n in BESIDE if any(r["contestant"] == n for r in rows)]
    lines = [["op", "sizes", "ours", *(f"{n}, times ours" for n in names), "of copy bandwidth", "of peak"]]
    for r in of(rows, contestant=OURS):
        beside = {o["contestant"]: o for o in of(rows, op=r["op"], what=r["what"], sizes=r["sizes"])}
        cells = [against(beside[n]) if n in beside else "" for n in names]
        shares = [figure(number(r, name), "%") for name in ("percent_of_copy", "percent_of_peak")]
        what = "" if r["what"] == BOTH else f", {r['what']}"
        own = f"{figure(number(r))} {r['unit']} ({r['backend']})"
        lines.append([f"`{r['op']}`{what}", r["sizes"], own, *cells, *shares])
    return markdown(lines)


def memory_table(records: Records) -> str:
    """Bytes kept for the backward and peak memory: ours, and how many times more the others take."""
    rows = [r for r in records if r["what"].startswith(("saved for backward", "peak ")) and r["op"] != "scaling"]
    rows = of(rows, dtype="float32")
    names = [n for n in BESIDE if any(r["contestant"] == n for r in rows)]
    lines = [["op", "what", "sizes", "ours", *(f"{n}, times ours" for n in names)]]
    for r in of(rows, contestant=OURS):
        if r["op"] == "causal_conv1d" and "channels last" not in r["sizes"]:
            continue  # the same in both layouts
        beside = {o["contestant"]: o for o in of(rows, op=r["op"], what=r["what"], sizes=r["sizes"])}
        value = figure(number(r), r["unit"]) if r["unit"] == "bytes" else f"{figure(number(r))} {r['unit']}"
        cells = [against(beside[n]) if n in beside else "" for n in names]
        lines.append([f"`{r['op']}`", r["what"], r["sizes"], value, *cells])
    return markdown(lines)


def losses(records: Records) -> str:
    """Where somebody else is faster."""
    found = []
    for r in of(records, unit=("ms", "us")):
        ratio = number(r, "ratio")
        if ratio is not None and ratio < 1:
            found.append(
                f"- `{r['op']}`, {r['what']}, {r['sizes']}, {r['dtype']}: {r['contestant']} takes {figure(ratio)} times ours"
            )
    return "\n".join(found) or "Nowhere in these tables is another contestant faster than ours."


def goal_counts(records: Records) -> str:
    verdicts = [r["verdict"] for r in records if r["verdict"]]
    missed = [r for r in records if r["verdict"] == "missed"]
    text = (
        f"Of {len(verdicts)} goals that were set for one thread, {verdicts.count('aim met')} reach what was hoped for, "
        f"{verdicts.count('met')} what had to be, {len(missed)} neither"
    )
    if not missed:
        return text + "."
    lines = []
    for r in missed:
        value = r["goal_of"].startswith("value")
        got = number(r) if value else number(r, "ratio")
        unit = r["unit"] if value else "times ours"
        shown = "not measured" if got is None else f"{figure(got)} {unit}"
        beside = "" if value else f", {r['contestant']}"
        lines.append(f"- `{r['op']}`, {r['what']}, {r['sizes']}{beside}: {shown}, wanted {figure(number(r, 'must'))}")
    return text + ":\n\n" + "\n".join(lines)


def readme_block(found: Mapping[str, Records]) -> str:
    """The CPU's tables, then the speed on every GPU that somebody measured."""
    parts = [cpu_block(records) if name == "cpu" else gpu_block(name, records) for name, records in found.items()]
    return "\n\n".join(parts) or "Nothing has been measured yet."


def gpu_block(name: str, records: Records) -> str:
    numerics = of(records, op="numerics")
    passed = f"{sum(number(r) == 1 for r in numerics)} of {len(numerics)} numeric checks passed there."
    parts = [
        f"### {records[0]['machine'].partition(' (')[0]}",
        f"Rows of `{RESULTS / f'{name}.csv'}`, measured on {made_by(records)} {passed}",
        speed_table(records),
        notebook(records),
    ]
    return "\n\n".join(part for part in parts if part)


def cpu_block(records: Records) -> str:
    parts = [
        f"Every figure of these tables is a row of `{RESULTS / 'cpu.csv'}`; medians, measured on {made_by(records)}",
        "Forward + backward unless it says otherwise. `pscan` is the parallel scan of pure PyTorch packages in our own "
        "writing, `mambapy` that of the package mamba.py, `compile` torch.compile of the reference (of a chunked loop "
        "for scans), `torch` our fallback without C++.",
        speed_table(records),
        f"![how many times longer the others take]({PLOTS}/cpu/speed_float32.png)",
        "### Memory",
        memory_table(records),
        capacity(records)
        and "The largest batch that trains in 15 GB, from measured bytes (BysMamba, windows of 256 tokens):",
        capacity(records),
        notebook(records)
        and "The notebook's three models at its settings, and where an iteration of the trainer goes:",
        notebook(records),
        "### Where ours loses",
        losses(records),
        "### Goals",
        goal_counts(records),
    ]
    return "\n\n".join(part for part in parts if part)


# ---- docs/benchmarks.md ----------------------------------------------------------------------------------------------


def docs_text(found: Mapping[str, Records]) -> str:
    parts = [
        "# Benchmarks",
        "Written by `python -m benchmarks.readme` from the files in `benchmarks/results/`; a test fails when they differ. "
        "How to measure: `python -m benchmarks --help`; your own machine: `python -m benchmarks cpu` or `cuda`.",
        'A cell "2.5x" is how many times ours another contestant takes. Shares of copy bandwidth and peak are those of '
        "the bytes and operations that cannot be avoided (`benchmarks/counts.py`) against a large copy and a large "
        "float32 matrix product on the same machine, so a kernel that is bound by something else, such as "
        "exponentials, cannot reach 100 %.",
    ]
    for name, records in found.items():
        parts += [f"## {name}", f"`benchmarks/results/{name}.csv`: {made_by(records)}"]
        parts += [f"![{name}, {plot}]({PLOTS.name}/{name}/{plot})" for plot in plot_data(records)]
        parts += [f"### {title}\n\n{text}" for title, text in sections(records)]
    parts += ["## What a T4 should take", model.section(found)]
    return "\n\n".join(parts) + "\n"


# ---- files -----------------------------------------------------------------------------------------------------------


def replaced(text: str, name: str, block: str) -> str:
    """`text` with `block` between the marks of `name`.

    Raises:
        ValueError: the marks are not there.
    """
    begin, end = f"<!-- begin: {name} -->", f"<!-- end: {name} -->"
    before, found, rest = text.partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"the marks {begin} and {end} are wanted")
    return f"{before}{begin}\n{block}\n{end}{after}"


def texts(root: Path) -> dict[Path, str]:
    """What the text files have to hold."""
    found = results(root)
    readme = (root / "README.md").read_text(encoding="utf-8")
    return {DOCS: docs_text(found), Path("README.md"): replaced(readme, "speed", readme_block(found))}


def plots(root: Path) -> dict[Path, Mapping[str, Any]]:
    """What the plots have to show."""
    found = results(root)
    return {PLOTS / name / plot: data for name, records in found.items() for plot, data in plot_data(records).items()}


def shown(path: Path) -> str:
    """The digest of what a plot shows, "" where there is none."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            return str(image.info.get(MARK, ""))
    except OSError:
        return ""


def stale(root: Path = ROOT) -> list[Path]:
    """The files that do not agree with the results."""
    found = []
    for path, text in texts(root).items():
        if not (root / path).exists() or (root / path).read_text(encoding="utf-8") != text:
            found.append(path)
    drawn = plots(root)
    found += [path for path, data in drawn.items() if shown(root / path) != digest(data)]
    found += [p.relative_to(root) for p in (root / PLOTS).rglob("*.png") if p.relative_to(root) not in drawn]
    return found


def write(root: Path = ROOT) -> list[Path]:
    """Brings up to date what is not; returns it."""
    old = stale(root)
    wanted, drawn = texts(root), plots(root)
    for path in old:
        if path in wanted:
            write_text(root / path, wanted[path])
        elif path in drawn:
            write_bytes(root / path, draw(drawn[path]))
        else:
            (root / path).unlink()  # of results that are no longer there
    return old


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.readme", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where something is out of date")
    args = parser.parse_args(arguments)
    try:
        found = stale() if args.check else write()
    except (ValueError, OSError, ImportError) as error:
        print(f"benchmarks.readme: error: {error}", file=sys.stderr)
        return 2
    for path in found:
        print(f"{'out of date' if args.check else 'written'}: {path}")
    return int(args.check and bool(found))


if __name__ == "__main__":
    sys.exit(main())
