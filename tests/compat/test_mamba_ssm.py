"""mamba_ssm's functions: what they return for its layouts and dtypes, against the definitions in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from pixelbytes_kernels import causal_conv1d_ref, mamba_inner_ref, selective_scan_ref
from pixelbytes_kernels.compat import selective_scan_interface as scan_module
from pixelbytes_kernels.compat import selective_state_update as state_module
from pixelbytes_kernels.testing import assert_matches, error, rounded, scan_inputs

F64 = torch.float64
# Our own sums in float32 against the oracle: a few roundings a step, no tolerance from elsewhere.
BOUND = 64 * torch.finfo(torch.float32).eps


def inner_weights(dim=12, dstate=5, rank=3, d_model=8, dtype=torch.float32, seed=0):
    """Weights of `mamba_inner_fn` in the order of its arguments, A included."""
    gen = torch.Generator().manual_seed(seed)

    def normal(*shape, scale=1.0):
        return (torch.randn(*shape, generator=gen, dtype=F64) * scale).to(dtype)

    return {
        "conv1d_weight": normal(dim, 1, 4, scale=0.5),
        "conv1d_bias": normal(dim, scale=0.2),
        "x_proj_weight": normal(rank + 2 * dstate, dim, scale=dim**-0.5),
        "delta_proj_weight": normal(dim, rank, scale=rank**-0.5),
        "out_proj_weight": normal(d_model, dim, scale=dim**-0.5),
        "out_proj_bias": normal(d_model),
        "A": -torch.exp(normal(dim, dstate, scale=0.5)),
        "D": normal(dim),
        "delta_bias": normal(dim, scale=0.3),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("groups", [None, 2])
def test_selective_scan_fn(dtype, groups):
    inputs = scan_inputs(dim=8, dtype=dtype, groups=groups, delta_softplus=True)
    assert_matches(scan_module.selective_scan_fn, selective_scan_ref, inputs)


def test_selective_scan_fn_returns_the_state_in_float32():
    inputs = scan_inputs(dtype=torch.bfloat16)
    out, last = scan_module.selective_scan_fn(**inputs, return_last_state=True)
    _, wanted = selective_scan_ref(**rounded(inputs, F64), return_last_state=True)
    assert out.dtype == torch.bfloat16 and last.dtype == torch.float32
    assert error(last, wanted) <= BOUND


def test_selective_scan_ref_computes_wide_and_returns_narrow():
    inputs = scan_inputs(dtype=torch.bfloat16)
    out, last = scan_module.selective_scan_ref(**inputs, return_last_state=True)
    wanted, wanted_last = selective_scan_ref(**rounded(inputs, F64), return_last_state=True)
    assert out.dtype == torch.bfloat16 and last.dtype == torch.float32
    assert error(last, wanted_last) <= BOUND
    assert error(out, wanted) <= torch.finfo(torch.bfloat16).eps  # one rounding, at the end


@pytest.mark.parametrize("name", ["selective_scan_fn", "selective_scan_ref"])
def test_complex_A_is_not_served(name):
    inputs = scan_inputs()
    inputs["A"] = inputs["A"].to(torch.complex64)
    with pytest.raises(NotImplementedError, match="complex A"):
        getattr(scan_module, name)(**inputs)


def test_mamba_inner_fn():
    inputs = {"xz": torch.randn(2, 24, 19, generator=torch.Generator().manual_seed(1)), **inner_weights()}
    assert_matches(scan_module.mamba_inner_fn, mamba_inner_ref, inputs)
    with pytest.raises(ValueError, match="checkpoint_lvl"):
        scan_module.mamba_inner_fn(**inputs, checkpoint_lvl=2)


def inner_by_hand(xz, w, downwards=False, rms=None, A=None, out_proj=True):
    """mamba_ssm's mixer as its paper and Vim's describe it, from the definitions of convolution and scan."""
    if downwards:
        xz = xz.flip(-1)
    x, z = xz.chunk(2, dim=1)
    u = causal_conv1d_ref(x, w["conv1d_weight"].squeeze(1), w["conv1d_bias"], "silu")
    rank, dstate = w["delta_proj_weight"].shape[1], w["A"].shape[1]
    dt, B, C = (u.transpose(1, 2) @ w["x_proj_weight"].T).split([rank, dstate, dstate], dim=-1)
    delta = dt @ w["delta_proj_weight"].T
    if rms is not None:
        delta, B, C = (
            rows / (rows.square().mean(-1, keepdim=True) + rms["eps"]).sqrt() * rms[name]
            for name, rows in (("dt", delta), ("b", B), ("c", C))
        )
    y = selective_scan_ref(
        u, delta.transpose(1, 2), w["A"], B.transpose(1, 2), C.transpose(1, 2), w["D"], z, w["delta_bias"], True
    )
    if downwards:
        y = y.flip(-1)
    return F.linear(y.transpose(1, 2), w["out_proj_weight"], w["out_proj_bias"]) if out_proj else y


def test_mamba_inner_fn_with_rms_norms():
    """The norm of delta is taken behind its projection."""
    xz = torch.randn(2, 24, 19, generator=torch.Generator().manual_seed(1))
    weights = inner_weights()
    gen = torch.Generator().manual_seed(2)
    rms = {
        "dt": torch.rand(12, generator=gen),
        "b": torch.rand(5, generator=gen),
        "c": torch.rand(5, generator=gen),
        "eps": 1e-3,
    }
    options = {
        "b_rms_weight": rms["b"],
        "c_rms_weight": rms["c"],
        "dt_rms_weight": rms["dt"],
        "b_c_dt_rms_eps": rms["eps"],
    }
    found = scan_module.mamba_inner_fn(xz, **weights, **options)
    wide = {k: v.double() if torch.is_tensor(v) else v for k, v in rms.items()}
    wanted = inner_by_hand(xz.double(), rounded(weights, F64), rms=wide)
    assert error(found, wanted) <= BOUND


def test_vim_functions():
    """v1 scans one convolution's output in both directions; the scan downwards is a scan of everything flipped."""
    xz = torch.randn(2, 24, 19, generator=torch.Generator().manual_seed(1))
    weights = inner_weights()
    w, wide_xz = rounded(weights, F64), xz.double()
    A_b = weights["A"] * 0.5
    x, z = wide_xz.chunk(2, dim=1)
    u = causal_conv1d_ref(x, w["conv1d_weight"].squeeze(1), w["conv1d_bias"], "silu")
    dt, B, C = (u.transpose(1, 2) @ w["x_proj_weight"].T).split([3, 5, 5], dim=-1)
    sequences = (u, (dt @ w["delta_proj_weight"].T).transpose(1, 2), B.transpose(1, 2), C.transpose(1, 2), z)

    def scan(u, delta, B, C, z, A):
        return selective_scan_ref(u, delta, A, B, C, w["D"], z, w["delta_bias"], True)

    y = scan(*sequences, w["A"]) + scan(*(s.flip(-1) for s in sequences), A_b.double()).flip(-1)
    wanted = F.linear(y.transpose(1, 2), w["out_proj_weight"], w["out_proj_bias"])
    A = weights.pop("A")
    projections = {k: weights[k] for k in ("out_proj_weight", "out_proj_bias")}
    assert error(scan_module.bimamba_inner_fn(xz, A=A, A_b=A_b, **weights), wanted) <= BOUND
    assert (
        error(scan_module.bimamba_inner_ref(wide_xz, A=A.double(), A_b=A_b.double(), **rounded(weights, F64)), wanted)
        <= 1e-12
    )
    for name in projections:
        del weights[name]
    found = scan_module.mamba_inner_fn_no_out_proj(xz, A=A, **weights)
    assert error(found, inner_by_hand(wide_xz, w, out_proj=False)) <= BOUND


