"""causal_conv1d and causal_conv1d_update: the oracle, identities, strides, determinism, compile, errors."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
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

from pixelbytes_kernels import causal_conv1d, causal_conv1d_ref, causal_conv1d_update, causal_conv1d_update_ref
from pixelbytes_kernels.testing import assert_matches, conv_inputs, run

backends = pytest.mark.parametrize("backend", BACKENDS)
both_directions = pytest.mark.parametrize("reverse", [False, True], ids=["up", "down"])


def check(inputs, backend, **shared):
    shared = {"activation": "silu", "return_final_states": True, **shared}
    assert_matches(causal_conv1d, causal_conv1d_ref, inputs, options={"backend": backend}, **shared)


# Rows shorter than the taps, and lengths and dims around a tile.
@backends
@both_directions
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(
    ("dim", "seqlen", "width"),
    [
        *[(1, 1, 2), (15, 2, 4), (16, 3, 3), (17, 31, 4), (81, 32, 2), (162, 33, 3)],
        *[(17, 63, 2), (16, 64, 4), (15, 65, 3), (33, 100, 4), (1, 257, 4)],
    ],
)
def test_sizes(backend, reverse, channels_last, dim, seqlen, width):
    check(conv_inputs(2, dim, seqlen, width, channels_last=channels_last), backend, reverse=reverse)


@backends
@both_directions
@pytest.mark.parametrize(
    ("dtype", "activation", "bias", "initial", "seq_idx"),
    [
        *itertools.product([torch.float32], [None, "swish"], *[[False, True]] * 3),
        *((dtype, "silu", True, True, True) for dtype in DTYPES[1:]),
    ],
)
def test_options(backend, reverse, dtype, activation, bias, initial, seq_idx):
    inputs = conv_inputs(2, 17, 40, 4, dtype=dtype, bias=bias, initial_states=initial, seq_idx=seq_idx)
    check(inputs, backend, reverse=reverse, activation=activation)


@needs_cpu
def test_agrees_with_torch():
    inputs = conv_inputs(2, 17, 40, 4, dtype=torch.float64)
    expected = F.silu(F.conv1d(inputs["x"], inputs["weight"][:, None], inputs["bias"], padding=3, groups=17)[..., :40])
    torch.testing.assert_close(causal_conv1d(**inputs, activation="silu", backend="cpu"), expected)


# ---- identities ----------------------------------------------------------------------------------


@backends
def test_reverse_is_flip_conv_flip(backend):
    inputs = conv_inputs(2, 17, 70, 4, seq_idx=True, initial_states=True)

    def flipped(**kw):
        kw |= {k: kw[k].flip(-1) for k in ("x", "seq_idx")}
        return causal_conv1d(**kw, activation="silu", backend=backend).flip(-1)

    expected, got = run(flipped, inputs), run(causal_conv1d, inputs, activation="silu", reverse=True, backend=backend)
    assert torch.equal(got["out0"], expected["out0"])
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-4, msg=name)


@backends
@both_directions
@pytest.mark.parametrize("cut", [1, 2, 5, 39])
def test_split_and_carry(backend, reverse, cut):
    """Also where a part is shorter than the window: the carried states then go through it."""
    inputs = conv_inputs(2, 17, 40, 4, dtype=torch.float64, initial_states=True)
    options = {"return_final_states": True, "reverse": reverse, "backend": backend, "activation": "silu"}

    def split(x, weight, bias, initial_states):
        if reverse:
            high, states = causal_conv1d(x[..., cut:], weight, bias, initial_states=initial_states, **options)
            low, states = causal_conv1d(x[..., :cut], weight, bias, initial_states=states, **options)
        else:
            low, states = causal_conv1d(x[..., :cut], weight, bias, initial_states=initial_states, **options)
            high, states = causal_conv1d(x[..., cut:], weight, bias, initial_states=states, **options)
        return torch.cat([low, high], -1), states

    assert_close(run(split, inputs), run(causal_conv1d, inputs, **options))


@backends
@both_directions
def test_resets_are_separate_rows(backend, reverse):
    inputs = conv_inputs(1, 17, 40, 4, dtype=torch.float64)
    packed = {**inputs, "seq_idx": torch.tensor([[3] * 2 + [1] * 1 + [9] * 20 + [3] * 17])}
    options = {"reverse": reverse, "backend": backend, "activation": "silu"}

    def rows(x, weight, bias):
        return torch.cat([causal_conv1d(part, weight, bias, **options) for part in x.split([2, 1, 20, 17], -1)], -1)

    assert_close(run(rows, inputs), run(causal_conv1d, packed, **options))


# ---- layouts, determinism, non-finite values -----------------------------------------------------


@needs_cpu
@both_directions
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_strides(reverse, dtype):
    """x, states, weights and gradients two elements apart in every dimension, against contiguous ones."""
    inputs = conv_inputs(2, 33, 40, 4, dtype=dtype, initial_states=True, seq_idx=True)

    def apart(t):
        big = torch.full([2 * n + 1 for n in t.shape], 7, dtype=t.dtype)
        return big[tuple(slice(1, None, 2) for _ in t.shape)].copy_(t)

    def gradients(change):
        leaves = {k: v.clone().requires_grad_() for k, v in inputs.items() if k != "seq_idx"}
        odd = {k: change(v) for k, v in leaves.items()}
        out, last = causal_conv1d(
            **odd, seq_idx=change(inputs["seq_idx"]), activation="silu", reverse=reverse, return_final_states=True,
            backend="cpu",
        )  # fmt: skip
        dout, dlast = (change(torch.linspace(-1, 1, t.numel()).view(t.shape).to(t.dtype)) for t in (out, last))
        found = torch.autograd.grad((out, last), list(leaves.values()), (dout, dlast))
        return {"out": out, "last": last, **dict(zip(leaves, found, strict=True))}

    assert_same(gradients(apart), gradients(lambda t: t))


@needs_cpu
def test_half_of_a_wider_tensor():
    """x as mamba sees it: the first half of in_proj's channels, channels last."""
    inputs = conv_inputs(2, 34, 40, 4)
    wide = torch.full((2, 40, 68), 9.0).transpose(1, 2)
    wide[:, :34] = inputs["x"]
    results = []
    for x in (wide[:, :34], inputs["x"]):
        leaf = x.detach().requires_grad_()
        out = causal_conv1d(**{**inputs, "x": leaf}, activation="silu", backend="cpu")
        out.backward(torch.linspace(-1, 1, out.numel()).view(out.shape))
        results.append({"out": out.detach(), "dx": leaf.grad})
    assert_same(*results)


