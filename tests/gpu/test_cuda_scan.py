"""The scans in CUDA C++, run by the emulator: sizes, options, dtypes and strides against the oracle, thread orders, atomics none."""

from __future__ import annotations

import pytest
import torch
from emulated import emulated, run_in_every_order

from pixelbytes_kernels import (
    bidirectional_selective_scan,
    bidirectional_selective_scan_ref,
    selective_scan,
    selective_scan_ref,
)
from pixelbytes_kernels.testing import assert_matches, run, scan_inputs

OWN = ("u", "delta", "A", "B", "C", "D", "delta_bias")
both_ways = pytest.mark.parametrize("reverse", [False, True], ids=["up", "down"])
layouts = pytest.mark.parametrize("channels_last", [False, True], ids=["time", "channels"])


def check(inputs, **shared):
    shared.setdefault("return_last_state", True)
    with emulated():
        assert_matches(selective_scan, selective_scan_ref, inputs, options={"backend": "cuda"}, **shared)


def both(inputs, own=(), other=None):
    return {**inputs, **{f"{n}_rev": other[n] for n in own}} if own else inputs


def check_both(inputs, **shared):
    with emulated():
        assert_matches(
            bidirectional_selective_scan,
            bidirectional_selective_scan_ref,
            inputs,
            options={"backend": "cuda"},
            **shared,
        )


# Lengths around a packet of 4 and chunks of 16, 32 and 64 steps; dims that are no tile; every kernel's dstate, below it and at it.
@both_ways
@pytest.mark.parametrize(
    ("dim", "seqlen", "dstate"),
    [
        (1, 1, 1), (5, 3, 3), (3, 4, 16), (33, 5, 2), (4, 16, 8), (2, 17, 9), (8, 65, 16), (3, 33, 17),
        (2, 20, 32), (2, 6, 64), (2, 5, 65), (1, 4, 256),
    ],
)  # fmt: skip
def test_sizes(reverse, dim, seqlen, dstate):
    check([scan_inputs(2, dim, seqlen, dstate, initial_state=True, seed=s) for s in range(2)], reverse=reverse)


@layouts
@pytest.mark.parametrize(("dim", "seqlen", "dstate"), [(1, 1, 1), (6, 19, 16), (20, 33, 8), (4, 36, 64), (2, 3, 130)])
def test_both_directions(dim, seqlen, dstate, channels_last):
    check_both([scan_inputs(2, dim, seqlen, dstate, channels_last=channels_last, seed=s) for s in range(2)])


@layouts
@pytest.mark.parametrize("own", [OWN, ("u", "delta"), ("A", "D"), ("B",), ("delta_bias",)], ids="+".join)
def test_arguments_of_the_second_direction(own, channels_last):
    inputs, other = (scan_inputs(2, 6, 21, 4, channels_last=channels_last, seed=s) for s in (1, 2))
    check_both(both(inputs, own, other), scale=0.5)


@both_ways
@layouts
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_16_bits(dtype, channels_last, reverse):
    draws = [scan_inputs(2, 8, 22, 16, dtype=dtype, channels_last=channels_last, seed=s) for s in range(3)]
    check(draws, reverse=reverse)


# Autocast: each tensor in a dtype of its own.
@pytest.mark.parametrize("wide", ["u", "delta", "z", "B", "C", "A", "D"])
def test_mixed_dtypes(wide):
    draws = [scan_inputs(2, 4, 13, 5, dtype=torch.float16, seed=s) for s in range(3)]
    for inputs in draws:
        inputs[wide] = inputs[wide].half() if wide in "AD" else inputs[wide].float()
    check(draws)
    check(draws, out_dtype=torch.float32, return_last_state=False)


@both_ways
@pytest.mark.parametrize(
    "options",
    [
        {"D": False},
        {"z": False},
        {"delta_bias": False},
        {"delta_softplus": False},
        {"D": False, "z": False, "delta_bias": False, "delta_softplus": False},
        {"groups": 1},
        {"groups": 3},
        {"constant": "B"},
        {"constant": "C", "groups": 2},
        {"constant": "BC"},
    ],
    ids=str,
)
def test_options(options, reverse):
    check(scan_inputs(2, 6, 18, 5, initial_state=True, **options), reverse=reverse)
    check_both(scan_inputs(2, 6, 18, 5, **options))


