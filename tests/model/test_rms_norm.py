"""RMSNorm with its own gradient against torch's, and what it keeps for the backward."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pixelbytes.modules import RMSNorm


def pair(width=24, dtype=torch.float64, eps=None):
    ours, theirs = RMSNorm(width, eps=eps, dtype=dtype), nn.RMSNorm(width, eps=eps, dtype=dtype)
    gen = torch.Generator().manual_seed(0)
    with torch.no_grad():
        ours.weight.copy_(torch.randn(width, generator=gen))
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def results(norm, x, grad):
    x = x.clone().requires_grad_()
    out = norm(x)
    return (out, *torch.autograd.grad(out, (x, norm.weight), grad))


@pytest.mark.parametrize("shape", [(2, 7, 24), (24,), (1, 1, 24), (0, 5, 24)], ids=str)
@pytest.mark.parametrize("eps", [None, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_is_torchs(shape, eps, dtype):
    gen = torch.Generator().manual_seed(1)
    x, grad = (torch.randn(shape, generator=gen).to(dtype) for _ in range(2))
    ours, theirs = pair(dtype=dtype, eps=eps)
    # a few roundings of sums of 24
    tolerance = {torch.float32: 1e-6, torch.float64: 1e-14, torch.bfloat16: 1e-2}[dtype]
    for got, expected in zip(results(ours, x, grad), results(theirs, x, grad), strict=True):
        assert got.dtype == expected.dtype
        torch.testing.assert_close(got, expected, rtol=10 * tolerance, atol=tolerance)


def test_strided_rows():
    """x as a transposed view, its gradient too."""
    gen = torch.Generator().manual_seed(1)
    x, grad = (torch.randn(3, 24, 5, generator=gen, dtype=torch.float64).transpose(1, 2) for _ in range(2))
    ours, theirs = pair()
    for got, expected in zip(results(ours, x, grad), results(theirs, x, grad), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-13, atol=1e-14)


def test_gradcheck():
    ours, _ = pair(5, eps=1e-3)
    x = torch.randn(2, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).requires_grad_()
    names = dict(ours.named_parameters())
    assert torch.autograd.gradcheck(
        lambda x, w: torch.func.functional_call(ours, {"weight": w}, (x,)), (x, *names.values())
    )


def test_keeps_x_and_a_number_a_row():
    ours, _ = pair(24, torch.float32)
    x = torch.randn(4, 50, 24).requires_grad_()
    kept = {}
    hook = lambda t: kept.__setitem__(t.data_ptr(), t.numel()) or t  # noqa: E731
    with torch.autograd.graph.saved_tensors_hooks(hook, lambda t: t):
        ours(x)
    assert sum(kept.values()) == x.numel() + 4 * 50 + 24


def test_compiles_whole():
    torch._dynamo.reset()
    ours, _ = pair(24, torch.float32)
    x, grad = torch.randn(2, 7, 24), torch.randn(2, 7, 24)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    for got, expected in zip(results(compiled, x, grad), results(ours, x, grad), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