@needs_cpu
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("channels_last", [False, True])
def test_bitwise_equal_for_any_number_of_threads(batch, channels_last):
    inputs = conv_inputs(batch, 162, 130, 4, channels_last=channels_last, initial_states=True, seq_idx=True)
    options = {"activation": "silu", "return_final_states": True, "backend": "cpu"}
    assert_same_for_any_number_of_threads(causal_conv1d, inputs, **options)


@backends
@both_directions
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf], ids=["nan", "inf", "-inf"])
@pytest.mark.parametrize("name", ["x", "weight", "bias", "initial_states"])
@pytest.mark.parametrize("activation", [None, "silu"])
def test_nonfinite_inputs(backend, reverse, bad, name, activation):
    inputs = conv_inputs(2, 17, 37, 4, initial_states=True)
    flat = inputs[name].view(-1)
    flat[flat.numel() // 2] = bad
    flat[-1] = bad
    assert_nonfinite_like(
        lambda **kw: causal_conv1d(**kw, backend=backend), causal_conv1d_ref, inputs, reverse=reverse,
        activation=activation,
    )  # fmt: skip


@backends
@both_directions
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("seqlen", "width"), [(37, 4), (1025, 4), (1026, 3), (2, 4)])
def test_an_infinite_tap_meets_no_step_behind_the_last(backend, reverse, channels_last, seqlen, width):
    """What lies outside of the row takes no part in the gradient of x; zeros there would make it NaN."""
    inputs = conv_inputs(1, 17, seqlen, width, channels_last=channels_last)
    inputs["weight"][3], inputs["weight"][5, 1] = torch.inf, -torch.inf
    expected = run(causal_conv1d_ref, inputs, reverse=reverse)["dx"]
    got = run(causal_conv1d, inputs, reverse=reverse, backend=backend)["dx"]
    assert expected.isinf().any() and not expected[:, 5].isnan().any()
    assert torch.equal(got.isnan(), expected.isnan())
    assert torch.equal(got.isinf() * got.sign(), expected.isinf() * expected.sign())