# Packed rows: boundaries everywhere, among them at a chunk's first and last step, and with an initial state in front.
@both_ways
@layouts
def test_packed_rows(channels_last, reverse):
    inputs = scan_inputs(2, 4, 70, 4, channels_last=channels_last, initial_state=True, seq_idx=True)
    check(inputs, reverse=reverse)
    for cut in (15, 16, 63, 64, 65):
        inputs["seq_idx"] = (torch.arange(70) >= cut).long().expand(2, -1)
        check({**inputs, "z": None}, reverse=reverse)
    inputs.pop("initial_state")
    check_both(inputs)


# As a mixer calls it: B, C, z and u are slices of larger channels-last tensors; the second row of blocks starts at an odd address.
@pytest.mark.parametrize("odd", [0, 1])
def test_slices(odd):
    batch, dim, seqlen, dstate = 2, 8, 19, 16
    inputs = scan_inputs(batch, dim, seqlen, dstate)
    xz = torch.randn(batch, seqlen, 2 * dim + odd, generator=torch.Generator().manual_seed(5))
    projected = torch.randn(batch, seqlen, 3 + 2 * dstate + odd, generator=torch.Generator().manual_seed(6))
    inputs["u"], inputs["z"] = xz[..., odd : dim + odd].transpose(1, 2), xz[..., dim + odd :].transpose(1, 2)
    inputs["B"] = projected[..., 3 + odd : 3 + odd + dstate].transpose(1, 2)
    inputs["C"] = projected[..., 3 + odd + dstate :].transpose(1, 2)
    found = {}
    for backend in ("cuda", "reference"):
        with emulated():
            found[backend] = run(bidirectional_selective_scan, inputs, backend=backend)
    for name, wanted in found["reference"].items():
        torch.testing.assert_close(found["cuda"][name], wanted, rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize("expanded", ["u", "z", "dout"])
def test_expanded_tensors(expanded):
    inputs = scan_inputs(2, 4, 9, 5)
    if expanded != "dout":
        inputs[expanded] = inputs[expanded][:1].expand(2, -1, -1)
    found = {}
    for backend in ("cuda", "reference"):
        leaf = inputs["delta"].clone().requires_grad_()
        with emulated():
            out = selective_scan(**{**inputs, "delta": leaf}, backend=backend)
            out.sum().backward() if expanded == "dout" else out.square().sum().backward()
        found[backend] = leaf.grad
    torch.testing.assert_close(found["cuda"], found["reference"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dstate", [4, 16, 33, 100])
def test_every_thread_order_gives_the_same_bits(dstate):
    inputs, other = (scan_inputs(2, 6, 37, dstate, channels_last=dstate == 16, seed=s) for s in (1, 2))
    run_in_every_order(bidirectional_selective_scan, both(inputs, ("A", "delta"), other))
    run_in_every_order(selective_scan, {**inputs, "seq_idx": None}, return_last_state=True, reverse=True)


# A gradient that nobody wants must not be computed into memory that is not there, nor change the others.
@pytest.mark.parametrize("name", ["u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state"])
def test_one_gradient_alone(name):
    inputs = scan_inputs(2, 4, 18, 5, initial_state=True)
    with emulated():
        expected = run(selective_scan, inputs, backend="cuda")
        leaf = inputs[name].clone().requires_grad_()
        out = selective_scan(**{**inputs, name: leaf}, backend="cuda")
        gen = torch.Generator().manual_seed(1)
        grad = torch.randn(out.shape, generator=gen, dtype=torch.float64).to(torch.bfloat16).to(out.dtype)
        (found,) = torch.autograd.grad(out, leaf, grad)
    assert torch.equal(found, expected[f"d{name}"])


@both_ways
@pytest.mark.parametrize("name", ["u", "delta", "A", "B", "C", "z"])
def test_nan_passes_through(name, reverse):
    inputs = scan_inputs(1, 4, 20, 5)
    inputs[name][(0, 1, 7)[: inputs[name].ndim]] = torch.nan
    with emulated():
        got = run(selective_scan, inputs, backend="cuda", reverse=reverse)
    wanted = run(selective_scan_ref, inputs, reverse=reverse)
    assert torch.equal(got["out0"].isnan(), wanted["out0"].isnan())
    for key in ("du", "dA", "dz"):
        missing = wanted[key].isnan() & ~got[key].isnan()
        assert not missing.any(), key


def test_splitting_a_row_and_carrying_the_state():
    inputs = scan_inputs(2, 4, 50, 5)
    names = ("u", "delta", "B", "C", "z")
    first, second = (
        {k: v[..., s] if k in names else v for k, v in inputs.items()} for s in (slice(0, 19), slice(19, 50))
    )
    with emulated():
        whole, last = selective_scan(**inputs, return_last_state=True, backend="cuda")
        a, state = selective_scan(**first, return_last_state=True, backend="cuda")
        b, end = selective_scan(**second, initial_state=state, return_last_state=True, backend="cuda")
    torch.testing.assert_close(torch.cat([a, b], -1), whole, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(end, last, rtol=1e-5, atol=1e-5)


def test_empty_tensors():
    for batch, dim, seqlen in ((0, 4, 5), (2, 4, 0)):
        inputs = scan_inputs(batch, dim, seqlen, 3, initial_state=True)
        with emulated():
            got = run(selective_scan, inputs, return_last_state=True, backend="cuda")
        assert got["out0"].shape == (batch, dim, seqlen)
        assert torch.equal(got["out1"], inputs["initial_state"])


# Kernels for `Whole`: an even and an odd number of chunks, rows that wait in registers and longer ones, one and both directions.
def whole(dim, seqlen, dstate, **options):
    """Every packet whole, and the states of B and C next to each other."""
    inputs = scan_inputs(2, dim, seqlen, dstate, **options)
    return {k: v.mT.contiguous().mT if k.startswith(("B", "C")) else v for k, v in inputs.items()}


@layouts
@pytest.mark.parametrize(
    ("dim", "seqlen", "dstate"), [(16, 16, 16), (32, 48, 16), (16, 96, 8), (16, 256, 16), (16, 288, 8), (16, 352, 16)]
)
def test_whole_both_directions(dim, seqlen, dstate, channels_last):
    check_both(whole(dim, seqlen, dstate, channels_last=channels_last))


@both_ways
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_whole_one_direction(reverse, dtype):
    check([whole(16, 80, 16, dtype=dtype, initial_state=True, seed=s) for s in range(3)], reverse=reverse)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("own", [("A", "D"), ("delta", "delta_bias"), ("u",), OWN], ids=lambda names: "-".join(names))
def test_whole_with_own_tensors(own, dtype):
    drawn = [[whole(16, 64, 16, dtype=dtype, channels_last=True, seed=s) for s in (k, k + 9)] for k in range(3)]
    check_both([both(inputs, own, other) for inputs, other in drawn])


@pytest.mark.parametrize("seqlen", [64, 80])
def test_whole_in_every_thread_order(seqlen):
    run_in_every_order(bidirectional_selective_scan, whole(16, seqlen, 16))


def sliced(t, offset):
    """B or C as a slice of a projection that begins with `offset` other columns."""
    batch, dstate, seqlen = t.shape
    return torch.cat([t.new_zeros(batch, seqlen, offset), t.mT], -1)[..., offset:].mT


@pytest.mark.parametrize("backwards", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize(
    "laid_out", [lambda t: t, lambda t: sliced(t, 0), lambda t: sliced(t, 6)], ids=["steps", "states", "slice"]
)
def test_whole_rows_are_read_once(backwards, laid_out):
    """A row of 256 moves 20 and 44 bytes an element, one that is cut short by a step the 32 and 68 of the general kernel; whichever way B
    and C lie in memory.
    """
    moved = {}
    for seqlen in (256, 255):
        inputs = scan_inputs(2, 16, seqlen, 16, channels_last=True)
        inputs |= {name: laid_out(inputs[name]) for name in ("B", "C")}
        with emulated() as module:
            leaves = [v.requires_grad_() for v in inputs.values() if isinstance(v, torch.Tensor)]
            module.emulator_reset_counts()
            out = bidirectional_selective_scan(**inputs, backend="cuda")
            if backwards:
                module.emulator_reset_counts()
                torch.autograd.grad(out, leaves, torch.ones_like(out))
            rows = module.emulator_counts()
        shapes = ((2, 16, seqlen), (2, seqlen, 16))
        moved[seqlen] = sum(r + w for _, shape, _, r, w in rows if shape in shapes) / (2 * 16 * seqlen)
    assert moved[256] == (44 if backwards else 20)
    assert moved[255] > (60 if backwards else 30)
