"""selective_state_update: the oracle, decoding step by step against the whole scan, strides, errors."""

from __future__ import annotations

import itertools

import pytest
import torch
from kernel_forms import BACKENDS, DTYPES, needs_cpu

from pixelbytes_kernels import selective_scan, selective_state_update, selective_state_update_ref
from pixelbytes_kernels.testing import error, rounded, scan_inputs, update_inputs

backends = pytest.mark.parametrize("backend", BACKENDS)


def check(inputs, backend):
    """Output and new state within the numeric contract."""

    def both(update, kw, **options):
        kw = {**kw, "state": kw["state"].clone()}
        return update(**kw, **options), kw["state"]

    oracle = both(selective_state_update_ref, rounded(inputs, torch.float64))
    plain = both(selective_state_update_ref, inputs)
    got = both(selective_state_update, inputs, backend=backend)
    for name, o, p, g in zip(("out", "state"), oracle, plain, got, strict=True):
        slack = 64 * torch.finfo(torch.float64).eps if g.dtype == torch.float64 else 4 * torch.finfo(torch.float32).eps
        bound = 2 * error(p, o) + slack + torch.finfo(g.dtype).eps / 2
        assert error(g, o) <= bound, name


@backends
@pytest.mark.parametrize(
    ("batch", "dim", "dstate"), [(7, 1, 1), (2, 15, 3), (3, 16, 4), (2, 17, 5), (1, 81, 16), (2, 162, 64), (1, 65, 256)]
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sizes_and_dtypes(backend, batch, dim, dstate, dtype):
    check(update_inputs(batch, dim, dstate, dtype=dtype), backend)


@backends
@pytest.mark.parametrize(("D", "z", "dt_bias", "softplus"), list(itertools.product([False, True], repeat=4)))
def test_optional_arguments(backend, D, z, dt_bias, softplus):
    check({**update_inputs(2, 17, 5, D=D, z=z, dt_bias=dt_bias), "dt_softplus": softplus}, backend)


@backends
@pytest.mark.parametrize("groups", [1, 2, 20])
def test_groups(backend, groups):
    check(update_inputs(2, 20, 5, groups=groups), backend)


@backends
@pytest.mark.parametrize(
    ("dtype", "state"),
    [(torch.bfloat16, torch.bfloat16), (torch.float32, torch.float16), (torch.float16, torch.float64)],
)
def test_state_of_another_dtype(backend, dtype, state):
    inputs = update_inputs(2, 17, 5, dtype=dtype)
    check({**inputs, "state": inputs["state"].to(state)}, backend)


@backends
@pytest.mark.parametrize("groups", [None, 2])
def test_steps_are_the_whole_scan(backend, groups):
    inputs = scan_inputs(2, 18, 12, 5, dtype=torch.float64, groups=groups, initial_state=True)
    whole, last = selective_scan(**inputs, return_last_state=True, backend=backend)
    state = inputs["initial_state"].clone()
    A, D, bias = inputs["A"], inputs["D"], inputs["delta_bias"]
    steps = []
    for t in range(12):
        u, dt, B, C, z = (inputs[n][..., t] for n in ("u", "delta", "B", "C", "z"))
        steps.append(selective_state_update(state, u, dt, A, B, C, D, z, bias, dt_softplus=True, backend=backend))
    torch.testing.assert_close(torch.stack(steps, -1), whole, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(state, last, rtol=1e-12, atol=1e-12)


@needs_cpu
def test_any_strides():
    inputs = update_inputs(2, 17, 5)
    plain = inputs["state"].clone()
    expected = selective_state_update(**{**inputs, "state": plain}, backend="cpu")
    odd = {
        k: v.movedim(0, -1).contiguous().movedim(-1, 0) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()
    }
    big = torch.full((4, 34, 10), 9.0)
    odd["state"] = big[::2, ::2, ::2].copy_(inputs["state"])
    torch.testing.assert_close(selective_state_update(**odd, backend="cpu"), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(odd["state"], plain, rtol=1e-6, atol=1e-6)
    assert (big[1::2] == 9).all()  # what lies between is not touched
    assert (big[:, 1::2] == 9).all()
    assert (big[..., 1::2] == 9).all()


@backends
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf], ids=["nan", "inf", "-inf"])
@pytest.mark.parametrize("name", ["state", "x", "dt", "A", "B", "C", "D", "z", "dt_bias"])
def test_nonfinite_inputs(backend, bad, name):
    inputs = update_inputs(2, 17, 5)
    flat = inputs[name].view(-1)
    flat[flat.numel() // 2] = bad
    flat[-1] = bad
    states = [inputs["state"].clone() for _ in range(2)]
    expected = selective_state_update_ref(**{**inputs, "state": states[0]})
    got = selective_state_update(**{**inputs, "state": states[1]}, backend=backend)
    for e, g in ((expected, got), states):
        assert torch.equal(g.isnan(), e.isnan())
        assert torch.equal(g.isinf(), e.isinf())


@needs_cpu
def test_bitwise_equal_for_any_number_of_threads():
    inputs = update_inputs(3, 300, 16)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 1, 2, 3, 4):
            torch.set_num_threads(threads)
            state = inputs["state"].clone()
            results.append((selective_state_update(**{**inputs, "state": state}, backend="cpu"), state))
    finally:
        torch.set_num_threads(before)
    for out, state in results[1:]:
        assert torch.equal(out, results[0][0])
        assert torch.equal(state, results[0][1])


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_empty_batch(backend):
    assert selective_state_update(**update_inputs(0, 6, 3), backend=backend).shape == (0, 6)


@pytest.mark.parametrize(
    ("name", "change", "error", "message"),
    [
        ("x", lambda t: t[0], ValueError, r"x must have shape \(batch, dim\)"),
        ("state", lambda t: t[..., 1:], ValueError, r"state must have shape \(batch=2, dim=20, dstate=5\)"),
        ("dt", lambda t: t[:, 1:], ValueError, "dt must have shape"),
        ("z", lambda t: t[1:], ValueError, "z must have shape"),
        ("A", lambda t: t[1:], ValueError, "A must have shape"),
        ("A", lambda t: t + 1j, TypeError, "A is torch.complex64"),
        ("B", lambda t: t[:, 1:], ValueError, "B must have shape"),
        ("B", lambda t: t[:, None].expand(-1, 3, -1), ValueError, "B and C must have the same number of groups"),
        ("D", lambda t: t[1:], ValueError, "D must have shape"),
        ("dt_bias", lambda t: t.int(), TypeError, "dt_bias must be float32"),
        ("C", lambda t: t.to("meta"), ValueError, "C must be on cpu"),
    ],
)
def test_bad_arguments(name, change, error, message):
    inputs = update_inputs()
    inputs[name] = change(inputs[name])
    with pytest.raises(error, match=f"selective_state_update: {message}"):
        selective_state_update(**inputs)
