"""bidirectional_selective_scan: the oracle, what directions may share, identities, determinism, memory, errors."""

from __future__ import annotations

import pytest
import torch
from kernel_forms import (
    BACKENDS,
    DTYPES,
    assert_close,
    assert_no_uninitialised_memory,
    assert_nonfinite_like,
    assert_same,
    assert_same_for_any_number_of_threads,
    assert_same_when_compiled,
    gradcheck,
    needs_cpu,
)
from torch import library

from pixelbytes_kernels import bidirectional_selective_scan, bidirectional_selective_scan_ref, selective_scan
from pixelbytes_kernels.testing import assert_matches, run, scan_inputs

backends = pytest.mark.parametrize("backend", BACKENDS)
OWN = ("u", "delta", "A", "B", "C", "D", "delta_bias")


def inputs_with(own=(), *sizes, **kwargs):
    """Arguments with the tensors named in `own` also given to the downward direction."""
    inputs, other = scan_inputs(*sizes, **kwargs), scan_inputs(*sizes, **kwargs, seed=7)
    return {**inputs, **{f"{n}_rev": other[n] for n in own if other[n] is not None}}


def check(inputs, backend, **shared):
    assert_matches(
        bidirectional_selective_scan, bidirectional_selective_scan_ref, inputs, options={"backend": backend}, **shared
    )


@backends
@pytest.mark.parametrize("own", [(), OWN], ids=["shared", "own"])
@pytest.mark.parametrize(
    ("dim", "seqlen", "dstate"),
    [
        *[(1, 1, 1), (15, 2, 3), (16, 31, 16), (17, 32, 5), (81, 33, 4)],
        *[(162, 63, 3), (17, 64, 64), (16, 65, 5), (17, 100, 256)],
    ],
)
def test_sizes(backend, own, dim, seqlen, dstate):
    check(inputs_with(own, 2, dim, seqlen, dstate), backend)


