"""causal_conv1d in Triton's interpreter: the oracle, every option, strides, poisoned margins, values that are not finite."""

from __future__ import annotations

import os

import pytest
import torch

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("runs in Triton's interpreter; a real GPU has test_device.py", allow_module_level=True)

from poisoned import Margins, poisoned_allocations  # noqa: E402

from pixelbytes_kernels import causal_conv1d, causal_conv1d_ref  # noqa: E402
from pixelbytes_kernels._triton import check_grid  # noqa: E402
from pixelbytes_kernels.ops.causal_conv1d.autograd import Convolution  # noqa: E402
from pixelbytes_kernels.testing import assert_matches, conv_inputs, run  # noqa: E402

both_directions = pytest.mark.parametrize("reverse", [False, True], ids=["up", "down"])
# Rows along time are taken in tiles; channels side by side are walked, and so is what has states.
layouts = pytest.mark.parametrize("channels_last", [False, True], ids=["tiles", "walk"])


def check(inputs, **shared):
    shared = {"activation": "silu", **shared}
    assert_matches(causal_conv1d, causal_conv1d_ref, inputs, options={"backend": "triton"}, **shared)


# Rows shorter than the taps; a run of steps exactly and one more; a second tile of channels.
@both_directions
@pytest.mark.parametrize(("dim", "seqlen", "width"), [(3, 1, 4), (2, 2, 3), (33, 16, 2), (3, 17, 4)])
def test_walk(reverse, dim, seqlen, width):
    inputs = conv_inputs(2 if seqlen < 10 else 1, dim, seqlen, width, channels_last=True, initial_states=True)
    check(inputs, reverse=reverse, return_final_states=True)


@both_directions
@pytest.mark.parametrize(("dim", "seqlen", "width"), [(3, 1, 4), (2, 2, 3), (9, 64, 2), (3, 257, 4), (5, 70, 3)])
def test_tiles(reverse, dim, seqlen, width):
    check(conv_inputs(2, dim, seqlen, width), reverse=reverse)


@both_directions
@layouts
@pytest.mark.parametrize(
    ("dtype", "activation", "bias", "initial", "seq_idx", "final"),
    [
        (torch.float32, None, False, False, True, False),
        (torch.float32, "silu", False, True, False, True),
        (torch.float16, "silu", True, False, True, False),
    ],
)
def test_options(reverse, channels_last, dtype, activation, bias, initial, seq_idx, final):
    options = {"bias": bias, "initial_states": initial, "seq_idx": seq_idx, "channels_last": channels_last}
    inputs = conv_inputs(1, 5, 9, 4, dtype=dtype, **options)
    check(inputs, reverse=reverse, activation=activation, return_final_states=final)


def test_dtypes_may_differ():
    """Weights of 16 bits on 32-bit inputs, states of another dtype: each is read in its own."""
    inputs = conv_inputs(1, 5, 9, 4, initial_states=True, seq_idx=True)
    inputs["weight"], inputs["initial_states"] = inputs["weight"].half(), inputs["initial_states"].half()
    inputs["seq_idx"] = inputs["seq_idx"].to(torch.uint8)
    expected = run(causal_conv1d_ref, {k: v.float() if k != "seq_idx" else v for k, v in inputs.items()})
    got = run(causal_conv1d, inputs, backend="triton")
    for name, value in expected.items():
        tolerance = 1e-3 if got[name].dtype == torch.float16 else 1e-6  # the last rounding of the gradient
        torch.testing.assert_close(got[name].float(), value, rtol=tolerance, atol=tolerance, msg=name)


# Half of a projection, every second channel, every second step, an odd address.
@layouts
@pytest.mark.parametrize(
    "view",
    [lambda x: x[:, :8], lambda x: x[:, ::2], lambda x: x[:, :, ::2], lambda x: x[:, 1:9, 1:]],
    ids=["half", "even channels", "even steps", "odd address"],
)
def test_strided_views(channels_last, view):
    x = view(conv_inputs(1, 16, 10, 4, channels_last=channels_last)["x"])
    inputs = {**conv_inputs(*x.shape, 4), "x": x}
    results = []
    for leaf in (x, x.contiguous()):
        leaf = leaf.detach().requires_grad_()
        out = causal_conv1d(**{**inputs, "x": leaf}, activation="silu", backend="triton")
        wide = torch.linspace(-1, 1, 4 * out.numel()).view(2, *out.shape, 2)
        (dx,) = torch.autograd.grad(out, leaf, wide[0, ..., 0])  # the output's gradient has strides of its own
        results.append((out.detach(), dx))
    for strided, contiguous in zip(*results, strict=True):
        torch.testing.assert_close(strided, contiguous, rtol=1e-6, atol=1e-6)  # one walked, the other in tiles


