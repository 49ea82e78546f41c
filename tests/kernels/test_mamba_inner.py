"""mamba_inner and bimamba_inner: the oracle, identities, determinism, compile, memory, errors."""

from __future__ import annotations

import pytest
import torch
from kernel_forms import (
    BACKENDS,
    DTYPES,
    assert_close,
    assert_no_uninitialised_memory,
    assert_nonfinite_like,
    assert_same_for_any_number_of_threads,
    assert_same_when_compiled,
    gradcheck,
    needs_cpu,
)

from pixelbytes_kernels import (
    bimamba_inner,
    bimamba_inner_ref,
    causal_conv1d,
    mamba_inner,
    mamba_inner_ref,
    selective_scan,
)
from pixelbytes_kernels.testing import assert_matches, inner_inputs, run, scan_inputs

backends = pytest.mark.parametrize("backend", BACKENDS)
SIZES = [(17, 1, 3, 2), (20, 33, 5, 2), (81, 65, 16, 6)]
SECOND = (
    "conv1d_weight_rev", "conv1d_bias_rev", "x_proj_weight_rev", "delta_proj_weight_rev", "A_rev", "D_rev",
    "delta_bias_rev",
)  # fmt: skip


def with_seq_idx(inputs):
    batch, _, seqlen = inputs["xz"].shape
    return {**inputs, "seq_idx": (torch.arange(seqlen) // 7).expand(batch, -1)}


@backends
@pytest.mark.parametrize("reverse", [False, True], ids=["up", "down"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("dim", "seqlen", "dstate", "rank"), SIZES)
def test_mamba_inner(backend, reverse, dtype, dim, seqlen, dstate, rank):
    narrow = dtype.itemsize == 2
    if narrow and seqlen > 40:
        seqlen = 17  # five draws instead of one long one
    # The plain loop needs one dtype throughout; the kernel's wider sums are held to its error. Not seed 0: there an
    # element of dA cancels to a twentieth of its terms, and whose rounding is luckier says nothing about either.
    draws = [
        inner_inputs(2, dim, seqlen, dstate, rank, dtype=dtype, seed=seed) for seed in range(1, 6 if narrow else 3)
    ]
    inputs = [{k: v.to(dtype) for k, v in draw.items()} for draw in draws]
    assert_matches(mamba_inner, mamba_inner_ref, inputs, options={"backend": backend}, reverse=reverse)


@backends
@pytest.mark.parametrize("second", [False, True], ids=["shared", "own"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("dim", "seqlen", "dstate", "rank"), SIZES)
def test_bimamba_inner(backend, second, dtype, dim, seqlen, dstate, rank):
    inputs = with_seq_idx(inner_inputs(2, dim, seqlen, dstate, rank, dtype=dtype, second=second))
    assert_matches(bimamba_inner, bimamba_inner_ref, inputs, options={"backend": backend}, scale=0.5)


@backends
@pytest.mark.parametrize("name", SECOND)
def test_any_weight_may_be_shared(backend, name):
    inputs = inner_inputs(2, 17, 20, 5, dtype=torch.float64, second=True)
    inputs = {k: v for k, v in inputs.items() if k not in SECOND or k == name}
    assert_matches(bimamba_inner, bimamba_inner_ref, inputs, options={"backend": backend})


@backends
@pytest.mark.parametrize("op", [(mamba_inner, mamba_inner_ref), (bimamba_inner, bimamba_inner_ref)])
@pytest.mark.parametrize(
    "absent",
    [("conv1d_bias",), ("out_proj_bias", "D"), ("delta_bias", "B_proj_bias"), ("C_proj_bias", "conv1d_bias", "D")],
    ids="+".join,
)
@pytest.mark.parametrize("softplus", [False, True])
def test_optional_arguments(backend, op, absent, softplus):
    inputs = [inner_inputs(2, 17, 20, 5, seed=seed) for seed in range(3)]
    for draw in inputs:
        if not softplus:  # positive steps, or states grow
            draw["delta_proj_weight"] *= 0.01
            draw["delta_bias"] = draw["delta_bias"].abs() + 0.1
        draw |= dict.fromkeys(absent)
    assert_matches(*op, inputs, options={"backend": backend}, delta_softplus=softplus)


@backends
@pytest.mark.parametrize("op", [(mamba_inner, mamba_inner_ref), (bimamba_inner, bimamba_inner_ref)])
@pytest.mark.parametrize("constant", ["", "B", "C", "BC"])
@pytest.mark.parametrize("given", ["B", "C", "BC"])
def test_given_coefficients(backend, op, given, constant):
    """B and C that do not come from x_proj, varying in time or constant."""
    inputs = inner_inputs(2, 17, 20, 5)
    scan = scan_inputs(2, 17, 20, 5, constant=constant)
    rows = 2 + 5 * (2 - len(given))
    inputs |= {name: scan[name] for name in given} | {f"{name}_proj_bias": None for name in given}
    inputs["x_proj_weight"] = inputs["x_proj_weight"][:rows].contiguous()
    assert_matches(*op, inputs, options={"backend": backend})


@backends
@pytest.mark.parametrize("reverse", [False, True], ids=["up", "down"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("absent", [(), ("B_proj_bias",)], ids=["biases", "no B bias"])
def test_normed_rows(backend, reverse, dtype, absent):
    draws = [inner_inputs(2, 20, 33, 5, 3, dtype=dtype, seed=seed) for seed in range(1, 6)]
    inputs = [{k: None if k in absent else v.to(dtype) for k, v in draw.items()} for draw in draws]
    options = {"reverse": reverse, "rms_eps": 1e-2}  # large enough to be seen
    assert_matches(mamba_inner, mamba_inner_ref, inputs, options={"backend": backend}, **options)


@backends
@pytest.mark.parametrize("given", ["B", "C", "BC"])
def test_given_coefficients_are_not_normed(backend, given):
    """The norm of what x_proj still gives, and a norm of rows of one: delta's rank here."""
    inputs = inner_inputs(2, 17, 20, 5, 1)
    scan = scan_inputs(2, 17, 20, 5)
    inputs |= {name: scan[name] for name in given} | {f"{name}_proj_bias": None for name in given}
    inputs["x_proj_weight"] = inputs["x_proj_weight"][: 1 + 5 * (2 - len(given))].contiguous()
    assert_matches(mamba_inner, mamba_inner_ref, inputs, options={"backend": backend}, rms_eps=0.1)


@backends
def test_normed_rows_forget_their_scale(backend):
    """Without eps and biases a larger x_proj changes nothing."""
    inputs = inner_inputs(2, 17, 40, 5, dtype=torch.float64) | {"B_proj_bias": None, "C_proj_bias": None}
    larger = {**inputs, "x_proj_weight": 3 * inputs["x_proj_weight"]}
    options = {"backend": backend, "rms_eps": 0.0}
    expected, found = run(mamba_inner, inputs, **options), run(mamba_inner, larger, **options)
    expected["dx_proj_weight"] = expected["dx_proj_weight"] / 3
    assert_close(found, expected)


# ---- identities ----------------------------------------------------------------------------------


@backends
def test_is_its_parts(backend):
    inputs = inner_inputs(2, 17, 40, 5, dtype=torch.float64)

    def parts(**w):
        x, z = w["xz"].chunk(2, dim=1)
        u = causal_conv1d(x, w["conv1d_weight"].squeeze(1), w["conv1d_bias"], "silu", backend=backend)
        dt, B, C = (u.transpose(1, 2) @ w["x_proj_weight"].T).split([2, 5, 5], -1)
        delta = (dt @ w["delta_proj_weight"].T).transpose(1, 2)
        B, C = (B + w["B_proj_bias"]).transpose(1, 2), (C + w["C_proj_bias"]).transpose(1, 2)
        y = selective_scan(u, delta, w["A"], B, C, w["D"], z, w["delta_bias"], True, backend=backend)
        return y.transpose(1, 2) @ w["out_proj_weight"].T + w["out_proj_bias"]

    assert_close(run(mamba_inner, inputs, backend=backend), run(parts, inputs))


@backends
def test_reverse_is_flip_inner_flip(backend):
    inputs = inner_inputs(2, 17, 40, 5, dtype=torch.float64)

    def flipped(xz, **kw):
        return mamba_inner(xz.flip(-1), **kw, backend=backend).flip(1)

    assert_close(run(flipped, inputs), run(mamba_inner, inputs, reverse=True, backend=backend))


@backends
@pytest.mark.parametrize("second", [False, True], ids=["shared", "own"])
def test_bimamba_is_inner_and_flip_inner_flip(backend, second):
    """m(x) + flip(m(flip(x))), with the second direction's own weights in the second term."""
    inputs = inner_inputs(2, 17, 40, 5, dtype=torch.float64, second=second)
    inputs["out_proj_bias"] = None  # it would count twice

    def two(xz, **kw):
        up = {k: v for k, v in kw.items() if k not in SECOND}
        down = {k: kw.get(f"{k}_rev", v) for k, v in up.items()}
        return mamba_inner(xz, **up, backend=backend) + mamba_inner(xz.flip(-1), **down, backend=backend).flip(1)

    assert_close(run(two, inputs), run(bimamba_inner, inputs, backend=backend))


@backends
@pytest.mark.parametrize("op", [mamba_inner, bimamba_inner])
def test_resets_are_separate_rows(backend, op):
    inputs = inner_inputs(1, 17, 40, 5, dtype=torch.float64)
    packed = {**inputs, "seq_idx": (torch.arange(40)[None] >= 23).int()}

    def rows(xz, **kw):
        return torch.cat([op(part, **kw, backend=backend) for part in xz.split([23, 17], -1)], 1)

    assert_close(run(rows, inputs), run(op, packed, backend=backend))


@needs_cpu
@pytest.mark.parametrize("layout", ["channels last", "channels first"])
@pytest.mark.parametrize("op", [mamba_inner, bimamba_inner])
def test_layouts_of_xz(op, layout):
    inputs = inner_inputs(2, 17, 40, 5, dtype=torch.float64)
    expected = run(op, inputs, backend="reference")
    if layout == "channels first":
        inputs["xz"] = inputs["xz"].contiguous()
    assert_close(run(op, inputs, backend="cpu"), expected)


@needs_cpu
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(("op", "second"), [(mamba_inner, False), (bimamba_inner, False), (bimamba_inner, True)])
def test_bitwise_equal_for_any_number_of_threads(batch, op, second):
    assert_same_for_any_number_of_threads(op, inner_inputs(batch, 81, 70, 5, second=second), backend="cpu")


@backends
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", ["xz", "conv1d_weight", "x_proj_weight", "delta_proj_weight", "A", "D", "delta_bias"])
def test_nonfinite_inputs(backend, bad, name):
    inputs = inner_inputs(2, 17, 20, 5)
    flat = inputs[name] if name == "xz" else inputs[name].view(-1)
    flat[(0,) * (flat.ndim - 1) + (3,)] = bad
    for op, reference in ((mamba_inner, mamba_inner_ref), (bimamba_inner, bimamba_inner_ref)):
        assert_nonfinite_like(lambda op=op, **kw: op(**kw, backend=backend), reference, inputs)


# ---- autograd, compile, memory -------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize(("op", "second"), [(mamba_inner, False), (bimamba_inner, False), (bimamba_inner, True)])
def test_gradcheck(backend, op, second):
    inputs = inner_inputs(1, 3, 4, 2, 1, 2, dtype=torch.float64, second=second)
    assert gradcheck(op, inputs, backend=backend)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_gradcheck_of_normed_rows(backend):
    inputs = inner_inputs(1, 3, 4, 2, 2, 2, dtype=torch.float64)
    assert gradcheck(mamba_inner, inputs, backend=backend, rms_eps=0.1)


@needs_cpu
def test_normed_rows_compile_whole():
    assert_same_when_compiled(mamba_inner, inner_inputs(2, 17, 40, 5), backend="cpu", rms_eps=1e-3)


@needs_cpu
@pytest.mark.parametrize(("op", "second"), [(mamba_inner, False), (bimamba_inner, False), (bimamba_inner, True)])
def test_compiles_whole(op, second):
    assert_same_when_compiled(op, inner_inputs(2, 17, 40, 5, second=second), backend="cpu")


@needs_cpu
@pytest.mark.slow
def test_compiles_with_inductor():
    assert_same_when_compiled(bimamba_inner, inner_inputs(2, 17, 40, 5), "inductor", backend="cpu")


@needs_cpu
def test_backward_saves_inputs_and_chunk_states():
    """Of what is as large as the activations: xz alone, and one state a chunk and direction."""
    batch, dim, seqlen, dstate = 2, 64, 256, 16
    inputs = {k: v.detach().requires_grad_() for k, v in inner_inputs(batch, dim, seqlen, dstate).items()}
    saved = {}
    hook = lambda t: saved.__setitem__(t.untyped_storage().data_ptr(), t.untyped_storage().nbytes()) or t  # noqa: E731
    with torch.autograd.graph.saved_tensors_hooks(hook, lambda t: t):
        bimamba_inner(**inputs, backend="cpu")
    given = sum(v.untyped_storage().nbytes() for v in inputs.values())
    assert sum(saved.values()) <= given + 4 * 2 * batch * dim * dstate * -(-seqlen // 32)


@needs_cpu
@pytest.mark.parametrize("op", [mamba_inner, bimamba_inner])
def test_double_backward_is_refused(op):
    inputs = inner_inputs(1, 3, 4, 2)
    xz = inputs["xz"].requires_grad_()
    (grad,) = torch.autograd.grad(op(**inputs, backend="cpu").square().sum(), xz, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@backends
@pytest.mark.parametrize(("op", "second"), [(mamba_inner, False), (bimamba_inner, True)])
def test_uninitialised_memory_is_never_seen(backend, op, second):
    assert_no_uninitialised_memory(op, inner_inputs(2, 17, 40, 5, second=second), backend=backend)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("op", [mamba_inner, bimamba_inner])
@pytest.mark.parametrize(("batch", "seqlen"), [(0, 5), (2, 0)])
def test_empty(backend, op, batch, seqlen):
    inputs = inner_inputs(batch, 6, seqlen, 3)
    result = run(op, inputs, backend=backend)
    assert result["out0"].shape == (batch, seqlen, 10)
    for name, value in result.items():
        if name.startswith("d"):
            assert torch.equal(value, torch.zeros_like(inputs[name[1:]])), name


@needs_cpu
@pytest.mark.parametrize("op", [mamba_inner, bimamba_inner])
def test_frozen_weights(op):
    """Only xz wants a gradient, as below frozen layers."""
    inputs = inner_inputs(2, 17, 20, 5)
    expected = run(op, inputs, backend="cpu")["dxz"]
    leaf = inputs["xz"].clone().requires_grad_()
    out = op(**{**inputs, "xz": leaf}, backend="cpu")
    gen = torch.Generator().manual_seed(1)  # the output gradient of `run`
    out.backward(torch.randn(out.shape, generator=gen, dtype=torch.float64).to(torch.bfloat16).to(out.dtype))
    assert torch.equal(leaf.grad, expected)


@pytest.mark.parametrize(
    ("name", "change", "error", "message"),
    [
        ("xz", lambda t: t[:, 1:], ValueError, "xz must have an even number of channels, got 39"),
        ("xz", lambda t: t[0], ValueError, "xz must have shape"),
        ("conv1d_weight", lambda t: t[1:], ValueError, "conv1d_weight must have shape"),
        ("conv1d_weight", lambda t: t[..., :1], ValueError, "conv1d_weight must have a width of 2, 3 or 4, got 1"),
        ("x_proj_weight", lambda t: t[1:], ValueError, r"x_proj_weight must have shape \(rows=12, dim=20\)"),
        ("delta_proj_weight", lambda t: t[1:], ValueError, "delta_proj_weight must have shape"),
        ("out_proj_weight", lambda t: t[:, 1:], ValueError, "out_proj_weight must have shape"),
        ("out_proj_bias", lambda t: t[1:], ValueError, "out_proj_bias must have shape"),
        ("A", lambda t: t[:, :0], ValueError, "A must have a dstate from 1 to 256, got 0"),
        ("A", lambda t: t + 1j, TypeError, "A is torch.complex64"),
        ("D", lambda t: t[1:], ValueError, "D must have shape"),
        ("B_proj_bias", lambda t: t[1:], ValueError, "B_proj_bias must have shape"),
        ("delta_bias", lambda t: t.to("meta"), ValueError, "delta_bias must be on cpu"),
    ],
)
@pytest.mark.parametrize("op", [mamba_inner, bimamba_inner])
def test_bad_arguments(op, name, change, error, message):
    inputs = inner_inputs()
    inputs[name] = change(inputs[name])
    with pytest.raises(error, match=f"{op.__name__}: {message}"):
        op(**inputs)


@pytest.mark.parametrize("eps", [-1e-3, float("nan")])
def test_bad_rms_eps(eps):
    with pytest.raises(ValueError, match="mamba_inner: rms_eps must be None, or 0 or more, got"):
        mamba_inner(**inner_inputs(), rms_eps=eps)


@pytest.mark.parametrize("name", SECOND)
def test_bad_weights_of_the_second_direction(name):
    inputs = inner_inputs(second=True)
    inputs[name] = inputs[name][1:]
    with pytest.raises(ValueError, match=f"bimamba_inner: {name} must have shape"):
        bimamba_inner(**inputs)
