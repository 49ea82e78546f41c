"""selective_scan: every option against the oracle, identities, determinism, strides, NaN and Inf, compile, errors."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
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

from pixelbytes_kernels import selective_scan, selective_scan_ref
from pixelbytes_kernels.testing import assert_matches, run, scan_inputs

both_directions = pytest.mark.parametrize("reverse", [False, True], ids=["up", "down"])
backends = pytest.mark.parametrize("backend", BACKENDS)


def check(inputs, backend, **shared):
    shared.setdefault("return_last_state", True)
    assert_matches(selective_scan, selective_scan_ref, inputs, options={"backend": backend}, **shared)


# Lengths around the chunk of 32 (and 64 of the torch path); dims around a vector of 4, 8, 16 and the paper's 81, 162;
# dstates around the pass of 4 states. Every value of each meets both directions.
SIZES = [
    (1, 1, 1), (15, 2, 3), (16, 31, 4), (17, 32, 5), (81, 33, 16), (162, 63, 4), (17, 64, 64), (16, 65, 16),
    (81, 100, 5), (162, 2, 64), (3, 100, 256), (15, 33, 1), (2, 65, 3), (17, 1, 256), (1, 129, 4),
]  # fmt: skip


@backends
@both_directions
@pytest.mark.parametrize(("dim", "seqlen", "dstate"), SIZES)
def test_sizes(backend, reverse, dim, seqlen, dstate):
    check([scan_inputs(2, dim, seqlen, dstate, seed=seed) for seed in range(2)], backend, reverse=reverse)


@backends
@both_directions
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes_and_layouts(backend, reverse, channels_last, dtype):
    check(scan_inputs(2, 19, 70, 5, dtype=dtype, channels_last=channels_last), backend, reverse=reverse)


@backends
@pytest.mark.parametrize(("D", "z", "bias", "softplus"), list(itertools.product([False, True], repeat=4)))
def test_optional_arguments(backend, D, z, bias, softplus):
    inputs = scan_inputs(2, 17, 35, 5, D=D, z=z, delta_bias=bias, delta_softplus=softplus)
    check(inputs, backend, return_last_state=False)


@backends
@both_directions
@pytest.mark.parametrize("steps", ["negative", "of both signs"])
def test_growing_states(backend, reverse, steps):
    """Without softplus steps may be negative: a factor's error is then multiplied by all that follow it."""
    inputs = [scan_inputs(2, 17, 36, 5, seed=seed, delta_bias=False, delta_softplus=False) for seed in range(10)]
    for draw in inputs:
        draw["delta"] = -0.4 * draw["delta"].abs() if steps == "negative" else 2 * draw["delta"]
    check(inputs, backend, reverse=reverse)


@needs_cpu
@pytest.mark.parametrize("channel", [0, 7, 15, 16])
def test_one_growing_state_among_fading_ones(channel):
    """Where a factor may exceed 1, a tile takes the exact form of the exponential: the rounding of A log2(e) would grow with it."""
    draw = torch.Generator().manual_seed(channel)
    A, delta = -torch.rand(17, 5, generator=draw), torch.ones(1, 17, 4)
    positive = 0.5 + torch.rand(64, generator=draw)
    exact = positive.double() * math.log2(math.e)
    A[channel, 3] = positive[((exact.float() - exact) / exact).abs().argmax()]
    delta[0, channel] = 40 / A[channel, 3]  # exp(40) a step, infinity at the fourth
    state, zeros = torch.zeros(1, 17, 5), torch.zeros(1, 1, 5, 4)
    state[0, channel, 3] = 2.0**-60
    out = selective_scan(torch.zeros(1, 17, 4), delta, A, zeros, zeros + 1, initial_state=state, backend="cpu")
    first = 2.0**-60 * torch.exp(delta[0, channel, 0].double() * A[channel, 3].double())
    assert (out[0, channel, 0] / first - 1).abs() < 1.5e-6
    assert out[0, channel].isfinite().tolist() == [True, True, True, False]


# 51 channels in 3 groups of 17: every group ends in a part of a vector. 20 in 20: one channel each.
@backends
@both_directions
@pytest.mark.parametrize(("dim", "groups"), [(17, 1), (40, 2), (51, 3), (20, 20)])
@pytest.mark.parametrize("constant", ["", "B", "C"])
def test_groups(backend, reverse, dim, groups, constant):
    inputs = scan_inputs(2, dim, 35, 5, groups=groups, constant=constant, seq_idx=True)
    check(inputs, backend, reverse=reverse)