@both_directions
@layouts
def test_margins(reverse, channels_last):
    """Nothing outside of a tensor is read into a result or written."""
    options = {"channels_last": channels_last, "initial_states": channels_last, "seq_idx": True}
    inputs = conv_inputs(1, 5, 17, 4, **options)
    expected = run(causal_conv1d, inputs, reverse=reverse, return_final_states=channels_last, backend="triton")
    margins = Margins()
    inside = {name: margins.around(name, t) for name, t in inputs.items()}
    tensors = [inside.get(n) for n in ("x", "weight", "bias", "seq_idx", "initial_states")]
    wanted = [t.requires_grad_() for t in tensors if t is not None and t.is_floating_point()]
    generator = torch.Generator().manual_seed(1)  # the output gradients of `run`
    with poisoned_allocations():
        outputs = Convolution.apply("triton", False, reverse, channels_last, *tensors)[: 1 + channels_last]
        grads = [torch.randn(o.shape, generator=generator, dtype=torch.float64) for o in outputs]
        grads = [margins.around("dout", g.to(torch.bfloat16).to(o.dtype)) for g, o in zip(grads, outputs, strict=True)]
        found = torch.autograd.grad(outputs, wanted, grads)
    margins.check()
    for (name, value), got in zip(expected.items(), (*outputs, *found), strict=True):
        assert torch.equal(got, value), name


@both_directions
@pytest.mark.parametrize("bad", [torch.nan, torch.inf], ids=["nan", "inf"])
@pytest.mark.parametrize("name", ["x", "weight", "bias", "initial_states"])
def test_values_that_are_not_finite(reverse, bad, name):
    """They show where the reference has them, and nowhere else in the output; in gradients at least there."""
    inputs = conv_inputs(1, 3, 9, 4, initial_states=name == "initial_states" or reverse)
    inputs[name].view(-1)[-1] = bad
    options = {"reverse": reverse, "activation": "silu"}
    expected, got = run(causal_conv1d_ref, inputs, **options), run(causal_conv1d, inputs, backend="triton", **options)
    assert torch.equal(got["out0"].isnan(), expected["out0"].isnan())
    assert torch.equal(got["out0"].isinf(), expected["out0"].isinf())
    for key, value in expected.items():
        assert not (value.isnan() & ~got[key].isnan()).any(), key


@both_directions
@layouts
def test_nan_does_not_cross_a_reset(reverse, channels_last):
    inputs = conv_inputs(1, 3, 16, 4, channels_last=channels_last)
    inputs["seq_idx"] = (torch.arange(16)[None] >= 8).int()
    inputs["x"][0, :, 8 if reverse else 7] = torch.nan
    clean = slice(0, 8) if reverse else slice(8, 16)
    result = run(causal_conv1d, inputs, reverse=reverse, activation="silu", backend="triton")
    assert result["out0"].isnan().any()
    assert result["out0"][..., clean].isfinite().all()
    assert result["dx"][..., clean].isfinite().all()


@pytest.mark.parametrize(("batch", "seqlen"), [(0, 5), (3, 0)])
def test_empty(batch, seqlen):
    inputs = conv_inputs(batch, 6, seqlen, initial_states=True)
    result = run(causal_conv1d, inputs, return_final_states=True, backend="triton")
    assert result["out0"].shape == (batch, 6, seqlen)
    assert torch.equal(result["out1"], inputs["initial_states"])
    for name in ("dx", "dweight", "dbias"):
        assert torch.equal(result[name], torch.zeros_like(inputs[name[1:]])), name


@layouts
@pytest.mark.parametrize("name", ["x", "weight", "bias"])
def test_only_wanted_gradients(channels_last, name):
    inputs = conv_inputs(1, 5, 9, channels_last=channels_last)
    all_of_them = run(causal_conv1d, inputs, backend="triton")
    leaves = {k: v.clone().requires_grad_(k == name) for k, v in inputs.items()}
    out = causal_conv1d(**leaves, backend="triton")
    generator = torch.Generator().manual_seed(1)  # the output gradient of `run`
    dout = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(torch.bfloat16).float()
    (grad,) = torch.autograd.grad(out, leaves[name], dout)
    assert torch.equal(grad, all_of_them[f"d{name}"])


def test_a_grid_that_is_too_large():
    with pytest.raises(ValueError, match="causal_conv1d: these sizes need a grid of"):
        check_grid("causal_conv1d", (2**31,))