@backends
@both_directions
def test_nan_does_not_cross_a_reset(backend, reverse):
    inputs = conv_inputs(1, 17, 40, 4)
    inputs["seq_idx"] = (torch.arange(40)[None] >= 20).int()
    inputs["x"][0, :, 20 if reverse else 19] = torch.nan
    clean = slice(0, 20) if reverse else slice(20, 40)
    result = run(causal_conv1d, inputs, reverse=reverse, activation="silu", backend=backend)
    assert result["out0"].isnan().any()
    assert result["out0"][..., clean].isfinite().all()
    assert result["dx"][..., clean].isfinite().all()


@backends
def test_uninitialised_memory_is_never_seen(backend):
    inputs = conv_inputs(2, 33, 70, 4, initial_states=True, seq_idx=True)
    assert_no_uninitialised_memory(causal_conv1d, inputs, backend=backend, return_final_states=True)


# ---- autograd, compile ---------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@both_directions
@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("seqlen", [2, 6])
def test_gradcheck(backend, reverse, activation, seqlen):
    inputs = conv_inputs(1, 3, seqlen, 4, dtype=torch.float64, initial_states=True, seq_idx=seqlen > 4)
    options = {"backend": backend, "reverse": reverse, "activation": activation, "return_final_states": True}
    assert gradcheck(causal_conv1d, inputs, **options)


@backends
@pytest.mark.parametrize("final", [False, True])
@pytest.mark.parametrize("kwargs", [{}, {"initial_states": True, "seq_idx": True, "bias": False}], ids=str)
def test_opcheck(backend, final, kwargs):
    import pixelbytes_kernels.ops.causal_conv1d.autograd  # noqa: F401, registers the op

    inputs = conv_inputs(2, 6, 10, 4, channels_last=True, **kwargs)
    names = ("x", "weight", "bias", "seq_idx", "initial_states")
    tensors = [inputs.get(n) for n in names]
    tensors = [t.requires_grad_() if t is not None and t.is_floating_point() else t for t in tensors]
    library.opcheck(torch.ops.pixelbytes.causal_conv1d, (*tensors, True, False, final, backend))


@backends
@both_directions
def test_compiles_whole(backend, reverse):
    inputs = conv_inputs(2, 17, 40, 4, initial_states=True, seq_idx=True)
    options = {"reverse": reverse, "activation": "silu", "return_final_states": True, "backend": backend}
    assert_same_when_compiled(causal_conv1d, inputs, **options)


@needs_cpu
@pytest.mark.slow
def test_compiles_with_inductor():
    for channels_last in (False, True):
        inputs = conv_inputs(2, 17, 40, 4, channels_last=channels_last, initial_states=True)
        assert_same_when_compiled(causal_conv1d, inputs, "inductor", activation="silu", backend="cpu")


@needs_cpu
def test_backward_saves_the_inputs_alone():
    inputs = {k: v.requires_grad_() for k, v in conv_inputs().items()}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        causal_conv1d(**inputs, activation="silu", backend="cpu")
    assert set(saved) <= {v.data_ptr() for v in inputs.values()}