def state_inputs(batch=3, heads=2, dim=4, dstate=5, groups=2, rows=None, seed=0):
    gen = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=gen)

    return {
        "state": normal(rows or batch, heads, dim, dstate),
        "x": normal(batch, heads, dim),
        "dt": normal(batch, heads, dim),
        "A": -torch.rand(heads, dim, dstate, generator=gen),
        "B": normal(batch, groups, dstate),
        "C": normal(batch, groups, dstate),
        "D": normal(heads, dim),
        "z": normal(batch, heads, dim),
        "dt_bias": normal(heads, dim),
        "dt_softplus": True,
    }


def one_head(i, head, group):
    """Head `head` alone, as (batch, dim) arguments."""
    sequence = {k: i[k][:, head] for k in ("x", "dt", "z")}
    return {
        "state": i["state"][:, head], "A": i["A"][head], "B": i["B"][:, group], "C": i["C"][:, group], "D": i["D"][head],
        "dt_bias": i["dt_bias"][head], "dt_softplus": True, **sequence,
    }  # fmt: skip


@pytest.mark.parametrize("name", ["selective_state_update", "selective_state_update_ref"])
@pytest.mark.parametrize("strided", [False, True], ids=["contiguous", "strided state"])
def test_heads_equal_head_by_head(name, strided):
    """A state that cannot be flattened in place is updated all the same."""
    inputs = state_inputs()
    if strided:
        inputs["state"] = inputs["state"].permute(1, 3, 0, 2).contiguous().permute(2, 0, 3, 1)
    wide = rounded(inputs, F64)
    outs = [state_module.selective_state_update_ref(**one_head(wide, head, head)) for head in range(2)]
    out = getattr(state_module, name)(**inputs)
    assert out.shape == (3, 2, 4)
    assert error(out, torch.stack(outs, dim=1)) <= BOUND
    assert error(inputs["state"], wide["state"]) <= BOUND


def test_state_batch_indices_pick_rows_and_leave_the_others():
    inputs = state_inputs(rows=7)
    rows = torch.tensor([5, 0, 3], dtype=torch.int32)
    before = inputs["state"].clone()
    picked = {**inputs, "state": before[rows.long()].clone()}
    wanted = state_module.selective_state_update(**picked)
    out = state_module.selective_state_update(**inputs, state_batch_indices=rows)
    assert torch.equal(out, wanted)
    assert torch.equal(inputs["state"][rows.long()], picked["state"])
    others = [1, 2, 4, 6]
    assert torch.equal(inputs["state"][others], before[others])