@backends
@pytest.mark.parametrize("own", [(), OWN], ids=["shared", "own"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes_and_layouts(backend, own, dtype):
    check(inputs_with(own, 2, 19, 70, 5, dtype=dtype, channels_last=not own), backend, scale=0.5)


# A bias of its own with a delta that is shared makes a second step size; the opposite pair shares the bias.
@backends
@pytest.mark.parametrize(
    "own",
    [*((n,) for n in OWN), ("u", "delta"), ("A", "delta_bias"), ("delta", "B", "D"), ("u", "C", "delta_bias")],
    ids="+".join,
)
def test_any_tensor_may_be_shared(backend, own):
    check(inputs_with(own, 2, 17, 66, 5, delta_softplus=len(own) == 1), backend)


@backends
@pytest.mark.parametrize("own", [(), ("B",), OWN], ids=["shared", "B", "own"])
@pytest.mark.parametrize(
    "kwargs",
    [
        {"D": False, "z": False, "delta_bias": False, "delta_softplus": False},
        {"z": False},
        {"groups": 3, "seq_idx": True},
        {"constant": "B"},
        {"constant": "C", "groups": 3},
        {"constant": "BC", "seq_idx": True},
    ],
    ids=str,
)
def test_options(backend, own, kwargs):
    check(inputs_with(own, 2, 51, 35, 5, **kwargs), backend, scale=0.5)


@backends
@pytest.mark.parametrize(("first", "second"), [("", "B"), ("B", ""), ("BC", "C"), ("", "BC")])
def test_one_direction_constant(backend, first, second):
    """B or C may vary in time for one direction and be constant for the other."""
    inputs = scan_inputs(2, 17, 40, 5, constant=first)
    other = scan_inputs(2, 17, 40, 5, constant=second, seed=7)
    check({**inputs, "B_rev": other["B"], "C_rev": other["C"]}, backend)


@backends
def test_only_the_downward_direction_has_a_skip_or_a_bias(backend):
    inputs = scan_inputs(2, 17, 40, 5, D=False, delta_bias=False)
    other = scan_inputs(2, 17, 40, 5, seed=7)
    check({**inputs, "D_rev": other["D"], "delta_bias_rev": other["delta_bias"]}, backend)


@backends
@pytest.mark.parametrize(("dtype", "out_dtype"), [(torch.float16, torch.float32), (torch.float32, torch.bfloat16)])
def test_out_dtype(backend, dtype, out_dtype):
    check(inputs_with((), 2, 17, 40, 5, dtype=dtype), backend, out_dtype=out_dtype)


# ---- identities ----------------------------------------------------------------------------------


@backends
@pytest.mark.parametrize("own", [(), ("delta_bias",), ("u", "delta"), OWN], ids="+".join)
def test_equals_the_sum_of_two_scans(backend, own):
    inputs = inputs_with(own, 2, 17, 70, 5, dtype=torch.float64, seq_idx=True)

    def two(u, delta, A, B, C, D, z, delta_bias, delta_softplus, seq_idx, **rev):
        up = {"u": u, "delta": delta, "A": A, "B": B, "C": C, "D": D, "delta_bias": delta_bias}
        down = {n: rev.get(f"{n}_rev", t) for n, t in up.items()}
        rest = {"delta_softplus": delta_softplus, "seq_idx": seq_idx, "backend": backend}
        y = selective_scan(**up, **rest) + selective_scan(**down, **rest, reverse=True)
        return 0.5 * y * torch.nn.functional.silu(z)

    assert_close(run(two, inputs), run(bidirectional_selective_scan, inputs, scale=0.5, backend=backend))


@backends
def test_shared_equals_scan_and_flip_scan_flip(backend):
    inputs = inputs_with((), 2, 17, 70, 5, dtype=torch.float64, z=False)

    def flips(**kw):
        flipped = {n: kw[n].flip(-1) for n in ("u", "delta", "B", "C")}
        return selective_scan(**kw, backend=backend) + selective_scan(**{**kw, **flipped}, backend=backend).flip(-1)

    assert_close(run(flips, inputs), run(bidirectional_selective_scan, inputs, backend=backend))


@backends
def test_symmetry(backend):
    """Flipping time exchanges the directions."""
    inputs = inputs_with(OWN, 2, 17, 40, 5, dtype=torch.float64)
    out = bidirectional_selective_scan(**inputs, backend=backend)
    exchanged = {"delta_softplus": True, "z": inputs["z"].flip(-1)}
    for name in OWN:
        for a, b in ((name, f"{name}_rev"), (f"{name}_rev", name)):
            exchanged[a] = inputs[b].flip(-1) if inputs[b].ndim == 3 else inputs[b]
    again = bidirectional_selective_scan(**exchanged, backend=backend).flip(-1)
    torch.testing.assert_close(again, out, rtol=1e-12, atol=1e-12)


@needs_cpu
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("own", [(), OWN], ids=["shared", "own"])
def test_bitwise_equal_for_any_number_of_threads(batch, own):
    inputs = inputs_with(own, batch, 162, 70, 5)
    assert_same_for_any_number_of_threads(bidirectional_selective_scan, inputs, backend="cpu")


@backends
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", ["u", "delta", "A", "B", "C", "D", "delta_bias", "z", *(f"{n}_rev" for n in OWN)])
def test_nonfinite_inputs(backend, bad, name):
    inputs = inputs_with(OWN, 1, 17, 35, 2)
    flat = inputs[name].view(-1)
    flat[flat.numel() // 2] = bad
    flat[-1] = bad
    assert_nonfinite_like(
        lambda **kw: bidirectional_selective_scan(**kw, backend=backend), bidirectional_selective_scan_ref, inputs
    )


# ---- autograd, compile, memory -------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("own", [(), ("delta_bias",), OWN], ids="+".join)
def test_gradcheck(backend, own):
    inputs = inputs_with(own, 1, 3, 4, 2, dtype=torch.float64)
    assert gradcheck(bidirectional_selective_scan, inputs, backend=backend, scale=0.5)


@backends
@pytest.mark.parametrize("own", [(), ("delta_bias", "B"), OWN], ids="+".join)
def test_opcheck(backend, own):
    import pixelbytes_kernels.ops.selective_scan.autograd  # noqa: F401, registers the op

    inputs = inputs_with(own, 2, 6, 40, 3, groups=2, seq_idx=True)
    names = (*OWN, *(f"{n}_rev" for n in OWN), "z")
    tensors = [None if n not in inputs else inputs[n].detach().requires_grad_() for n in names]
    rest = (inputs["seq_idx"], True, 0.5, torch.float32, backend)
    library.opcheck(torch.ops.pixelbytes.bidirectional_selective_scan, (*tensors, *rest))


@backends
@pytest.mark.parametrize("own", [(), ("delta_bias",), OWN], ids="+".join)
def test_compiles_whole(backend, own):
    inputs = inputs_with(own, 2, 17, 40, 5)
    assert_same_when_compiled(bidirectional_selective_scan, inputs, backend=backend)


@needs_cpu
@pytest.mark.parametrize(
    ("wanted", "own"),
    [("u", ()), ("delta", ("delta_bias",)), ("delta_bias_rev", ("delta_bias",)), ("z", ()), ("A", ("A",))],
)
def test_only_wanted_gradients_exist(wanted, own):
    inputs = inputs_with(own, 2, 17, 40, 5)
    every = run(bidirectional_selective_scan, inputs, backend="cpu")
    leaf = inputs[wanted].clone().requires_grad_()
    out = bidirectional_selective_scan(**{**inputs, wanted: leaf}, backend="cpu")
    gen = torch.Generator().manual_seed(1)  # the output gradient of `run`
    out.backward(torch.randn(out.shape, generator=gen, dtype=torch.float64).to(torch.bfloat16).to(out.dtype))
    assert torch.equal(leaf.grad, every[f"d{wanted}"])


@needs_cpu
def test_expanded_output_gradient():
    inputs = scan_inputs(2, 17, 40, 5)
    results = []
    for contiguous in (False, True):
        u = inputs["u"].clone().requires_grad_()
        out = bidirectional_selective_scan(**{**inputs, "u": u}, backend="cpu")
        dout = torch.ones(1).expand_as(out)
        out.backward(dout.contiguous() if contiguous else dout)
        results.append({"du": u.grad})
    assert_same(*results)


@needs_cpu
def test_bytes_saved_for_backward():
    batch, seqlen, dim = 2, 256, 128
    inputs = scan_inputs(batch, dim, seqlen, 16)
    leaves = {k: v.requires_grad_() if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    saved = {}

    def keep(t):
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        out = bidirectional_selective_scan(**leaves, backend="cpu")
    out.sum().backward()
    assert leaves["u"].untyped_storage().data_ptr() in saved  # inputs are counted
    assert sum(saved.values()) <= 7.2 * batch * seqlen * dim * 4


@needs_cpu
def test_nothing_is_kept_without_gradients():
    inputs = scan_inputs(2, 17, 40, 5)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        bidirectional_selective_scan(**inputs, backend="cpu")
    assert not saved


@needs_cpu
def test_double_backward_is_refused():
    inputs = scan_inputs(1, 3, 4, 2)
    u = inputs["u"].requires_grad_()
    out = bidirectional_selective_scan(**inputs, backend="cpu")
    (grad,) = torch.autograd.grad(out.square().sum(), u, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@backends
@pytest.mark.parametrize("own", [(), OWN], ids=["shared", "own"])
def test_uninitialised_memory_is_never_seen(backend, own):
    inputs = inputs_with(own, 2, 17, 70, 5)
    assert_no_uninitialised_memory(bidirectional_selective_scan, inputs, backend=backend)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("own", [(), ("delta_bias",), OWN], ids="+".join)
@pytest.mark.parametrize(("batch", "seqlen"), [(0, 5), (3, 0)])
def test_empty(backend, own, batch, seqlen):
    inputs = inputs_with(own, batch, 6, seqlen, 3)
    result = run(bidirectional_selective_scan, inputs, backend=backend)
    assert result["out0"].shape == (batch, 6, seqlen)
    for name, value in result.items():
        if name.startswith("d"):
            assert torch.equal(value, torch.zeros_like(inputs[name[1:]])), name


@pytest.mark.parametrize(
    ("name", "change", "error", "message"),
    [
        ("delta", lambda t: t[..., 1:], ValueError, "delta must have shape"),
        ("u_rev", lambda t: t[..., 1:], ValueError, "delta_rev must have shape|u_rev"),
        ("delta_rev", lambda t: t[:, 1:], ValueError, r"delta_rev must have shape \(batch=2, dim=20, seqlen=37\)"),
        ("A_rev", lambda t: t[:, 1:], ValueError, "A_rev|B_rev must have shape"),
        ("A_rev", lambda t: t + 1j, TypeError, "A_rev is torch.complex64"),
        ("B_rev", lambda t: t[:, 1:], ValueError, "B_rev must have shape"),
        ("C_rev", lambda t: t.int(), TypeError, "C_rev must be float32"),
        ("D_rev", lambda t: t[1:], ValueError, "D_rev must have shape"),
        ("delta_bias_rev", lambda t: t[1:], ValueError, "delta_bias_rev must have shape"),
        ("z", lambda t: t.to("meta"), ValueError, "z must be on cpu"),
    ],
)
def test_bad_arguments(name, change, error, message):
    inputs = inputs_with(OWN)
    inputs[name] = change(inputs[name])
    with pytest.raises(error, match=f"bidirectional_selective_scan: ({message})"):
        bidirectional_selective_scan(**inputs)


def test_both_directions_have_the_same_groups():
    inputs = scan_inputs(groups=2)
    other = scan_inputs(groups=4)
    with pytest.raises(ValueError, match="both directions must have the same number of groups"):
        bidirectional_selective_scan(**inputs, B_rev=other["B"], C_rev=other["C"])
