"""MambaStep: decoding a whole stack token by token, against the same stack run over the sequence."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from kernel_forms import BACKENDS, needs_cpu

from pixelbytes_kernels import MambaLayer, MambaStep, causal_conv1d_ref, mamba_inner_ref, selective_scan_ref

backends = pytest.mark.parametrize("backend", BACKENDS)


def layers(count, batch, dim, inner, dstate=5, rank=2, width=4, *, optional=True, zero_state=True, seed=0):
    gen = torch.Generator().manual_seed(seed)

    def normal(*shape, scale=1.0):
        return torch.randn(*shape, generator=gen) * scale

    return [
        MambaLayer(
            norm=1 + normal(dim, scale=0.1) if optional else None,
            in_proj=normal(2 * inner, dim, scale=dim**-0.5),
            in_proj_bias=normal(2 * inner) if optional else None,
            conv_weight=normal(inner, width),
            conv_bias=normal(inner) if optional else None,
            x_proj=normal(rank + 2 * dstate, inner, scale=inner**-0.5),
            dt_proj=normal(inner, rank, scale=rank**-0.5),
            dt_bias=normal(inner) - 1 if optional else None,
            A=-torch.exp(normal(inner, dstate)),
            D=normal(inner) if optional else None,
            out_proj=normal(dim, inner, scale=inner**-0.5),
            out_proj_bias=normal(dim) if optional else None,
            conv_state=normal(batch, width - 1, inner, scale=0.0 if zero_state else 1.0),
            state=normal(batch, inner, dstate, scale=0.0 if zero_state else 1.0),
        )
        for _ in range(count)
    ]


def copied(stack):
    return [layer._replace(conv_state=layer.conv_state.clone(), state=layer.state.clone()) for layer in stack]


def whole(x, stack, eps):
    """The stack over a sequence in float64. x (batch, seqlen, dim)."""
    for layer in stack:
        w = MambaLayer(*(None if t is None else t.double() for t in layer))
        e = x if w.norm is None else x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * w.norm
        xz = F.linear(e, w.in_proj, w.in_proj_bias).transpose(1, 2)
        x = x + mamba_inner_ref(
            xz, w.conv_weight, w.conv_bias, w.x_proj, w.dt_proj, w.out_proj, w.out_proj_bias, w.A, D=w.D,
            delta_bias=w.dt_bias,
        )  # fmt: skip
    return x


@backends
@pytest.mark.parametrize("optional", [True, False])
@pytest.mark.parametrize(
    ("count", "batch", "dim", "inner", "dstate", "rank", "width"),
    [
        (1, 1, 1, 1, 1, 1, 2),
        (3, 2, 20, 40, 5, 3, 4),
        (2, 1, 64, 128, 16, 4, 4),
        (2, 2, 20, 40, 16, 3, 4),
        (2, 3, 27, 81, 64, 6, 3),
    ],
)
def test_steps_are_the_whole_sequence(backend, optional, count, batch, dim, inner, dstate, rank, width):
    eps, stack = 1e-5, layers(count, batch, dim, inner, dstate, rank, width, optional=optional)
    x = torch.randn(batch, 9, dim, generator=torch.Generator().manual_seed(5))
    expected = whole(x.double(), stack, eps)
    step = MambaStep(stack, eps, backend=backend)
    got = torch.stack([step(token.clone()) for token in x.unbind(1)], 1)
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


@backends
def test_states_after_the_steps(backend):
    """Those of the convolution and of the scan of the first layer after the whole sequence."""
    (layer,) = layers(1, 2, 20, 40)
    x = torch.randn(2, 6, 20)
    step = MambaStep([layer], backend=backend)
    for token in x.unbind(1):
        step(token.clone())
    e = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * layer.norm
    u, _ = F.linear(e, layer.in_proj, layer.in_proj_bias).transpose(1, 2).chunk(2, 1)
    u, conv_state = causal_conv1d_ref(u, layer.conv_weight, layer.conv_bias, "silu", return_final_states=True)
    dt, B, C = F.linear(u.transpose(1, 2), layer.x_proj).split([2, 5, 5], -1)
    delta, B, C = F.linear(dt, layer.dt_proj).transpose(1, 2), B.transpose(1, 2), C.transpose(1, 2)
    _, state = selective_scan_ref(u, delta, layer.A, B, C, None, None, layer.dt_bias, True, True)
    torch.testing.assert_close(layer.conv_state.transpose(1, 2), conv_state, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer.state, state, rtol=1e-4, atol=1e-4)


@needs_cpu
def test_threads_and_repetition_change_nothing():
    stack = layers(3, 3, 64, 128, 16, 4, zero_state=False)
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(5))
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 1, 2, 3, 4):
            torch.set_num_threads(threads)
            mine = copied(stack)
            step = MambaStep(mine, backend="cpu")
            out = [step(x.clone()) for _ in range(3)]
            results.append([*out, *(layer.state for layer in mine), *(layer.conv_state for layer in mine)])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for a, b in zip(other, results[0], strict=True):
            assert torch.equal(a, b)


@backends
def test_nan_shows(backend):
    stack = layers(2, 2, 20, 40, zero_state=False)
    stack[0].state[1, 3, 2] = torch.nan
    out = MambaStep(stack, backend=backend)(torch.randn(2, 20))
    assert out[1].isnan().all()
    assert out[0].isfinite().all()


@backends
def test_x_is_replaced(backend):
    x = torch.randn(2, 20)
    assert MambaStep(layers(1, 2, 20, 40), backend=backend)(x) is x


@backends
@pytest.mark.parametrize(
    "x", [torch.zeros(3, 20), torch.zeros(2, 20).double(), torch.zeros(2, 40)[:, ::2], torch.zeros(20)]
)
def test_bad_x(backend, x):
    step = MambaStep(layers(1, 2, 20, 40), backend=backend)
    with pytest.raises(ValueError, match=r"mamba_step: x must be a contiguous float32 tensor of shape \(2, 20\)"):
        step(x)


@needs_cpu
def test_x_elsewhere():
    with pytest.raises(ValueError, match="on the CPU, got torch.float32 .* on meta"):
        MambaStep(layers(1, 2, 20, 40), backend="cpu")(torch.zeros(2, 20, device="meta"))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"in_proj": torch.zeros(79, 20)}, ValueError, r"layer 1 in_proj must have shape \(two_inner=80, dim=20\)"),
        ({"x_proj": torch.zeros(11, 40)}, ValueError, r"layer 1 x_proj must have shape \(rows=12, inner=40\)"),
        ({"state": torch.zeros(3, 40, 5)}, ValueError, "layer 1 state must have shape"),
        ({"A": torch.zeros(40, 5).double()}, TypeError, "layer 1 A must be float32, got torch.float64"),
        (
            {"state": torch.zeros(40, 2, 5).transpose(0, 1)},
            ValueError,
            "layer 1 conv_state and state must be contiguous",
        ),
    ],
)
def test_bad_layers(change, error, message):
    first, second = layers(2, 2, 20, 40)
    with pytest.raises(error, match=f"mamba_step: {message}"):
        MambaStep([first, second._replace(**change)])


def test_no_layers_and_bad_backends():
    with pytest.raises(ValueError, match="mamba_step: needs at least one layer"):
        MambaStep([])
    with pytest.raises(RuntimeError, match="mamba_step: backend 'cuda'"):
        MambaStep(layers(1, 2, 20, 40), backend="cuda")
    with pytest.raises(ValueError, match="mamba_step: conv_weight must have a width of 2, 3 or 4, got 5"):
        MambaStep(layers(1, 2, 20, 40, width=5))
