"""Times MambaForCausalLM of transformers, forward + backward and decoding, on these kernels beside its own slow path.

Alternated, medians, after a check of losses and gradients against each other. Saved bytes: distinct storages that autograd
keeps for the backward, the weights not counted.

    python benchmarks/bench_transformers.py --threads 1 --out benchmarks/results/transformers.csv
"""

from __future__ import annotations

import argparse
import csv
import statistics
import subprocess
import time
from pathlib import Path

import torch
import transformers
from torch import Tensor

from pixelbytes_kernels.compat.transformers import restore, use_kernels
from pixelbytes_kernels.testing import error

CONFIGS = {"mamba": "Mamba", "falcon_mamba": "FalconMamba"}
AGREE = 1e-4  # of losses and gradients in float32, relative to the largest


def build(name: str, hidden: int, layers: int) -> torch.nn.Module:
    options = {"vocab_size": 256, "hidden_size": hidden, "state_size": 16, "num_hidden_layers": layers}
    config = getattr(transformers, CONFIGS[name] + "Config")(
        **options, pad_token_id=0, bos_token_id=1, eos_token_id=None
    )
    torch.manual_seed(0)
    return getattr(transformers, CONFIGS[name] + "ForCausalLM")(config)


def train_step(model: torch.nn.Module, ids: Tensor) -> tuple[float, list[Tensor]]:
    loss = model(ids, labels=ids).loss
    return loss.item(), list(torch.autograd.grad(loss, list(model.parameters())))


def saved_bytes(model: torch.nn.Module, ids: Tensor) -> int:
    known = {w.untyped_storage().data_ptr() for w in model.parameters()}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = model(ids, labels=ids).loss
    del loss
    return sum(kept.values())


def decode(model: torch.nn.Module, ids: Tensor, count: int) -> Tensor:
    mask = torch.ones_like(ids)
    return model.generate(ids, attention_mask=mask, max_new_tokens=count, min_new_tokens=count, do_sample=False)


def timed(call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def measure(
    name: str, batch: int, seqlen: int, hidden: int, layers: int, rounds: int, tokens: int
) -> dict[str, object]:
    """One row of the table."""
    model = build(name, hidden, layers)
    ids = torch.randint(2, 256, (batch, seqlen), generator=torch.Generator().manual_seed(0))
    ways = {"slow": restore, "ours": use_kernels}
    train: dict[str, list[float]] = {way: [] for way in ways}
    decoding: dict[str, list[float]] = {way: [] for way in ways}
    kept, results, sequences = {}, {}, {}
    for turn in range(rounds + 1):
        for way, switch in ways.items():
            switch()
            model.train()
            if turn == 0:  # also warms up
                results[way], kept[way] = train_step(model, ids), saved_bytes(model, ids)
                sequences[way] = decode(model.eval(), ids[:, :16], tokens)
                continue
            train[way].append(timed(lambda: train_step(model, ids)))
            model.eval()
            decoding[way].append(timed(lambda: decode(model, ids[:, :16], tokens)))
        if turn == 0:
            worst = max(error(a, b) for a, b in zip(results["ours"][1], results["slow"][1], strict=True))
            if not (worst <= AGREE and abs(results["ours"][0] - results["slow"][0]) <= AGREE):
                raise SystemExit(f"{name}: gradients differ by {worst:.2g}; no times of wrong results")
            if not torch.equal(sequences["ours"], sequences["slow"]):
                raise SystemExit(f"{name}: decoded tokens differ; no times of wrong results")
    restore()
    ms = {way: 1000 * statistics.median(times) for way, times in train.items()}
    per_token = {way: 1000 * statistics.median(times) / tokens for way, times in decoding.items()}
    return {
        "model": name, "batch": batch, "seqlen": seqlen, "hidden": hidden, "layers": layers,
        "slow_ms": round(ms["slow"], 1), "ours_ms": round(ms["ours"], 1), "times_faster": round(ms["slow"] / ms["ours"], 2),
        "slow_saved_mib": round(kept["slow"] / 2**20, 1), "ours_saved_mib": round(kept["ours"] / 2**20, 1),
        "times_less": round(kept["slow"] / kept["ours"], 1),
        "slow_ms_token": round(per_token["slow"], 2), "ours_ms_token": round(per_token["ours"], 2),
        "worst_gradient_difference": f"{worst:.1e}",
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (default 1)")
    help_rounds = "timed rounds, the ways alternating (default 3); a slow step takes about a minute at seqlen 512"
    parser.add_argument("--rounds", type=int, default=3, help=help_rounds)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--models", nargs="+", choices=tuple(CONFIGS), default=list(CONFIGS))
    parser.add_argument("--tokens", type=int, default=32, help="decoded per sequence (default 32)")
    parser.add_argument("--out", type=Path, help="a CSV file to write")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    sizes = (arguments.batch, arguments.seqlen, arguments.hidden, arguments.layers, arguments.rounds, arguments.tokens)
    rows = [measure(name, *sizes) for name in arguments.models]
    made_by = {
        "threads": arguments.threads, "torch": torch.__version__, "transformers": transformers.__version__, "commit": commit,
    }  # fmt: skip
    for row in rows:
        row |= made_by
        print(", ".join(f"{key} {value}" for key, value in row.items()))
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        with arguments.out.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