@backends
@both_directions
@pytest.mark.parametrize("constant", ["B", "C", "BC"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_constant_coefficients(backend, reverse, constant, dtype):
    check(scan_inputs(2, 17, 66, 6, constant=constant, dtype=dtype), backend, reverse=reverse)


@backends
@both_directions
@pytest.mark.parametrize("seq_idx", [False, True])
@pytest.mark.parametrize("initial_state", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
def test_states_and_resets(backend, reverse, seq_idx, initial_state, dtype):
    inputs = scan_inputs(3, 17, 70, 5, dtype=dtype, initial_state=initial_state, seq_idx=seq_idx)
    check(inputs, backend, reverse=reverse)


@backends
@pytest.mark.parametrize("ids", [torch.uint8, torch.int8, torch.int16, torch.int64], ids=str)
def test_sequence_index_of_any_integer(backend, ids):
    inputs = scan_inputs(2, 5, 40, 3, seq_idx=True)
    expected = run(selective_scan, inputs, backend=backend)
    assert_same(run(selective_scan, {**inputs, "seq_idx": inputs["seq_idx"].to(ids)}, backend=backend), expected)


@backends
@pytest.mark.parametrize(
    ("dtype", "out_dtype"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float16),
        (torch.float32, torch.bfloat16),
        (torch.float64, torch.float32),
    ],
    ids=str,
)
def test_out_dtype(backend, dtype, out_dtype):
    inputs = scan_inputs(2, 17, 40, 5, dtype=dtype)
    assert selective_scan(**inputs, out_dtype=out_dtype, backend=backend).dtype == out_dtype
    check(inputs, backend, out_dtype=out_dtype)


@needs_cpu
@both_directions
def test_gradient_of_one_output_alone(reverse):
    """The state's gradient without the output's, and the other way round."""
    inputs = scan_inputs(2, 17, 40, 5, initial_state=True, dtype=torch.float64)
    for pick in (0, 1):

        def one(*, backend=None, pick=pick, **kw):
            call = selective_scan_ref if backend is None else selective_scan
            return call(**kw, return_last_state=True, reverse=reverse, **({"backend": backend} if backend else {}))[
                pick
            ]

        assert_close(run(one, inputs, backend="cpu"), run(one, inputs))


@needs_cpu
def test_only_wanted_gradients_exist():
    inputs = scan_inputs(initial_state=True)
    every = run(selective_scan, inputs, backend="cpu")
    for name in (k for k, v in inputs.items() if isinstance(v, torch.Tensor)):
        leaf = inputs[name].clone().requires_grad_()
        out = selective_scan(**{**inputs, name: leaf}, backend="cpu")
        gen = torch.Generator().manual_seed(1)  # the output gradient of `run`
        out.backward(torch.randn(out.shape, generator=gen, dtype=torch.float64).to(torch.bfloat16).to(out.dtype))
        assert torch.equal(leaf.grad, every[f"d{name}"]), name


# ---- strides -------------------------------------------------------------------------------------


def every_other(t):
    """The same values, two elements apart in every dimension, after an offset of one."""
    big = torch.full([2 * n + 1 for n in t.shape], 7.0, dtype=t.dtype)
    view = big[tuple(slice(1, None, 2) for _ in t.shape)]
    return view.copy_(t)


def last_first(t):
    return t.movedim(0, -1).contiguous().movedim(-1, 0)


@needs_cpu
@both_directions
@pytest.mark.parametrize("layout", [every_other, last_first])
@pytest.mark.parametrize("kwargs", [{}, {"constant": "BC"}, {"groups": 2, "dtype": torch.bfloat16}], ids=str)
def test_any_strides(reverse, layout, kwargs):
    inputs = scan_inputs(3, 34, 40, 5, initial_state=True, seq_idx=True, **kwargs)

    def gradients(change):
        leaves = {k: v.clone().requires_grad_() for k, v in inputs.items() if k not in ("delta_softplus", "seq_idx")}
        ints = {"seq_idx": change(inputs["seq_idx"].float()).int() if change is last_first else inputs["seq_idx"]}
        odd = {k: change(v) for k, v in leaves.items()}
        out, last = selective_scan(
            **odd, **ints, delta_softplus=True, reverse=reverse, return_last_state=True, backend="cpu"
        )
        dout = change(torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape))
        dlast = change(torch.linspace(-2, 1, last.numel()).view(last.shape))
        found = torch.autograd.grad((out, last), list(leaves.values()), (dout, dlast))
        return {"out": out, "last": last, **dict(zip(leaves, found, strict=True))}

    assert_same(gradients(layout), gradients(lambda t: t))


@needs_cpu
def test_expanded_inputs_and_output_gradient():
    inputs = scan_inputs(3, 17, 40, 5)
    one = {k: v[:1] for k, v in inputs.items() if k in ("u", "delta", "z", "B", "C")}
    results = []
    for form in (lambda t: t.expand(3, *t.shape[1:]), lambda t: t.repeat(3, 1, 1)):
        leaves = {k: form(v).detach().requires_grad_() for k, v in one.items()}
        out = selective_scan(**{**inputs, **leaves}, backend="cpu")
        dout = torch.ones((), dtype=out.dtype).expand_as(out) if not results else torch.ones_like(out).contiguous()
        found = torch.autograd.grad(out, list(leaves.values()), dout)
        results.append({"out": out, **dict(zip(leaves, found, strict=True))})
    assert_same(*results)


# ---- identities ----------------------------------------------------------------------------------


@backends
def test_reverse_is_flip_scan_flip(backend):
    inputs = scan_inputs(2, 17, 70, 5, dtype=torch.float64, initial_state=True, seq_idx=True)

    def flipped(**kw):
        time = {k: v.flip(-1) for k, v in kw.items() if k in ("u", "delta", "B", "C", "z", "seq_idx")}
        out, last = selective_scan(**{**kw, **time}, return_last_state=True, backend=backend)
        return out.flip(-1), last

    assert_close(
        run(flipped, inputs), run(selective_scan, inputs, reverse=True, return_last_state=True, backend=backend)
    )


sizes = given(
    dim=st.integers(1, 40),
    seqlen=st.integers(2, 90),
    dstate=st.integers(1, 9),
    where=st.floats(0, 1),
    down=st.booleans(),
)
few = settings(max_examples=12, deadline=None, derandomize=True)


@needs_cpu
@sizes
@few
def test_split_and_carry(dim, seqlen, dstate, where, down):
    inputs = scan_inputs(2, dim, seqlen, dstate, dtype=torch.float64, initial_state=True)
    cut = 1 + int(where * (seqlen - 2))

    def split(**kw):
        parts = [
            {k: v[..., a:b] if k in ("u", "delta", "B", "C", "z") else v for k, v in kw.items()}
            for a, b in ((0, cut), (cut, seqlen))
        ]
        state, outs = kw["initial_state"], [None, None]
        for i in (1, 0) if down else (0, 1):
            part = {**parts[i], "initial_state": state}
            outs[i], state = selective_scan(**part, return_last_state=True, reverse=down, backend="cpu")
        return torch.cat(outs, -1), state

    assert_close(run(split, inputs), run(selective_scan, inputs, return_last_state=True, reverse=down, backend="cpu"))


@needs_cpu
@sizes
@few
def test_resets_are_separate_rows(dim, seqlen, dstate, where, down):
    inputs = scan_inputs(1, dim, seqlen, dstate, dtype=torch.float64)
    cut = 1 + int(where * (seqlen - 2))
    packed = {**inputs, "seq_idx": (torch.arange(seqlen)[None] >= cut).int() * 5}

    def rows(**kw):
        outs = [
            selective_scan(
                **{k: v[..., a:b] if k in ("u", "delta", "B", "C", "z") else v for k, v in kw.items()},
                reverse=down,
                backend="cpu",
            )
            for a, b in ((0, cut), (cut, seqlen))
        ]
        return torch.cat(outs, -1)

    assert_close(run(rows, inputs), run(selective_scan, packed, reverse=down, backend="cpu"))


@backends
@both_directions
def test_no_gate_is_a_cumulative_sum(backend, reverse):
    """A = 0 keeps the state whole: with small integers every sum is exact."""
    gen = torch.Generator().manual_seed(0)
    u = torch.randint(-8, 9, (2, 17, 100), generator=gen).float()
    ones = torch.ones(2, 1, 100)
    out = selective_scan(u, torch.ones_like(u), torch.zeros(17, 1), ones, ones, reverse=reverse, backend=backend)
    expected = u.flip(-1).cumsum(-1).flip(-1) if reverse else u.cumsum(-1)
    assert torch.equal(out, expected)


@backends
@both_directions
def test_nan_does_not_cross_a_reset(backend, reverse):
    inputs = scan_inputs(1, 17, 80, 5)
    inputs["seq_idx"] = (torch.arange(80)[None] >= 37).int()
    inputs["u"][0, :, 50 if reverse else 20] = torch.nan
    clean = slice(0, 37) if reverse else slice(37, 80)
    result = run(selective_scan, inputs, reverse=reverse, backend=backend)
    assert result["out0"].isnan().any()
    for name in ("out0", "du", "ddelta", "dz"):
        assert result[name][..., clean].isfinite().all(), name


@needs_cpu
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("kwargs", [{}, {"groups": 3}, {"constant": "BC"}, {"dtype": torch.bfloat16}], ids=str)
def test_bitwise_equal_for_any_number_of_threads(batch, kwargs):
    inputs = scan_inputs(batch, 162, 70, 5, initial_state=True, **kwargs)
    assert_same_for_any_number_of_threads(selective_scan, inputs, backend="cpu", return_last_state=True)


# ---- non-finite values ---------------------------------------------------------------------------

NAMES = ["u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state"]


@backends
@both_directions
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf], ids=["nan", "inf", "-inf"])
@pytest.mark.parametrize("name", NAMES)
def test_nonfinite_inputs(backend, reverse, bad, name):
    inputs = scan_inputs(2, 17, 37, 5, initial_state=True, delta_softplus=not reverse)
    flat = inputs[name].view(-1)
    flat[flat.numel() // 2] = bad
    flat[-1] = bad  # the last channel stands alone in its vector
    expected = assert_nonfinite_like(
        lambda **kw: selective_scan(**kw, backend=backend), selective_scan_ref, inputs, reverse=reverse
    )
    assert bad == bad or expected["out0"].isnan().any()


@backends
@pytest.mark.parametrize(("dim", "dtype"), [(17, torch.float32), (16, torch.float32), (17, torch.float64)], ids=str)
@pytest.mark.parametrize(
    ("name", "value"),
    [("delta", 1e30), ("A", -1e9), ("A", -1e30), ("A", 60.0), ("A", 1e30), ("u", 1e30), ("delta", -1e30)],
)
def test_huge_values(backend, dim, dtype, name, value):
    """Decays of exactly 0, states that overflow to infinity, and what infinity makes of the rest."""
    inputs = scan_inputs(2, dim, 40, 5, initial_state=True, dtype=dtype)
    inputs[name][-1, ..., -1] = value
    inputs[name][0, 0] = value
    op = lambda **kw: selective_scan(**kw, backend=backend)  # noqa: E731
    assert_nonfinite_like(op, selective_scan_ref, inputs)
    out, expected = op(**inputs), selective_scan_ref(**inputs)
    finite = expected.isfinite() & (expected.abs() < 1e30)
    torch.testing.assert_close(out[finite], expected[finite], rtol=1e-3, atol=1e-3)


@backends
@both_directions
def test_infinite_coefficients_make_infinite_gradients(backend, reverse):
    """All signs agree, so that every sum is finite or infinite: a NaN would come from lanes that are no channels."""
    inputs = scan_inputs(2, 17, 37, 5, z=False, delta_bias=False, delta_softplus=False)
    inputs = {name: t.abs() if isinstance(t, torch.Tensor) and name != "A" else t for name, t in inputs.items()}
    inputs["B"][0, 1, 20] = inputs["C"][1, 2, 20] = torch.inf
    coefficients = [inputs[name].requires_grad_() for name in "BC"]
    found = {
        name: torch.autograd.grad(selective_scan(**inputs, reverse=reverse, backend=name).sum(), coefficients)
        for name in (backend, "reference")
    }
    for got, expected in zip(found[backend], found["reference"], strict=True):
        assert expected.isinf().any() and not expected.isnan().any()
        assert torch.equal(got.isinf(), expected.isinf()) and not got.isnan().any()


# ---- autograd, compile, memory -------------------------------------------------------------------

OPTIONS = [
    {},
    {"groups": 2, "initial_state": True},
    {"constant": "BC", "D": False, "z": False, "delta_bias": False},
    {"seq_idx": True, "delta_softplus": False},
]


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@both_directions
@pytest.mark.parametrize("kwargs", OPTIONS, ids=str)
def test_gradcheck(backend, reverse, kwargs):
    inputs = scan_inputs(1, 4, 5, 2, dtype=torch.float64, **kwargs)
    assert gradcheck(selective_scan, inputs, backend=backend, reverse=reverse, return_last_state=True)


@needs_cpu
def test_gradcheck_over_chunks():
    inputs = scan_inputs(1, 3, 35, 1, dtype=torch.float64, initial_state=True)
    assert gradcheck(selective_scan, inputs, ["A", "delta", "initial_state"], backend="cpu", return_last_state=True)


@backends
@pytest.mark.parametrize("kwargs", OPTIONS, ids=str)
def test_opcheck(backend, kwargs):
    import pixelbytes_kernels.ops.selective_scan.autograd as autograd

    inputs = scan_inputs(2, 6, 40, 3, **kwargs)
    first = [autograd.with_groups(inputs.get(n)) if n in "BC" else inputs.get(n) for n in autograd.FIRST]
    first = [t if t is None else t.detach().requires_grad_() for t in first]
    z = None if inputs["z"] is None else inputs["z"].requires_grad_()
    rest = (z, inputs.get("seq_idx"), inputs["delta_softplus"], False, torch.float32, backend)
    library.opcheck(torch.ops.pixelbytes.selective_scan, (*first, *rest))


@backends
@pytest.mark.parametrize("kwargs", OPTIONS, ids=str)
def test_compiles_whole(backend, kwargs):
    inputs = scan_inputs(2, 18, 40, 5, **kwargs)
    assert_same_when_compiled(
        selective_scan, inputs, reverse="seq_idx" in kwargs, return_last_state=True, backend=backend
    )


@needs_cpu
@pytest.mark.slow
def test_compiles_with_inductor():
    """Inductor also checks the strides that the fake promises."""
    for channels_last in (False, True):
        inputs = scan_inputs(2, 17, 40, 5, initial_state=True, channels_last=channels_last)
        assert_same_when_compiled(selective_scan, inputs, "inductor", return_last_state=True, backend="cpu")


@backends
def test_export(backend):
    class Module(torch.nn.Module):
        def forward(self, u, delta, A, B, C):
            return selective_scan(u, delta, A, B, C, delta_softplus=True, backend=backend)

    inputs = tuple(scan_inputs()[n] for n in ("u", "delta", "A", "B", "C"))
    exported = torch.export.export(Module(), inputs)
    assert any("selective_scan" in str(node.target) for node in exported.graph.nodes)
    assert torch.equal(exported.module()(*inputs), Module()(*inputs))


@needs_cpu
def test_double_backward_is_refused():
    inputs = scan_inputs(1, 3, 4, 2)
    u = inputs["u"].requires_grad_()
    (grad,) = torch.autograd.grad(selective_scan(**inputs, backend="cpu").square().sum(), u, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@needs_cpu
def test_double_backward_of_the_registered_op_is_refused():
    inputs = scan_inputs(1, 3, 4, 2, groups=1)
    inputs["u"].requires_grad_()
    tensors = [inputs[n] for n in ("u", "delta", "A", "B", "C", "D", "delta_bias")]
    op = torch.ops.pixelbytes.selective_scan
    out = op(*tensors, None, inputs["z"], None, True, False, torch.float32, "cpu")[0]
    (grad,) = torch.autograd.grad(out.square().sum(), inputs["u"], create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives are not implemented; use backend='reference'"):
        grad.sum().backward()


@backends
@pytest.mark.parametrize("kwargs", [{}, {"groups": 3, "seq_idx": True}, {"constant": "BC"}], ids=str)
def test_uninitialised_memory_is_never_seen(backend, kwargs):
    inputs = scan_inputs(2, 51, 70, 5, initial_state=True, **kwargs)
    assert_no_uninitialised_memory(selective_scan, inputs, backend=backend, return_last_state=True)


@needs_cpu
def test_autocast_changes_nothing():
    inputs = scan_inputs()
    expected = run(selective_scan, inputs, backend="cpu")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same(run(selective_scan, inputs, backend="cpu"), expected)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize(("batch", "seqlen"), [(0, 5), (3, 0), (0, 0)])
def test_empty(backend, batch, seqlen):
    """No steps leave the state as it was; its gradient is the last state's."""
    inputs = scan_inputs(batch, 6, seqlen, 3, initial_state=True)
    result = run(selective_scan, inputs, backend=backend, return_last_state=True)
    assert result["out0"].shape == (batch, 6, seqlen)
    assert torch.equal(result["out1"], inputs["initial_state"])
    gen = torch.Generator().manual_seed(1)
    dlast = torch.randn(batch, 6, 3, generator=gen, dtype=torch.float64).to(torch.bfloat16).float()
    assert torch.equal(result.pop("dinitial_state"), dlast)
    for name, value in result.items():
        if name.startswith("d"):
            assert torch.equal(value, torch.zeros_like(inputs[name[1:]])), name


# ---- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "change", "error", "message"),
    [
        ("u", lambda t: t[0], ValueError, r"u must have shape \(batch, dim, seqlen\), got \(20, 37\)"),
        ("delta", lambda t: t[..., 1:], ValueError, r"delta must have shape \(batch=2, dim=20, seqlen=37\)"),
        ("z", lambda t: t[:, 1:], ValueError, "z must have shape"),
        ("A", lambda t: t[1:], ValueError, r"A must have shape \(dim=20, dstate\)"),
        ("A", lambda t: t[:, :0], ValueError, "A must have a dstate from 1 to 256, got 0"),
        ("A", lambda t: t[:, :1].expand(-1, 257), ValueError, "A must have a dstate from 1 to 256, got 257"),
        ("A", lambda t: t + 1j, TypeError, "A is torch.complex64; complex numbers are not supported"),
        ("B", lambda t: t[:, 1:], ValueError, r"B must have shape \(batch=2, dstate=5, seqlen=37\)"),
        ("B", lambda t: t[:, None].expand(-1, 3, -1, -1), ValueError, "B has 3 groups, which do not divide dim=20"),
        ("B", lambda t: t[:, None].expand(-1, 2, -1, -1), ValueError, "B and C must have the same number of groups"),
        ("C", lambda t: t[0], ValueError, r"C must have shape \(dim=20, dstate=5\)"),
        ("C", lambda t: t.long(), TypeError, "C must be float32, float64, float16 or bfloat16, got torch.int64"),
        ("D", lambda t: t[:, None], ValueError, r"D must have shape \(dim=20\)"),
        ("delta_bias", lambda t: t[1:], ValueError, "delta_bias must have shape"),
        ("initial_state", lambda t: t[..., 1:], ValueError, "initial_state must have shape"),
        ("seq_idx", lambda t: t[:, 1:], ValueError, r"seq_idx must have shape \(batch=2, seqlen=37\)"),
        ("seq_idx", lambda t: t.float(), TypeError, "seq_idx must be an integer tensor"),
        ("delta", lambda t: t.to("meta"), ValueError, "delta must be on cpu like the first argument, got meta"),
        ("seq_idx", lambda t: t.to("meta"), ValueError, "seq_idx must be on cpu"),
    ],
)
def test_bad_arguments(name, change, error, message):
    inputs = scan_inputs(initial_state=True, seq_idx=True)
    inputs[name] = change(inputs[name])
    with pytest.raises(error, match=f"selective_scan: {message}"):
        selective_scan(**inputs)


@pytest.mark.parametrize(("backend", "error"), [("quick", ValueError), ("cuda", RuntimeError)])
def test_backend_that_cannot_run(backend, error):
    with pytest.raises(error, match=f"selective_scan: backend .*{backend}"):
        selective_scan(**scan_inputs(), backend=backend)


def test_reference_is_twice_differentiable():
    inputs = scan_inputs(1, 2, 3, 2, dtype=torch.float64)
    names = ["u", "delta", "A"]

    def call(*leaves):
        return selective_scan_ref(**{**inputs, **dict(zip(names, leaves, strict=True))})

    assert torch.autograd.gradgradcheck(call, [inputs[n].requires_grad_() for n in names])
