"""Numbers that the kernels see rarely: denormals, which count as zero inside of some kernels and nowhere else; lazily negated tensors."""

import platform

import pytest
import torch
from kernel_forms import needs_cpu

from pixelbytes_kernels import MambaLayer, MambaStep, causal_conv1d, selective_scan, selective_state_update
from pixelbytes_kernels.testing import conv_inputs, scan_inputs, update_inputs

pytestmark = needs_cpu
flushes = pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64", "aarch64", "arm64"),
    reason="denormals are flushed on x86-64 and arm64",
)


@flushes
def test_a_fading_state_ends_at_zero():
    """Nothing comes in, the state loses half of itself at every step: denormal from the seventh on, not zero by itself after twenty."""
    one, coefficient = torch.ones(1, 17, 20), torch.ones(1, 1, 5, 20)
    state, A = torch.full((1, 17, 5), 1e-36), torch.full((17, 5), -0.6931472)
    inputs = {"u": one * 0, "delta": one, "A": A, "B": coefficient, "C": coefficient, "initial_state": state}
    out, last = selective_scan(**inputs, return_last_state=True, backend="cpu")
    assert not last.any() and not out[..., -10:].any()
    assert (out[..., :4] > 0).all()


@flushes
def test_a_fading_state_of_a_decoding_step_ends_at_zero():
    inputs = update_inputs(2, 17, 5, dtype=torch.float32)
    inputs |= {"x": torch.zeros_like(inputs["x"]), "state": torch.full_like(inputs["state"], 1e-39)}
    selective_state_update(**inputs, backend="cpu")
    assert not inputs["state"].any()
    zeros = torch.zeros
    layer = MambaLayer(
        *(None, zeros(34, 8), None, zeros(17, 4), None, zeros(11, 17), zeros(17, 1), None, -torch.ones(17, 5), None),
        *(zeros(8, 17), None, zeros(2, 3, 17), torch.full((2, 17, 5), 1e-39)),
    )
    MambaStep([layer], backend="cpu")(torch.ones(2, 8))
    assert not layer.state.any()


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_denormals_outside_stay(threads):
    """In every thread that ran a kernel: torch's own loops run in the same ones."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        inputs = scan_inputs(4, 64, 40, 5)
        tensors = {k: v.requires_grad_() for k, v in inputs.items() if isinstance(v, torch.Tensor)}
        out = selective_scan(**{**inputs, **tensors}, backend="cpu")
        out.sum().backward()
        denormal = torch.full((1 << 20,), 1e-39)
        assert (denormal * 1.0 == denormal).all() and (denormal != 0).all()
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("channels_last", [False, True])
def test_subnormal_halves_are_numbers(channels_last):
    """They are normal in float32, and must be however a build converts them."""
    u = (torch.arange(2 * 17 * 33, dtype=torch.int16) % 1024).view(torch.float16).reshape(2, 17, 33)
    if channels_last:
        u = u.transpose(1, 2).contiguous().transpose(1, 2)
    ones = torch.ones(2, 1, 1, 33)
    A = torch.zeros(17, 1)
    out = selective_scan(u, torch.ones(2, 17, 33), A, ones, ones, out_dtype=torch.float32, backend="cpu")
    assert torch.equal(out, u.double().cumsum(-1).float()) and out.any()


@pytest.mark.parametrize(
    "call",
    [
        lambda u: selective_scan(**{**scan_inputs(2, 17, 9, 5), "u": u}, backend="cpu"),
        lambda u: causal_conv1d(**{**conv_inputs(2, 17, 9, 4), "x": u}, backend="cpu"),
    ],
)
def test_lazily_negated_tensors_are_refused(call):
    lazy = torch.randn(2, 17, 9, dtype=torch.complex64).conj().imag
    assert lazy.is_neg()
    with pytest.raises(RuntimeError, match=r"negative bit set.*resolve_neg\(\)"):
        call(lazy)
    call(lazy.resolve_neg())
