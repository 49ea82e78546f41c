"""Decoding: one token through every layer of a Mamba, one call against layer by layer in eager PyTorch."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from benchmarks import counts, plain
from benchmarks.clock import wall
from benchmarks.contestants import auto, backends
from benchmarks.harness import OURS, Row, Run, Setup, measure, refusal_of, why_not, words
from pixelbytes.modules import Mamba
from pixelbytes_kernels import MambaLayer, MambaStep

OP = "mamba_step"
CASES: list[dict[str, int]] = [
    {"layers": 8, "d_model": 64, "batch": 1},
    {"layers": 8, "d_model": 256, "batch": 1},
    {"layers": 8, "d_model": 64, "batch": 8},
]
GRAPH = "ours, CUDA graph"  # captured once, replayed for every token
TOKENS = 50  # a sample
CHECKED = 20  # tokens that the gate compares


def make_layers(case: Mapping[str, int], dtype: torch.dtype = torch.float32, device: str = "cpu") -> list[MambaLayer]:
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
            tensors: list[Any] = [None if t is None else t.detach().to(device, dtype) for t in (*weights, *states)]
            made.append(MambaLayer(*tensors))
    return made


def token(d_model: int, batch: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(batch, d_model, generator=torch.Generator().manual_seed(1)).to(dtype)


def decoder(contestant: str, case: Mapping[str, int], device: str = "cpu") -> Callable[[Tensor], Tensor]:
    layers = make_layers(case, device=device)
    if contestant == "reference":
        return torch.no_grad()(lambda x: plain.decode_step(x, layers))
    if contestant == GRAPH:
        return replayed(layers, case, device)
    return MambaStep(layers, backend="auto" if contestant == OURS else contestant)


def replayed(layers: list[MambaLayer], case: Mapping[str, int], device: str) -> Callable[[Tensor], Tensor]:
    """A step captured into a CUDA graph, from empty states."""
    step, x = MambaStep(layers), token(case["d_model"], case["batch"]).to(device)
    with torch.cuda.device(device), torch.no_grad():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # kernels are compiled and libraries loaded outside of the capture
            for _ in range(3):
                step(x)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = step(x)
        for layer in layers:
            layer.conv_state.zero_()
            layer.state.zero_()

    def replay(given: Tensor) -> Tensor:
        x.copy_(given)
        graph.replay()
        given.copy_(out)
        return given

    return replay


def checked(step: Callable[[Tensor], Tensor], x: Tensor) -> dict[str, Tensor]:
    """What each of a few tokens becomes, the input growing so that the states are used."""
    with torch.no_grad():
        return {f"token {i}": step(x.clone() * (1 + 0.1 * i)).clone() for i in range(CHECKED)}


def chosen(setup: Setup) -> list[str]:
    others = list(backends(setup, OP, MambaStep))
    return [*others, "reference", *([GRAPH] if setup.on_gpu else [])]


def rows(setup: Setup) -> Iterator[Row]:
    for case in CASES[: 1 if setup.quick else None]:
        setup.report(f"{OP} {words(case)}")
        x = token(case["d_model"], case["batch"]).to(setup.device)
        wide = make_layers(case, torch.float64, setup.device)
        oracle = checked(functools.partial(plain.decode_step, layers=wide), x.double())
        eager = checked(decoder("reference", case, setup.device), x)
        refused: dict[str, str] = {}
        runs: dict[str, Run] = {}
        for c in chosen(setup):
            try:
                why = refusal_of(checked(decoder(c, case, setup.device), x), eager, oracle)
                if why:
                    refused[c] = why
                else:
                    runs[c] = functools.partial(tokens, decoder(c, case, setup.device), x, setup.device)
            except Exception as failed:
                refused[c] = why_not(failed)
        work = {"a token": counts.decode(**case)}
        about: dict[str, Any] = {"of": "a token", "unit": "us", "work": work, "backend": auto(setup, OP)}
        yield from measure(setup, OP, words(case), runs, refused, **about)


def tokens(step: Callable[[Tensor], Tensor], x: Tensor, device: str) -> dict[str, float]:
    """Seconds a token, Python included: a model decodes one token after the other."""
    x = x.clone()
    start = wall(device)
    for _ in range(TOKENS):
        step(x)
    return {"a token": (wall(device) - start) / TOKENS}


PARTS = {"all": rows}
