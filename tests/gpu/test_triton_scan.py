"""The Triton scan in Triton's interpreter: options, sizes, dtypes and strides against the oracle, margins, determinism.

The interpreter takes about 50 ms a step of a program, forward and backward: sizes are as small as the risk allows.
"""

from __future__ import annotations

import os

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("runs in Triton's interpreter; a real GPU has test_device.py", allow_module_level=True)

from poisoned import poisoned_allocations  # noqa: E402

import pixelbytes_kernels.ops.selective_scan.triton as backend  # noqa: E402
from pixelbytes_kernels import (  # noqa: E402
    bidirectional_selective_scan,
    bidirectional_selective_scan_ref,
    selective_scan,
    selective_scan_ref,
)
from pixelbytes_kernels._triton import A100, H100, T4, check_grid  # noqa: E402
from pixelbytes_kernels.testing import assert_matches, run, scan_inputs  # noqa: E402

OWN = ("u", "delta", "A", "B", "C", "D", "delta_bias")
both_ways = pytest.mark.parametrize("reverse", [False, True], ids=["up", "down"])


def check(inputs, **shared):
    shared.setdefault("return_last_state", True)
    assert_matches(selective_scan, selective_scan_ref, inputs, options={"backend": "triton"}, **shared)


def check_both(inputs, own=(), other=None, **shared):
    inputs = {**inputs, **{f"{n}_rev": other[n] for n in own}}
    assert_matches(
        bidirectional_selective_scan, bidirectional_selective_scan_ref, inputs, options={"backend": "triton"}, **shared
    )


# Lengths around a block of 4 steps and a chunk of 32; dims that are no tile; dstates that are no power of two.
@both_ways
@pytest.mark.parametrize(
    ("dim", "seqlen", "dstate"), [(1, 1, 1), (5, 3, 3), (3, 4, 16), (19, 5, 2), (2, 33, 4), (2, 2, 256)]
)
def test_sizes(reverse, dim, seqlen, dstate):
    check(scan_inputs(1, dim, seqlen, dstate, initial_state=True), reverse=reverse)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_dtypes_and_layouts(dtype, channels_last):
    inputs = scan_inputs(2, 3, 6, 2, dtype=dtype, channels_last=channels_last)
    check(inputs, out_dtype=torch.float32 if dtype == torch.float16 else None)
    check_both(inputs, scale=0.5)


@both_ways
@pytest.mark.parametrize(
    "kwargs",
    [
        {"D": False, "z": False, "delta_bias": False, "delta_softplus": False},
        {"groups": 3, "seq_idx": True, "initial_state": True},
        {"constant": "B"},
        {"constant": "BC", "seq_idx": True, "z": False},
    ],
    ids=str,
)
def test_options(reverse, kwargs):
    check(scan_inputs(1, 6, 6, 3, **kwargs), reverse=reverse)


@pytest.mark.parametrize("own", [("delta_bias",), ("u",), ("B", "D"), OWN], ids="+".join)
def test_any_tensor_may_be_shared(own):
    check_both(scan_inputs(1, 3, 5, 2), own, scan_inputs(1, 3, 5, 2, seed=7))


def test_one_direction_constant_or_of_another_dtype():
    inputs = scan_inputs(1, 4, 4, 2, groups=2)
    check_both(inputs, ("B",), scan_inputs(1, 4, 4, 2, constant="B", seed=7))
    check_both(scan_inputs(1, 3, 4, 2, dtype=torch.float16), ("u", "B"), scan_inputs(1, 3, 4, 2, seed=7))


def test_only_the_downward_direction_has_a_skip_or_a_bias():
    inputs, other = scan_inputs(1, 3, 4, 2, D=False, delta_bias=False), scan_inputs(1, 3, 4, 2, seed=7)
    check_both({**inputs, "D_rev": other["D"], "delta_bias_rev": other["delta_bias"]})


def test_every_tensor_in_a_layout_of_its_own():
    inputs = scan_inputs(2, 5, 6, 3)
    expected = run(bidirectional_selective_scan, inputs, backend="triton")
    odd = {k: v if not isinstance(v, torch.Tensor) else strange(v, i) for i, (k, v) in enumerate(inputs.items())}
    leaves = {k: v.requires_grad_() if isinstance(v, torch.Tensor) else v for k, v in odd.items()}
    out = bidirectional_selective_scan(**leaves, backend="triton")
    assert torch.equal(out, expected["out0"])
    out.sum().backward()  # an expanded gradient
    assert all(v.grad.isfinite().all() for v in leaves.values() if isinstance(v, torch.Tensor))


def strange(t, i):
    """The same values, two elements apart along one axis, the last axis first for every other tensor."""
    t = t.movedim(-1, 0).contiguous().movedim(0, -1) if i % 2 else t
    big = torch.full((*t.shape[:-1], 2 * t.shape[-1]), torch.nan, dtype=t.dtype)
    big[..., ::2] = t
    return big[..., ::2].detach()


