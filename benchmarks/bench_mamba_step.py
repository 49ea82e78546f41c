"""Decoding: one token through every layer of a Mamba, one call against layer by layer in eager PyTorch."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from benchmarks import plain
from benchmarks.harness import OURS, Goal, Row, Setup, alternate, refusal_of, time_rows, words
from pixelbytes.modules import Mamba
from pixelbytes_kernels import MambaLayer, MambaStep

OP = "mamba_step"
CASES: list[dict[str, int]] = [
    {"layers": 8, "d_model": 64, "batch": 1},
    {"layers": 8, "d_model": 256, "batch": 1},
    {"layers": 8, "d_model": 64, "batch": 8},
]
GOALS = {OURS: Goal(40, 12, at_least=False, of="value")}  # of the first case
TOKENS = 50  # a sample
CHECKED = 20  # tokens that the gate compares


def make_layers(case: Mapping[str, int], dtype: torch.dtype = torch.float32) -> list[MambaLayer]:
    """The same weights at every call, with states of their own."""
    torch.manual_seed(0)
    made = []
    with torch.no_grad():
        for _ in range(case["layers"]):
            block = Mamba(case["d_model"])
            weights = (
                torch.ones(case["d_model"]), block.in_proj.weight, None, block.conv1d.weight.squeeze(1),
                block.conv1d.bias, block.x_proj.weight, block.dt_proj.weight, block.dt_proj.bias,
                -torch.exp(block.A_log), block.D,
                block.out_proj.weight, None,
            )  # fmt: skip
            states = (
                torch.zeros(case["batch"], block.d_conv - 1, block.d_inner),
                torch.zeros(case["batch"], block.d_inner, block.d_state),
            )
            tensors: list[Any] = [None if t is None else t.detach().to(dtype) for t in (*weights, *states)]
            made.append(MambaLayer(*tensors))
    return made


def token(d_model: int, batch: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(batch, d_model, generator=torch.Generator().manual_seed(1)).to(dtype)


def decoder(contestant: str, case: Mapping[str, int]) -> Callable[[Tensor], Tensor]:
    layers = make_layers(case)
    if contestant == "eager":
        return torch.no_grad()(lambda x: plain.decode_step(x, layers))
    return MambaStep(layers, backend="auto" if contestant == OURS else "torch")


def checked(step: Callable[[Tensor], Tensor], x: Tensor) -> dict[str, Tensor]:
    """What each of a few tokens becomes, the input growing so that the states are used."""
    with torch.no_grad():
        return {f"token {i}": step(x.clone() * (1 + 0.1 * i)).clone() for i in range(CHECKED)}


def rows(setup: Setup) -> Iterator[Row]:
    for index, case in enumerate(CASES[: 1 if setup.quick else None]):
        setup.report(f"{OP} {words(case)}")
        d_model, batch = case["d_model"], case["batch"]
        x = token(d_model, batch)
        wide = make_layers(case, torch.float64)
        oracle = checked(functools.partial(plain.decode_step, layers=wide), x.double())
        eager = checked(decoder("eager", case), x)
        chosen = [OURS, "eager", "torch path"]
        found = {c: refusal_of(checked(decoder(c, case), x), eager, oracle) for c in (OURS, "torch path")}
        refused = {c: why for c, why in found.items() if why}

        def run(step: Callable[[Tensor], Tensor], x: Tensor = x) -> dict[str, float]:
            token = x.clone()
            start = time.perf_counter()
            for _ in range(TOKENS):
                step(token)
            return {"a token": (time.perf_counter() - start) / TOKENS}

        steps = {c: decoder(c, case) for c in chosen if c not in refused}
        runs = {c: functools.partial(run, step) for c, step in steps.items()}
        measured = alternate(runs, setup.budget, setup.least, setup.most)
        goals = GOALS if index == 0 else {}
        yield from time_rows(setup, OP, words(case), measured, refused, goals, of="a token", unit="us")
