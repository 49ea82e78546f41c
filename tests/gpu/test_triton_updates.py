"""causal_conv1d_update and selective_state_update in Triton's interpreter: the oracle, options, strides, poisoned margins."""

from __future__ import annotations

import os

import pytest
import torch

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("runs in Triton's interpreter; a real GPU has test_device.py", allow_module_level=True)

from poisoned import Margins, poisoned_allocations  # noqa: E402

from pixelbytes_kernels import (  # noqa: E402
    causal_conv1d_update,
    causal_conv1d_update_ref,
    selective_state_update,
    selective_state_update_ref,
)
from pixelbytes_kernels.testing import conv_inputs, error, rounded, update_inputs  # noqa: E402


def check(inputs):
    """Output and new state within the numeric contract."""

    def both(update, kw, **options):
        kw = {**kw, "state": kw["state"].clone()}
        return update(**kw, **options), kw["state"]

    oracle = both(selective_state_update_ref, rounded(inputs, torch.float64))
    plain = both(selective_state_update_ref, inputs)
    got = both(selective_state_update, inputs, backend="triton")
    for name, o, p, g in zip(("out", "state"), oracle, plain, got, strict=True):
        bound = 2 * error(p, o) + 4 * torch.finfo(torch.float32).eps + torch.finfo(g.dtype).eps / 2
        assert error(g, o) <= bound, name


# A tile of channels exactly, one more; states that fill a power of two and that do not; the largest.
@pytest.mark.parametrize(("batch", "dim", "dstate"), [(3, 1, 1), (2, 16, 16), (1, 17, 16), (2, 5, 70), (1, 3, 256)])
def test_sizes(batch, dim, dstate):
    check(update_inputs(batch, dim, dstate))


@pytest.mark.parametrize(
    ("D", "z", "dt_bias", "softplus"), [(0, 0, 0, 0), (1, 0, 0, 1), (0, 1, 0, 1), (0, 0, 1, 0), (1, 1, 1, 0)]
)
def test_optional_arguments(D, z, dt_bias, softplus):
    inputs = update_inputs(2, 7, 5, D=bool(D), z=bool(z), dt_bias=bool(dt_bias))
    check({**inputs, "dt_softplus": bool(softplus)})


def test_lazily_negated_tensors_are_refused():
    inputs = update_inputs(2, 7, 5)
    lazy = torch.randn(2, 7, dtype=torch.complex64).conj().imag
    assert lazy.is_neg()
    with pytest.raises(RuntimeError, match=r"selective_state_update: .*negative bit set.*resolve_neg\(\)"):
        selective_state_update(**{**inputs, "x": lazy}, backend="triton")
    check({**inputs, "x": lazy.resolve_neg()})


@pytest.mark.parametrize("groups", [1, 2, 20])
def test_groups(groups):
    check(update_inputs(2, 20, 5, groups=groups))


def test_16_bits():
    inputs = update_inputs(2, 7, 5)
    check({**inputs, "state": inputs["state"].half()})
    check(update_inputs(2, 7, 5, dtype=torch.float16))


def test_strides_and_what_lies_between():
    inputs = update_inputs(2, 7, 5)
    plain = inputs["state"].clone()
    expected = selective_state_update(**{**inputs, "state": plain}, backend="triton")
    odd = {
        k: v.movedim(0, -1).contiguous().movedim(-1, 0) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()
    }
    big = torch.full((4, 14, 10), 9.0)
    odd["state"] = big[::2, ::2, ::2].copy_(inputs["state"])
    assert torch.equal(selective_state_update(**odd, backend="triton"), expected)
    assert torch.equal(odd["state"], plain)
    for between in (big[1::2], big[:, 1::2], big[..., 1::2]):
        assert (between == 9).all()


def test_margins_of_the_state_update():
    inputs = update_inputs(2, 7, 5, groups=7)
    expected = selective_state_update(**{**inputs, "state": inputs["state"].clone()}, backend="triton")
    margins = Margins()
    inside = {k: margins.around(k, v) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    with poisoned_allocations():
        out = selective_state_update(**inside, backend="triton")
    margins.check()
    assert torch.equal(out, expected)


@pytest.mark.parametrize("name", ["state", "x", "dt", "A", "B", "C", "D", "z", "dt_bias"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf], ids=["nan", "inf", "-inf"])
def test_values_that_are_not_finite(name, bad):
    inputs = update_inputs(2, 5, 3)
    flat = inputs[name].view(-1)
    flat[flat.numel() // 2] = bad
    flat[-1] = bad
    states = [inputs["state"].clone() for _ in range(2)]
    expected = selective_state_update_ref(**{**inputs, "state": states[0]})
    got = selective_state_update(**{**inputs, "state": states[1]}, backend="triton")
    for e, g in ((expected, got), states):
        assert torch.equal(g.isnan(), e.isnan())
        assert torch.equal(g.isinf(), e.isinf())


def test_empty_batch():
    assert selective_state_update(**update_inputs(0, 6, 3), backend="triton").shape == (0, 6)
    inputs = conv_inputs(0, 6, 1)
    out = causal_conv1d_update(inputs["x"], torch.zeros(0, 6, 3), inputs["weight"], backend="triton")
    assert out.shape == (0, 6, 1)


# ---- causal_conv1d_update ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "state_len", "seqlen", "width"),
    [(torch.float32, 3, None, 4), (torch.float32, 5, 2, 2), (torch.float32, 3, 7, 4), (torch.float16, 5, 1, 3)],
)
def test_convolution_steps(dtype, state_len, seqlen, width):
    """The state may hold more inputs than the taps reach, and fewer than there are steps."""
    inputs = conv_inputs(2, 35, seqlen or 1, width, dtype=dtype)
    x = inputs["x"] if seqlen else inputs["x"][..., 0]
    state = torch.randn(2, 35, state_len, generator=torch.Generator().manual_seed(4)).to(dtype)
    states = [state.clone(), state.clone().double()]
    args = (inputs["weight"], inputs["bias"], "silu")
    out = causal_conv1d_update(x, states[0], *args, backend="triton")
    expected = causal_conv1d_update_ref(x.double(), states[1], *(t.double() for t in args[:2]), "silu")
    assert error(out, expected) <= 4 * torch.finfo(torch.float32).eps + torch.finfo(dtype).eps / 2
    assert torch.equal(states[0].double(), states[1])


def test_margins_of_the_convolution_step():
    inputs = conv_inputs(2, 5, 2)
    state = torch.linspace(-1, 1, 40).view(2, 4, 5).transpose(1, 2)  # channels last, as the decoding state is kept
    plain = state.contiguous()
    args = (inputs["weight"], None, "silu")
    expected = causal_conv1d_update(inputs["x"], plain, *args, backend="triton")
    margins = Margins()
    inside = margins.around("conv_state", state)
    with poisoned_allocations():
        x, weight = margins.around("x", inputs["x"]), margins.around("weight", inputs["weight"])
        out = causal_conv1d_update(x, inside, weight, *args[1:], backend="triton")
    margins.check()
    assert torch.equal(out, expected)
    assert torch.equal(inside, plain)