@needs_cpu
def test_double_backward_is_refused():
    inputs = conv_inputs(1, 3, 5)
    x = inputs["x"].requires_grad_()
    out = causal_conv1d(**inputs, activation="silu", backend="cpu")
    (grad,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize(("batch", "seqlen"), [(0, 5), (3, 0)])
def test_empty(backend, batch, seqlen):
    inputs = conv_inputs(batch, 6, seqlen, initial_states=True)
    result = run(causal_conv1d, inputs, return_final_states=True, backend=backend)
    assert result["out0"].shape == (batch, 6, seqlen)
    assert torch.equal(result["out1"], inputs["initial_states"])
    for name in ("dx", "dweight", "dbias"):
        assert torch.equal(result[name], torch.zeros_like(inputs[name[1:]])), name


@pytest.mark.parametrize(
    ("name", "change", "error", "message"),
    [
        ("x", lambda t: t[0], ValueError, "x must have shape|weight must have shape"),
        ("weight", lambda t: t[1:], ValueError, r"weight must have shape \(dim=20, width\)"),
        ("weight", lambda t: t[:, :1], ValueError, "weight must have a width of 2, 3 or 4, got 1"),
        ("weight", lambda t: t.repeat(1, 2), ValueError, "weight must have a width of 2, 3 or 4, got 8"),
        ("bias", lambda t: t[1:], ValueError, r"bias must have shape \(dim=20\)"),
        ("x", lambda t: t.long(), TypeError, "x must be float32"),
        ("seq_idx", lambda t: t.float(), TypeError, "seq_idx must be an integer tensor"),
        ("seq_idx", lambda t: t[:, 1:], ValueError, "seq_idx must have shape"),
        ("initial_states", lambda t: t[..., 1:], ValueError, r"initial_states must have shape .*states=3\)"),
        ("weight", lambda t: t.to("meta"), ValueError, "weight must be on cpu"),
    ],
)
def test_bad_arguments(name, change, error, message):
    inputs = conv_inputs(initial_states=True, seq_idx=True)
    inputs[name] = change(inputs[name])
    with pytest.raises(error, match=f"causal_conv1d: ({message})"):
        causal_conv1d(**inputs)


def test_unknown_activation():
    with pytest.raises(ValueError, match="activation must be None, 'silu' or 'swish', got 'relu'"):
        causal_conv1d(**conv_inputs(), activation="relu")


# ---- causal_conv1d_update ------------------------------------------------------------------------


@backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("state_len", [3, 5])
def test_updates_step_by_step_are_the_whole(backend, dtype, state_len):
    """The state may hold more inputs than the taps reach."""
    inputs = conv_inputs(2, 17, 9, 4, dtype=dtype)
    state = torch.randn(2, 17, state_len, generator=torch.Generator().manual_seed(4), dtype=torch.float64).to(dtype)
    whole, final = causal_conv1d(
        **inputs, activation="silu", initial_states=state[..., -3:], return_final_states=True, backend=backend
    )
    steps = [
        causal_conv1d_update(x, state, inputs["weight"], inputs["bias"], "silu", backend=backend)
        for x in inputs["x"].unbind(-1)
    ]
    torch.testing.assert_close(torch.stack(steps, -1), whole)
    assert torch.equal(state[..., -3:], final)


@backends
@pytest.mark.parametrize("seqlen", [1, 2, 7])
def test_update_of_several_steps(backend, seqlen):
    inputs = conv_inputs(2, 17, seqlen)
    states = [torch.linspace(-1, 1, 2 * 17 * 4).view(2, 17, 4) for _ in range(2)]
    out = causal_conv1d_update(inputs["x"], states[0], inputs["weight"], inputs["bias"], backend=backend)
    expected = causal_conv1d_update_ref(inputs["x"], states[1], inputs["weight"], inputs["bias"])
    torch.testing.assert_close(out, expected)
    assert torch.equal(*states)


@backends
def test_update_of_a_strided_state(backend):
    inputs = conv_inputs(2, 17, 1)
    big = torch.full((2, 6, 17), 9.0)
    big[:, ::2] = torch.linspace(-1, 1, 2 * 3 * 17).view(2, 3, 17)
    view = big[:, ::2].transpose(1, 2)
    plain = view.contiguous()
    args = (inputs["weight"], inputs["bias"], "silu")
    out = causal_conv1d_update(inputs["x"][..., 0], view, *args, backend=backend)
    torch.testing.assert_close(out, causal_conv1d_update_ref(inputs["x"][..., 0], plain, *args))
    assert torch.equal(view, plain)
    assert (big[:, 1::2] == 9).all()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"conv_state": torch.zeros(2, 20, 2)},
            ValueError,
            "conv_state must hold at least width - 1 = 3 inputs, got 2",
        ),
        ({"conv_state": torch.zeros(2, 19, 3)}, ValueError, "conv_state must have shape"),
        ({"conv_state": torch.zeros(2, 20, 3).int()}, TypeError, "conv_state must be float32"),
        ({"x": torch.zeros(2, 20, 1, 1)}, ValueError, r"x must have shape \(batch, dim\) or"),
        ({"backend": "cuda"}, RuntimeError, "backend 'cuda'"),
    ],
)
def test_bad_update(change, error, message):
    inputs = conv_inputs(seqlen=1)
    good = {**inputs, "conv_state": torch.zeros(2, 20, 3)}
    with pytest.raises(error, match=f"causal_conv1d_update: {message}"):
        causal_conv1d_update(**{**good, **change})
