"""pytest benchmarks/: the ops under pytest-benchmark, for its own statistics, comparisons and files.

Each contestant passes the gate first, or its test fails; what is not usable here is skipped with the reason. Groups are
op, sizes and mode, so that contestants stand side by side:

    pytest benchmarks/ --benchmark-group-by=group --benchmark-autosave
    pytest benchmarks/ -k "selective_scan and forward"
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import bench_bysmamba, bench_causal_conv1d, bench_mamba_step, bench_pxby_embed, plain, scans
from benchmarks.bench_trainer import MODELS, batches, make_trainer
from benchmarks.clock import wall
from benchmarks.harness import OURS, Setup, refusal
from pixelbytes_kernels import causal_conv1d_ref, pxby_embed_ref
from pixelbytes_kernels.testing import Inputs, embed_inputs

pytest.importorskip("pytest_benchmark", reason="needs pytest-benchmark: pip install 'pixelbytes[bench]'")

DEVICES = ("cpu", "cuda")
MODES = ("forward", "backward", "both")
NAMES = (OURS, "torch", "triton", "cuda", "pscan", "mambapy", "F.conv1d", "reference", "mamba-ssm", "causal-conv1d")
BATCH, SEQLEN, DIM = 2, 256, 128


def setup_for(device: str) -> Setup:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    torch.set_num_threads(1)
    return Setup(device="cuda:0" if device == "cuda" else "cpu")


def case_of(setup: Setup, op: str) -> tuple[dict[str, Callable[..., Any]], Callable[..., Any], Inputs]:
    """Who takes part, the reference, the inputs."""
    if op == "pxby_embed":
        inputs = setup.place(embed_inputs(BATCH, SEQLEN, dim=64))
        return bench_pxby_embed.contestants(setup), pxby_embed_ref, inputs
    if op == "causal_conv1d":
        inputs = bench_causal_conv1d.conv_inputs(setup, BATCH, SEQLEN, DIM, channels_last=True)
        return bench_causal_conv1d.contestants(setup), functools.partial(causal_conv1d_ref, activation="silu"), inputs
    return scans.contestants(setup, op), scans.OPS[op][1], scans.scan_case(setup, scans.sizes_of(BATCH, SEQLEN, DIM))


@functools.cache
def gate(device: str, op: str, contestant: str) -> str:
    setup = setup_for(device)
    entrants, reference, inputs = case_of(setup, op)
    return "" if contestant == "reference" else refusal(entrants[contestant], reference, inputs)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("contestant", NAMES)
@pytest.mark.parametrize("op", ["selective_scan", "bidirectional_selective_scan", "causal_conv1d", "pxby_embed"])
@pytest.mark.parametrize("device", DEVICES)
def test_op(benchmark, device, op, contestant, mode):
    setup = setup_for(device)
    entrants, _, inputs = case_of(setup, op)
    if contestant not in entrants:
        pytest.skip(f"{contestant} takes no part in {op} here")
    assert gate(device, op, contestant) == ""
    benchmark.group = f"{op}, {mode}, {device}"
    inputs, wanted = scans.leaves(inputs)
    call = functools.partial(entrants[contestant], **inputs)
    dout = torch.randn_like(call())

    def forward() -> Tensor:
        out = call()
        wall(setup.device)
        return out

    def backward(out: Tensor) -> None:
        torch.autograd.grad(out, wanted, dout)
        wall(setup.device)

    if mode == "forward":
        benchmark(forward)
    elif mode == "both":
        benchmark(lambda: backward(call()))
    else:  # a graph serves once: each round makes its own, untimed
        benchmark.pedantic(backward, setup=lambda: ((forward(),), {}), rounds=10, warmup_rounds=1)


@pytest.mark.parametrize("contestant", [OURS, "torch", "reference"])
@pytest.mark.parametrize("device", DEVICES)
def test_decode_step(benchmark, device, contestant):
    setup = setup_for(device)
    if contestant not in bench_mamba_step.chosen(setup):
        pytest.skip(f"{contestant} takes no part here")
    case = {"layers": 2, "d_model": 64, "batch": 1}
    step, x = bench_mamba_step.decoder(contestant, case, setup.device), bench_mamba_step.token(64, 1).to(setup.device)
    layers = bench_mamba_step.make_layers(case, torch.float64, setup.device)
    oracle = bench_mamba_step.checked(functools.partial(plain.decode_step, layers=layers), x.double())
    for name, found in bench_mamba_step.checked(step, x).items():
        torch.testing.assert_close(found.double(), oracle[name], rtol=1e-4, atol=1e-4)
    benchmark.group = f"decode step, {device}"
    benchmark(lambda: (step(x.clone()), wall(setup.device)))


@pytest.mark.parametrize("contestant", [OURS, "torch", "triton", "pscan"])
@pytest.mark.parametrize("device", DEVICES)
def test_training_step(benchmark, device, contestant):
    setup = setup_for(device)
    if contestant not in bench_bysmamba.contestants(setup):
        pytest.skip(f"{contestant} takes no part here")
    assert contestant not in bench_bysmamba.gate(setup, dim=16, depth=1, seqlen=11)
    benchmark.group = f"training step, {device}"
    step = bench_bysmamba.workload(setup, contestant, {"batch": 2, "seqlen": 256, "dim": 64, "depth": 2})
    benchmark.pedantic(step, rounds=5, warmup_rounds=1)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("device", DEVICES)
def test_trainer_iteration(benchmark, device, model, tmp_path):
    setup = setup_for(device)
    trainer = make_trainer(setup, model, str(tmp_path))
    fetch = batches(trainer)
    benchmark.group = f"trainer iteration, {device}"
    benchmark.pedantic(lambda: trainer._train_step(*next(fetch)), rounds=3, warmup_rounds=1)
