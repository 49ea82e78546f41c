"""python -m benchmarks [cpu|cuda|all]: what the kernels give on this machine, beside plain PyTorch and the field's
packages.

Every contestant is checked against a float64 oracle before it is timed. Contestants run alternately in one process;
times are medians, with the 20 % and 80 % quantiles in brackets. A column "vs X" says how many times longer X takes (or
how much more it keeps) than ours, its own figure in brackets, then the goals "(must / aim: verdict)" where there are
any.

    contestants   ours        the public function with the backend that "auto" takes
                  cpu, torch, triton, cuda   the other backends usable here; torch is chunked, recomputing PyTorch
                  reference   the definition in eager PyTorch, for scans a loop over time
                  pscan       parallel prefix over time with its gradient by hand, in plain PyTorch
                  compile     torch.compile of the reference; of a chunked loop for scans (not with --quick)
                  F.conv1d    the convolution of PyTorch, then SiLU
                  mambapy     the same prefix as the package mamba.py has it (pip install mambapy)
                  mamba-ssm, causal-conv1d, flash-linear-attention   where they are installed

On a GPU times are those between CUDA events, with the L2 cache flushed and launches queued ahead; whole steps (decoding,
training) are wall-clock times, Python included.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks import numerics, output, report
from benchmarks.contestants import absent
from benchmarks.harness import Row, Setup, why_not
from benchmarks.machine import copy_bandwidth, environment, peak_flops

OPS = (
    "selective_scan", "bidirectional_selective_scan", "causal_conv1d", "pxby_embed", "mamba_step", "bysmamba",
    "trainer", "capacity", "scaling",
)  # fmt: skip
SINGLE = ("mamba_step", "scaling")  # measured in float32 only
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
FOLDER = "benchmark_report"
MINUTES = 13.0  # after these no further op is begun on a GPU


def op_and_part(text: str) -> tuple[str, str]:
    """ "op" or "op/part"; the part is "" for all of them."""
    op, _, part = text.partition("/")
    if op not in OPS:
        raise argparse.ArgumentTypeError(f"there is no op {op!r}; there are {', '.join(OPS)}")
    parts = importlib.import_module(f"benchmarks.bench_{op}").PARTS
    if part and part not in parts:
        raise argparse.ArgumentTypeError(f"{op} has no part {part!r}; there are {', '.join(parts)}")
    return op, part


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("device", nargs="?", choices=("cpu", "cuda", "all"), default="cpu", help="default: cpu")
    help_op = f"only these of: {', '.join(OPS)}; OP/PART for a part of one, such as selective_scan/speed"
    parser.add_argument(
        "--op", nargs="+", type=op_and_part, default=[(op, "") for op in OPS], metavar="OP", help=help_op
    )
    help_seconds = "for each group of contestants (default 5, on a GPU 3; a quarter of it with --quick)"
    parser.add_argument("--seconds", type=float, metavar="S", help=help_seconds)
    parser.add_argument(
        "--quick", action="store_true", help="fewer rounds and contestants: minutes instead of most of an hour"
    )
    help_without = "leave these contestants out, such as compile or triton, which compile for minutes"
    parser.add_argument("--without", nargs="+", default=[], metavar="NAME", help=help_without)
    parser.add_argument("--threads", type=int, default=1, help="threads of every contestant on a CPU (default 1)")
    parser.add_argument("--gpu", type=int, default=0, metavar="N", help="the GPU that is timed (all are checked)")
    parser.add_argument("--dtype", nargs="+", choices=tuple(DTYPES), help="default: float32, and float16 on a GPU")
    help_minutes = f"begin no further op on a GPU after so many minutes (default {MINUTES:g})"
    parser.add_argument("--minutes", type=float, default=MINUTES, help=help_minutes)
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write the rows here, after each op")
    parser.add_argument("--merge", action="store_true", help="keep what FILE holds, but for what is measured again")
    parser.add_argument("--json", type=Path, metavar="FILE", help="the same as JSON")
    help_out = f"folder for results.csv, summary.md and plots (default: {FOLDER} for cuda and all, none for cpu)"
    parser.add_argument("--out", type=Path, metavar="FOLDER", help=help_out)
    args = parser.parse_args(arguments)
    for name, least in (("threads", 1), ("gpu", 0)):
        if getattr(args, name) < least:
            parser.error(f"--{name} must be at least {least}, got {getattr(args, name)}")
    if args.merge and not args.csv:
        parser.error("--merge needs --csv FILE")
    return args


def refuse(message: str) -> int:
    print(f"benchmarks: error: {message}", file=sys.stderr)
    return 2


def progress(text: str) -> None:
    """One line that is written over, on a terminal; a line each otherwise."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text[:110]}", end="", file=sys.stderr, flush=True)
    else:
        print(f"  {text}", file=sys.stderr, flush=True)


