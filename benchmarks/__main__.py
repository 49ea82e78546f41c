"""python -m benchmarks [cpu|cuda|all]: what the kernels give on this machine, beside plain PyTorch.

Every contestant is checked against a float64 oracle before it is timed. Contestants run alternately in one process;
times are medians, with the 20 % and 80 % quantiles in brackets. A column "vs X" says how many times longer X takes (or
how much more it keeps) than ours, its own figure in brackets, then the goals "(must / aim: verdict)" where there are
any.

    contestants   ours        the compiled backend, by the public function
                  torch path  ours where nothing compiled is usable: chunked, recomputing PyTorch
                  reference   the definition, a loop over time; eager: plain PyTorch without a kernel
                  pscan       parallel prefix over time with its gradient by hand, in plain PyTorch
                  compile     torch.compile of a chunked loop (not with --quick: it compiles for minutes)
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from pathlib import Path

import torch

from benchmarks import output
from benchmarks.harness import Row, Setup
from benchmarks.machine import copy_bandwidth, environment
from pixelbytes_kernels import available_backends

OPS = ("selective_scan", "bidirectional_selective_scan", "causal_conv1d", "mamba_step", "bysmamba", "pxby_embed")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("device", nargs="?", choices=("cpu", "cuda", "all"), default="cpu", help="default: cpu")
    parser.add_argument(
        "--op", nargs="+", choices=OPS, default=list(OPS), metavar="NAME", help=f"only these of: {', '.join(OPS)}"
    )
    parser.add_argument(
        "--quick", action="store_true", help="fewer rounds and contestants: minutes instead of most of an hour"
    )
    parser.add_argument("--threads", type=int, default=1, help="threads of every contestant (default 1)")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write the rows here, once all are measured")
    parser.add_argument("--json", type=Path, metavar="FILE", help="the same as JSON")
    args = parser.parse_args(arguments)
    if args.threads < 1:
        parser.error(f"--threads must be at least 1, got {args.threads}")
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


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    usable, reason = available_backends()["cuda"]
    if args.device == "cuda":
        return refuse(f"the GPU cannot be measured: {reason if not usable else 'no operation here has a CUDA kernel'}")
    torch.set_num_threads(args.threads)
    setup = Setup(quick=args.quick, threads=args.threads, least=2 if args.quick else 3, report=progress)
    start = time.monotonic()
    about = environment()
    print("\n".join(f"{name:<8} {value}" for name, value in about.items()))
    print(f"{'copy':<8} {copy_bandwidth() / 1e9:.1f} GB/s, {args.threads} thread(s)\n", flush=True)
    if args.device == "all" and not usable:
        print(f"cuda     left out: {reason}\n", flush=True)
    rows: list[Row] = []
    for name in args.op:
        found = list(importlib.import_module(f"benchmarks.bench_{name}").rows(setup))
        rows += found
        if sys.stderr.isatty():
            print("\r\033[K", end="", file=sys.stderr)
        print(output.table(found), flush=True)
    print(f"{output.summary(rows)}; {time.monotonic() - start:.0f} s")
    try:
        if args.csv:
            output.write_csv(args.csv, rows)
        if args.json:
            output.write_json(args.json, rows)
    except OSError as error:
        return refuse(f"cannot write {error.filename}: {error.strerror}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
