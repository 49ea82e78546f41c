"""causal_conv1d_update and selective_state_update in CUDA C++, run by the emulator: the oracle, dtypes, strides, states in place."""

from __future__ import annotations

import pytest
import torch
from emulated import ORDERS, emulated

from pixelbytes_kernels import (
    causal_conv1d_update,
    causal_conv1d_update_ref,
    selective_state_update,
    selective_state_update_ref,
)
from pixelbytes_kernels.testing import conv_inputs, error, rounded, update_inputs

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])


def step(op, inputs, state, *arguments, **options):
    """out and the state after one call; the inputs stay as they are."""
    moved = {**inputs, state: inputs[state].clone(memory_format=torch.preserve_format)}
    out = op(**moved, **options)
    return {"out": out, state: moved[state]}


def check(op, reference, inputs, state, **options):
    """The numeric contract of testing.assert_matches, for an op without gradients that changes a state."""
    oracle = step(reference, rounded(inputs, torch.float64), state, **options)
    plain = step(reference, inputs, state, **options)
    found = {}
    for order in ORDERS:
        with emulated(*order):
            got = step(op, inputs, state, backend="cuda", **options)
        for name, tensor in got.items():
            assert torch.equal(tensor, found.setdefault(name, tensor)), f"{name} depends on the order of threads"
            bound = (
                2 * error(plain[name], oracle[name])
                + 4 * torch.finfo(torch.float32).eps
                + torch.finfo(tensor.dtype).eps / 2
            )
            assert error(tensor, oracle[name]) <= bound, name


@DTYPES
@pytest.mark.parametrize("dstate", [1, 5, 16, 32, 80])
def test_state_update(dstate, dtype):
    check(selective_state_update, selective_state_update_ref, update_inputs(3, 12, dstate, dtype=dtype), "state")


def test_state_update_with_groups_and_without_options():
    check(selective_state_update, selective_state_update_ref, update_inputs(2, 12, 6, groups=3), "state")
    bare = {**update_inputs(2, 7, 6, D=False, z=False, dt_bias=False), "dt_softplus": False}
    bare["dt"] = bare["dt"].abs()
    check(selective_state_update, selective_state_update_ref, bare, "state")


def test_state_update_in_place_through_strides():
    inputs = update_inputs(2, 8, 4)
    inputs["state"] = inputs["state"].transpose(1, 2).contiguous().transpose(1, 2)
    for name in ("x", "dt", "z"):
        inputs[name] = inputs[name].repeat_interleave(2, dim=1)[:, ::2]
    check(selective_state_update, selective_state_update_ref, inputs, "state")


def conv_update_inputs(batch, dim, steps, width, state_len, dtype, state_dtype):
    inputs = conv_inputs(batch, dim, max(steps, 1), width, dtype=dtype)
    gen = torch.Generator().manual_seed(9)
    inputs["conv_state"] = torch.randn(batch, dim, state_len, generator=gen).to(state_dtype)
    if steps == 0:
        inputs["x"] = inputs["x"][..., 0]
    return inputs


@DTYPES
@pytest.mark.parametrize(
    ("steps", "width", "state_len"),
    [(0, 4, 3), (1, 4, 4), (2, 2, 1), (3, 4, 6), (9, 3, 4)],
    ids=["one", "longer state", "short state", "few", "more steps than states"],
)
@pytest.mark.parametrize("activation", [None, "silu"])
def test_conv_update(steps, width, state_len, activation, dtype):
    inputs = conv_update_inputs(3, 50, steps, width, state_len, dtype, dtype)
    check(causal_conv1d_update, causal_conv1d_update_ref, inputs, "conv_state", activation=activation)


def test_conv_update_with_a_state_of_another_dtype_and_layout():
    inputs = conv_update_inputs(2, 6, 0, 4, 3, torch.float16, torch.float32)
    inputs["conv_state"] = inputs["conv_state"].transpose(1, 2).contiguous().transpose(1, 2)
    inputs["bias"] = None
    check(causal_conv1d_update, causal_conv1d_update_ref, inputs, "conv_state")