def clear_progress() -> None:
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr)


def setups(args: argparse.Namespace, device: str) -> list[Setup]:
    """One for each dtype."""
    names = args.dtype or (["float32"] if device == "cpu" else ["float32", "float16"])
    seconds = args.seconds or (5.0 if device == "cpu" else 3.0)
    more: dict[str, Any] = {"least": 2 if args.quick else 3, "report": progress, "seconds": seconds}
    more["without"] = tuple(args.without)
    return [Setup(quick=args.quick, threads=args.threads, device=device, dtype=DTYPES[name], **more) for name in names]


def header(device: str, threads: int) -> str:
    about = {**environment(device), "copy": f"{copy_bandwidth(device) / 1e9:.1f} GB/s"}
    about["peak"] = f"{peak_flops(device) / 1e9:,.0f} GFLOP/s, float32 matrix product"
    if device == "cpu":
        about["threads"] = str(threads)
    return "\n".join(f"{name:<9} {value}" for name, value in about.items()) + "\n"


def check(args: argparse.Namespace, device: str) -> list[Row]:
    """The numerics of the ops asked for on `device`, and on every other GPU of the machine."""
    ops = [op for op, part in args.op if part in ("", "all", "speed")]
    places = [device] if device == "cpu" else [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    return [row for place in places for setup in setups(args, place) for row in numerics.rows(setup, ops)]


def save(args: argparse.Namespace, folder: Path | None, records: list[Mapping[str, Any]]) -> None:
    if args.csv:
        output.write_csv(args.csv, records)
    if args.json:
        output.write_json(args.json, records)
    if folder:
        output.write_csv(folder / "results.csv", records)


def measured(args: argparse.Namespace, device: str) -> Iterator[list[Row]]:
    """The rows of one op after the other. An op that fails is a row with the reason; the next one goes on."""
    start = time.monotonic()
    for name, part in args.op:
        for setup in setups(args, device):
            if name in SINGLE and setup.dtype != torch.float32 and len(setups(args, device)) > 1:
                continue
            if device != "cpu" and time.monotonic() - start > 60 * args.minutes:
                note = f"left out: {args.minutes:g} minutes are over (--minutes)"
                yield [setup.row(name, "everything", "-", "ours", float("nan"), "", note=note)]
                continue
            found: list[Row] = []
            begun = time.monotonic()
            try:
                parts = importlib.import_module(f"benchmarks.bench_{name}").PARTS
                for row in itertools.chain.from_iterable(call(setup) for p, call in parts.items() if part in ("", p)):
                    found.append(row)
            except Exception as failed:
                found.append(setup.row(name, "everything else", "-", "ours", float("nan"), "", note=why_not(failed)))
            if device != "cpu":
                torch.cuda.empty_cache()
            setup.report(f"{name} {setup.dtype_name}: {time.monotonic() - begun:.0f} s")
            yield found


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    there = torch.cuda.is_available()
    if args.device == "cuda" and not there:
        return refuse("the GPU cannot be measured: torch finds no CUDA device")
    if there and args.gpu >= torch.cuda.device_count():
        return refuse(f"--gpu {args.gpu}: there are {torch.cuda.device_count()} GPU(s)")
    torch.set_num_threads(args.threads)
    devices = [d for d, on in (("cpu", args.device != "cuda"), (f"cuda:{args.gpu}", args.device != "cpu")) if on]
    folder = args.out or (Path(FOLDER) if args.device != "cpu" and there else None)
    start = time.monotonic()
    rows: list[Row] = []
    records: list[Mapping[str, Any]] = []
    try:
        before = output.read_csv(args.csv) if args.merge and args.csv.exists() else []
        for device in devices:
            if device != "cpu" and not there:
                print("cuda     left out: torch finds no CUDA device\n", flush=True)
                continue
            print(header(device, args.threads), flush=True)
            print("\n".join(f"not here  {line}" for line in absent()) + "\n", flush=True)
            for found in itertools.chain([check(args, device)], measured(args, device)):
                rows += found
                records += [output.record(row, device) for row in found]
                clear_progress()
                print(output.table(found, device), flush=True)
                save(args, folder, output.merged(before, records))
    except (OSError, ValueError) as error:
        return refuse(f"{error.filename}: {error.strerror}" if isinstance(error, OSError) else str(error))
    print(f"{output.goals_table(rows)}; {time.monotonic() - start:.0f} s")
    if folder:
        print(f"written: {', '.join(str(path) for path in report.write(folder, records))}")
    wrong = [row for row in rows if row.op == numerics.OP and row.value != 1]
    if wrong:
        print(f"benchmarks: {len(wrong)} numeric checks failed", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
