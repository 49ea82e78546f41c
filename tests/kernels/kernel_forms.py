"""What the kernel tests share: which backends are here, and comparisons that need no tolerance."""

from __future__ import annotations

import pytest
import torch

from pixelbytes_kernels import available_backends
from pixelbytes_kernels.testing import run

CPU_USABLE, CPU_REASON = available_backends()["cpu"]
needs_cpu = pytest.mark.skipif(not CPU_USABLE, reason=CPU_REASON)
BACKENDS = [pytest.param("cpu", marks=needs_cpu), "torch"]
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


def assert_same(got, expected):
    """Bitwise equal results of `run`."""
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert got[name].dtype == value.dtype, name
        assert torch.equal(got[name], value), name


def assert_close(got, expected):
    """Results of `run` in float64, up to another order of additions."""
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        top = value.abs().max().clamp(min=1) if value.numel() else 1.0
        torch.testing.assert_close(got[name] / top, value / top, rtol=0, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


def assert_same_for_any_number_of_threads(op, inputs, **options):
    """Also over two runs with one thread."""
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 1, 2, 3, 4):
            torch.set_num_threads(threads)
            results.append(run(op, inputs, **options))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert_same(other, results[0])


def assert_no_uninitialised_memory(op, inputs, **options):
    """The same result where torch.empty returns NaN."""
    expected = run(op, inputs, **options)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()  # or this test would see nothing
        got = run(op, inputs, **options)
    finally:
        torch.use_deterministic_algorithms(False)
    assert_same(got, expected)


def assert_same_when_compiled(op, inputs, compiler="aot_eager", **options):
    """torch.compile of the whole call, forward and backward, against eager."""
    torch._dynamo.reset()
    compiled = torch.compile(lambda **kw: op(**kw, **options), fullgraph=True, backend=compiler)
    expected, got = run(op, inputs, **options), run(compiled, inputs)
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def assert_nonfinite_like(op, reference, inputs, **options):
    """NaN and infinities of the outputs where the reference has them; NaN in gradients at least where it has it."""
    expected, got = run(reference, inputs, **options), run(op, inputs, **options)
    for name, value in expected.items():
        if name.startswith("out"):
            assert torch.equal(got[name].isnan(), value.isnan()), f"{name}: NaN elsewhere"
            for sign in (1, -1):
                assert torch.equal(got[name] == sign * torch.inf, value == sign * torch.inf), f"{name}: Inf elsewhere"
        else:
            missing = value.isnan() & ~got[name].isnan()
            assert not missing.any(), f"{name}: {int(missing.sum())} NaN swallowed"
    return expected


def gradcheck(op, inputs, names=None, **options):
    names = names or [k for k, v in inputs.items() if isinstance(v, torch.Tensor) and v.is_floating_point()]

    def call(*leaves):
        return op(**{**inputs, **dict(zip(names, leaves, strict=True))}, **options)

    return torch.autograd.gradcheck(call, [inputs[n].detach().requires_grad_() for n in names])
