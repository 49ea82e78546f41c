"""Times pxby_embed, forward + backward, against eager PyTorch: alternated, medians, after a check of the results.

Columns: milliseconds of forward and backward; how many times faster than the reference (eager PyTorch); bytes that
autograd keeps for the backward, the weights not counted, and how many times fewer; the share of this machine's copy
bandwidth that the unavoidable traffic (ids in twice, output out, its gradient in) takes in that time.

    python benchmarks/bench_pxby_embed.py --threads 1 --rounds 15
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import time
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from pixelbytes_kernels import available_backends, pxby_embed, pxby_embed_ref
from pixelbytes_kernels.testing import assert_matches, embed_inputs

# batch, seqlen, vocab, dim, dtype of the ids
SIZES = [
    (32, 256, 113, 64, torch.int64),
    (32, 1024, 113, 64, torch.int64),
    (32, 256, 113, 64, torch.uint8),
    (32, 256, 113, 81, torch.int64),
    (32, 256, 320, 256, torch.int16),
    (1, 64, 113, 64, torch.int64),
    (1, 1, 113, 64, torch.int64),
]


def copy_bandwidth(size: int = 1 << 26) -> float:
    """Bytes read and written per second by a large copy."""
    source = torch.ones(size, dtype=torch.uint8)
    target = torch.empty_like(source)
    times = []
    for _ in range(9):
        start = time.perf_counter()
        target.copy_(source)
        times.append(time.perf_counter() - start)
    return 2 * size / statistics.median(times)


def saved_bytes(call, weights: list[Tensor]) -> int:
    """Bytes of the distinct storages kept for the backward, without those of the weights."""
    known = {w.untyped_storage().data_ptr() for w in weights}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = call()
    del out
    return sum(kept.values())


def measure(backends: list[str], inputs: dict, rounds: int) -> dict[str, tuple[float, float]]:
    """Median seconds of forward and backward for each backend, one after the other in every round."""
    weights = [v for k, v in inputs.items() if k != "tokens" and v is not None]
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in backends}
    dout = None
    for turn in range(rounds + 2):
        for name in backends:
            start = time.perf_counter()
            out = pxby_embed(**inputs, backend=name)
            between = time.perf_counter()
            dout = torch.randn_like(out) if dout is None else dout
            resumed = time.perf_counter()
            torch.autograd.grad(out, weights, dout)
            end = time.perf_counter()
            del out
            if turn >= 2:  # the first rounds warm up
                times[name].append((between - start, end - resumed))
    return {name: tuple(statistics.median(part) for part in zip(*list_, strict=True)) for name, list_ in times.items()}


def commit() -> str:
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or "unknown"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1, help="threads of every backend (default 1)")
    parser.add_argument("--rounds", type=int, default=15, help="timed rounds (default 15)")
    parser.add_argument("--first", type=int, default=len(SIZES), help="only the first so many sizes")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    usable = available_backends()
    backends = ["reference", "torch", *(["cpu"] if usable["cpu"][0] else [])]
    bandwidth = copy_bandwidth()
    print(f"pxby_embed, float32, {args.threads} thread(s), {usable['cpu'][1]}, torch {torch.__version__}, {commit()}")
    print(f"copy bandwidth {bandwidth / 1e9:.1f} GB/s; medians of {args.rounds} alternated rounds\n")
    names = f"{'batch seqlen vocab dim ids':<34}{'backend':<11}"
    print(f"{names}{'fwd ms':>9}{'bwd ms':>9}{'x':>8}{'saved':>12}{'x':>8}{'copy':>7}")
    for batch, seqlen, vocab, dim, ids in SIZES[: args.first]:
        inputs = embed_inputs(batch, seqlen, vocab, dim, ids=ids)
        for name in backends[1:]:
            assert_matches(pxby_embed, pxby_embed_ref, inputs, options={"backend": name})
        weights = [v.requires_grad_() for k, v in inputs.items() if k != "tokens" and v is not None]
        seconds = measure(backends, inputs, args.rounds)
        tokens = inputs["tokens"]
        traffic = 2 * tokens.nbytes + 2 * batch * seqlen * dim * 4
        eager_saved = None
        for name, (forward, backward) in seconds.items():
            kept = saved_bytes(partial(pxby_embed, **inputs, backend=name), weights)
            eager_saved = kept if eager_saved is None else eager_saved
            ratio = sum(seconds["reference"]) / (forward + backward)
            size = f"{batch:>5} {seqlen:>6} {vocab:>5} {dim:>3} {str(ids).removeprefix('torch.')}"
            share = traffic / (forward + backward) / bandwidth
            print(
                f"{size:<34}{name:<11}{forward * 1e3:>9.3f}{backward * 1e3:>9.3f}{ratio:>8.1f}{kept:>12,}"
                f"{eager_saved / max(kept, 1):>8.1f}{share:>7.1%}",
                flush=True,
            )


if __name__ == "__main__":
    main()