@pytest.mark.parametrize(
    "kwargs", [{}, {"groups": 2, "seq_idx": True, "initial_state": True}, {"constant": "BC"}], ids=str
)
def test_nothing_outside_is_read_or_written(kwargs):
    """Every tensor, scratch memory included, lies between NaN; uninitialised memory is NaN."""
    inputs = scan_inputs(1, 6, 5, 3, **kwargs)
    both = {k: v for k, v in inputs.items() if k != "initial_state"}
    for op, given in ((selective_scan, inputs), (bidirectional_selective_scan, both)):
        expected = run(op, given, backend="triton")
        with poisoned_allocations() as margins:
            inside = {k: margins.around(k, v) if isinstance(v, torch.Tensor) else v for k, v in given.items()}
            got = run_in_place(op, inside)
        for name, value in expected.items():
            assert torch.equal(got[name], value), name


def run_in_place(op, inputs):
    """`testing.run` without its clones, which would leave the margins behind."""
    leaves = {
        k: v.requires_grad_() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in inputs.items()
    }
    out = op(**leaves, backend="triton")
    gen = torch.Generator().manual_seed(1)
    dout = torch.randn(out.shape, generator=gen, dtype=torch.float64).to(torch.bfloat16).to(out.dtype)
    wanted = {k: v for k, v in leaves.items() if isinstance(v, torch.Tensor) and v.requires_grad}
    found = torch.autograd.grad(out, list(wanted.values()), dout)
    return {"out0": out.detach(), **{f"d{k}": g for k, g in zip(wanted, found, strict=True)}}


def test_bitwise_equal_runs():
    inputs = scan_inputs(2, 5, 6, 3)
    first, again = (run(bidirectional_selective_scan, inputs, backend="triton") for _ in range(2))
    assert all(torch.equal(first[k], again[k]) for k in first)


@both_ways
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", ["u", "delta", "A", "B"])
def test_nonfinite_inputs(reverse, bad, name):
    inputs = scan_inputs(1, 3, 5, 3, initial_state=True)
    inputs[name].view(-1)[-1] = bad
    expected = selective_scan_ref(**inputs, reverse=reverse)
    got = selective_scan(**inputs, reverse=reverse, backend="triton")
    assert torch.equal(got.isnan(), expected.isnan())
    assert torch.equal(got == torch.inf, expected == torch.inf)


def test_only_wanted_gradients_exist():
    inputs = scan_inputs(1, 3, 4, 2)
    every = run(bidirectional_selective_scan, inputs, backend="triton")
    for name in ("u", "B", "delta_bias", "z"):
        leaf = inputs[name].clone().requires_grad_()
        out = bidirectional_selective_scan(**{**inputs, name: leaf}, backend="triton")
        gen = torch.Generator().manual_seed(1)
        out.backward(torch.randn(out.shape, generator=gen, dtype=torch.float64).to(torch.bfloat16).to(out.dtype))
        assert torch.equal(leaf.grad, every[f"d{name}"]), name


@pytest.mark.parametrize(("batch", "seqlen"), [(0, 5), (3, 0)])
def test_empty(batch, seqlen):
    result = run(bidirectional_selective_scan, scan_inputs(batch, 6, seqlen, 3), backend="triton")
    assert result["out0"].shape == (batch, 6, seqlen)
    assert all(not v.any() for k, v in result.items() if k != "out0")


def test_compiles_whole():
    inputs = scan_inputs(1, 3, 4, 2)
    torch._dynamo.reset()
    op = torch.compile(lambda **kw: selective_scan(**kw, backend="triton"), fullgraph=True, backend="aot_eager")
    expected, got = run(selective_scan, inputs, backend="triton"), run(op, inputs)
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-5)


def test_offsets_are_wide_where_a_row_is_long():
    small = {"batch": 2, "dim": 8, "seqlen": 8, "DSTATE": 8, "u": torch.empty(2, 8, 8, device="meta")}
    assert not backend.is_wide(small)
    assert backend.is_wide({**small, "u": torch.empty(1, 2**16, 2**15, device="meta")})
    assert backend.is_wide({**small, "seqlen": 2**23, "DSTATE": 256})
    assert backend.is_wide({**small, "batch": 2**15, "dim": 2**12, "DSTATE": 16})


@pytest.mark.parametrize("device", [T4, A100, H100], ids=str)
@pytest.mark.parametrize("dstate", [1, 5, 16, 256])
@pytest.mark.parametrize("channels", [1, 7, 64, 4096])
def test_plans_cover_every_channel(device, dstate, channels):
    for backward in (False, True):
        p = backend.plan(32, channels, dstate, device, backward=backward)
        assert p.tile * p.tiles >= channels > p.tile * (p.tiles - 1)
        assert p.states >= dstate
        assert p.tile & (p.tile - 1) == 0


def test_a_grid_beyond_the_limits_is_an_error():
    with pytest.raises(ValueError, match=r"scan: these sizes need a grid of \(2147483648, 2\) blocks"):
        check_grid("scan", (2**31, 2))
