"""On a real GPU: every op and option of every usable GPU backend against the oracle, and what only a GPU has.

Inputs are made on the CPU and moved inside of the tested call, so that the oracle and the plain loop stay there.
"""

from __future__ import annotations

import pytest
import torch

import pixelbytes_kernels as pk
from pixelbytes_kernels.testing import (
    assert_matches,
    conv_inputs,
    embed_inputs,
    error,
    inner_inputs,
    run,
    scan_inputs,
    update_inputs,
)

GPU = torch.cuda.is_available()
WHY = {name: pk.available_backends()[name] for name in ("cuda", "triton")}
BACKENDS = [
    pytest.param(
        name,
        marks=pytest.mark.skipif(
            not (GPU and usable), reason=f"needs a GPU and the {name} backend: {reason if GPU else 'no GPU here'}"
        ),
    )
    for name, (usable, reason) in WHY.items()
]
backends = pytest.mark.parametrize("backend", BACKENDS)
BF16 = GPU and torch.cuda.get_device_capability() >= (8, 0)
DTYPES = [
    torch.float32,
    torch.float16,
    pytest.param(torch.bfloat16, marks=pytest.mark.skipif(not BF16, reason="needs sm_80+")),
]
OWN = ("u", "delta", "A", "B", "C", "D", "delta_bias")


def on_gpu(op, backend, **options):
    """`op` for tensors on the CPU, run on the GPU; gradients flow through."""

    def moved(**inputs):
        there = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
        out = op(**there, backend=backend, **options)
        return tuple(o.cpu() for o in out) if isinstance(out, tuple) else out.cpu()

    return moved


def check(op, inputs, backend, **shared):
    assert_matches(on_gpu(op, backend), getattr(pk, f"{op.__name__}_ref"), inputs, **shared)


def two_directions(own=(), *sizes, **kwargs):
    inputs, other = scan_inputs(*sizes, **kwargs), scan_inputs(*sizes, **kwargs, seed=7)
    return {**inputs, **{f"{n}_rev": other[n] for n in own if other[n] is not None}}


# ---- numbers --------------------------------------------------------------------------------------

SCAN_SIZES = [(1, 1, 1), (17, 31, 5), (32, 32, 16), (81, 33, 16), (40, 100, 64), (3, 65, 256), (200, 257, 16)]


@backends
@pytest.mark.parametrize("reverse", [False, True], ids=["up", "down"])
@pytest.mark.parametrize(("dim", "seqlen", "dstate"), SCAN_SIZES)
def test_scan_sizes(backend, reverse, dim, seqlen, dstate):
    inputs = [scan_inputs(2, dim, seqlen, dstate, seed=s) for s in range(3)]
    check(pk.selective_scan, inputs, backend, reverse=reverse, return_last_state=True)


@backends
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scan_dtypes_and_layouts(backend, dtype, channels_last):
    inputs = scan_inputs(2, 35, 70, 16, dtype=dtype, channels_last=channels_last)
    check(pk.selective_scan, inputs, backend, return_last_state=True)
    check(pk.bidirectional_selective_scan, inputs, backend, scale=0.5)


@backends
@pytest.mark.parametrize(
    "kwargs",
    [
        {"D": False, "z": False, "delta_bias": False, "delta_softplus": False},
        {"z": False, "initial_state": True},
        {"groups": 4, "seq_idx": True, "initial_state": True},
        {"constant": "B"},
        {"constant": "C", "groups": 2},
        {"constant": "BC", "seq_idx": True},
    ],
    ids=str,
)
def test_scan_options(backend, kwargs):
    inputs = scan_inputs(2, 36, 70, 5, **kwargs)
    check(pk.selective_scan, inputs, backend, return_last_state=True)
    check(pk.selective_scan, inputs, backend, reverse=True)
    inputs.pop("initial_state", None)
    check(pk.bidirectional_selective_scan, inputs, backend)


@backends
@pytest.mark.parametrize("own", [(), ("delta_bias",), ("u", "delta"), OWN], ids="+".join)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_both_directions(backend, own, dtype):
    check(pk.bidirectional_selective_scan, two_directions(own, 2, 81, 100, 16, dtype=dtype), backend)


@backends
def test_one_direction_constant(backend):
    inputs, other = scan_inputs(2, 6, 20, 3), scan_inputs(2, 6, 20, 3, constant="B", seed=7)
    check(pk.bidirectional_selective_scan, {**inputs, "B_rev": other["B"]}, backend)


@backends
@pytest.mark.parametrize(("dtype", "out_dtype"), [(torch.float16, torch.float32), (torch.float32, torch.float16)])
def test_out_dtype(backend, dtype, out_dtype):
    check(pk.bidirectional_selective_scan, scan_inputs(2, 20, 40, 16, dtype=dtype), backend, out_dtype=out_dtype)


@backends
def test_large_scan(backend):
    """Several tiles, chunks and blocks of time, many rows: the size of a small model's layer."""
    inputs = scan_inputs(4, 256, 500, 16, channels_last=True)
    check(pk.bidirectional_selective_scan, inputs, backend)


@backends
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("width", [2, 3, 4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_conv(backend, dtype, width, channels_last):
    inputs = conv_inputs(2, 33, 70, width, dtype=dtype, channels_last=channels_last, initial_states=True)
    check(pk.causal_conv1d, inputs, backend, activation="silu", return_final_states=True)
    inputs = conv_inputs(2, 33, 70, width, dtype=dtype, channels_last=channels_last, seq_idx=True, bias=False)
    for reverse in (False, True):
        check(pk.causal_conv1d, inputs, backend, reverse=reverse)


@backends
@pytest.mark.parametrize("ids", [torch.uint8, torch.int16, torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_embed(backend, dtype, ids):
    check(pk.pxby_embed, embed_inputs(2, 100, dtype=dtype, ids=ids), backend)


@backends
@pytest.mark.parametrize("conv", [False, True])
@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize(("vocab", "dim"), [(113, 81), (320, 256)])
def test_embed_forms(backend, vocab, dim, conv, gate):
    check(pk.pxby_embed, embed_inputs(2, 150, vocab, dim, conv=conv, gate=gate, constant_cells=gate), backend)


@backends
@pytest.mark.parametrize("second", [False, True], ids=["shared", "own"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mixers(backend, dtype, second):
    # The plain loop needs one dtype throughout; its error in 16 bits is a matter of luck in a single draw.
    draws = [inner_inputs(2, 48, 70, 16, 3, 24, dtype=dtype, second=second, seed=s) for s in range(1, 6)]
    inputs = [{k: v.to(dtype) for k, v in draw.items()} for draw in draws]
    check(pk.bimamba_inner, inputs, backend)
    if not second:
        check(pk.mamba_inner, inputs, backend)


@backends
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_decoding_steps(backend, dtype):
    for inputs in (update_inputs(3, 40, 16, dtype=dtype), update_inputs(3, 40, 16, dtype=dtype, groups=2, z=False)):
        states = {}
        for where in ("cpu", "cuda"):
            there = {k: v.to(where) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
            there["state"] = there["state"].clone()
            kind = {"backend": "reference" if where == "cpu" else backend}
            states[where] = [pk.selective_state_update(**there, **kind).cpu(), there["state"].cpu()]
        for got, expected in zip(states["cuda"], states["cpu"], strict=True):
            assert error(got, expected) <= 8 * torch.finfo(got.dtype).eps
    x, weight = conv_inputs(3, 40, 1, 4, dtype=dtype)["x"][..., 0], torch.randn(40, 4)
    results = []
    for where in ("cpu", "cuda"):
        state = torch.arange(3 * 40 * 3, dtype=torch.float32).view(3, 40, 3).sin().to(dtype).to(where)
        kind = {"backend": "reference" if where == "cpu" else backend}
        out = pk.causal_conv1d_update(x.to(where), state, weight.to(where), activation="silu", **kind)
        results.append((out.cpu(), state.cpu()))
    assert torch.equal(results[0][1], results[1][1])
    assert error(results[1][0], results[0][0]) <= 8 * torch.finfo(dtype).eps


@backends
@pytest.mark.parametrize("shape", [(0, 5), (3, 0)])
def test_empty(backend, shape):
    batch, seqlen = shape
    result = run(on_gpu(pk.selective_scan, backend), scan_inputs(batch, 6, seqlen, 3))
    assert result["out0"].shape == (batch, 6, seqlen)
    assert all(not v.any() for k, v in result.items() if k != "out0")
    assert (
        pk.causal_conv1d(torch.zeros(batch, 6, seqlen).cuda(), torch.zeros(6, 4).cuda(), backend=backend).numel() == 0
    )


# ---- what only a GPU has --------------------------------------------------------------------------

OPS = {
    "selective_scan": (pk.selective_scan, lambda: scan_inputs(2, 40, 70, 16)),
    "bidirectional_selective_scan": (pk.bidirectional_selective_scan, lambda: scan_inputs(2, 40, 70, 16)),
    "causal_conv1d": (pk.causal_conv1d, lambda: conv_inputs(2, 40, 70)),
    "pxby_embed": (pk.pxby_embed, lambda: embed_inputs(2, 300)),
    "bimamba_inner": (pk.bimamba_inner, lambda: inner_inputs(2, 40, 70, 16, 3, 24)),
}
ops = pytest.mark.parametrize("name", OPS)


@backends
@ops
def test_bitwise_equal_runs(backend, name):
    op, inputs = OPS[name]
    first = run(on_gpu(op, backend), inputs())
    for _ in range(3):
        again = run(on_gpu(op, backend), inputs())
        for key, value in first.items():
            assert torch.equal(again[key], value), key


def leaves_of(inputs):
    return {
        k: v.cuda().requires_grad_(v.is_floating_point()) if isinstance(v, torch.Tensor) else v
        for k, v in inputs.items()
    }


def step(op, backend, leaves):
    """Output and gradients."""
    out = op(**leaves, backend=backend)
    wanted = [v for v in leaves.values() if isinstance(v, torch.Tensor) and v.requires_grad]
    return [out, *torch.autograd.grad(out.float().square().mean(), wanted)]


@backends
@ops
def test_another_stream(backend, name):
    """Work on a stream of its own, behind a long wait on it: a launch on the wrong stream would read too early."""
    op, inputs = OPS[name]
    leaves = leaves_of(inputs())
    expected = step(op, backend, leaves)
    torch.cuda.synchronize()
    late = {k: torch.zeros_like(v) if isinstance(v, torch.Tensor) and v.requires_grad else v for k, v in leaves.items()}
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        for k, v in late.items():
            if isinstance(v, torch.Tensor) and leaves[k].requires_grad:
                v.copy_(leaves[k].detach())
                v.requires_grad_()
        got = step(op, backend, late)
    stream.synchronize()
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


@backends
@ops
def test_cuda_graph(backend, name):
    op, inputs = OPS[name]
    leaves = leaves_of(inputs())
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            step(op, backend, leaves)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(op, backend, leaves)
    with torch.no_grad():
        for v in leaves.values():
            if isinstance(v, torch.Tensor) and v.requires_grad:
                v.mul_(0.5)
    graph.replay()
    torch.cuda.synchronize()
    for a, b in zip(captured, step(op, backend, leaves), strict=True):
        assert torch.equal(a, b)


@backends
@ops
@pytest.mark.parametrize("dtype", [torch.float16, DTYPES[2]], ids=str)
def test_autocast(backend, name, dtype):
    """float32 weights and activations of a lower precision in one call: no mismatch, and no more than its rounding off."""
    op, inputs = OPS[name]
    inputs = inputs()
    low = {
        k: v.to(dtype).float() if isinstance(v, torch.Tensor) and v.is_floating_point() else v
        for k, v in inputs.items()
    }
    activations = ("u", "delta", "z", "B", "C", "x", "xz")
    mixed = leaves_of({k: v.to(dtype) if k in activations else v for k, v in low.items()})
    with torch.autocast("cuda", dtype):
        got = step(op, backend, mixed)
    expected = step(op, backend, leaves_of(low))
    for a, b in zip(got, expected, strict=True):
        assert error(a, b) <= 30 * torch.finfo(dtype).eps


@backends
@ops
def test_compiled(backend, name):
    op, inputs = OPS[name]
    torch._dynamo.reset()
    leaves = leaves_of(inputs())
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    for a, b in zip(step(compiled, backend, leaves), step(op, backend, leaves), strict=True):
        assert error(a, b) <= 1e-4


@backends
def test_float64_is_refused_by_name(backend):
    inputs = {
        k: v.cuda() if isinstance(v, torch.Tensor) else v
        for k, v in scan_inputs(1, 4, 4, 2, dtype=torch.float64).items()
    }
    with pytest.raises(RuntimeError, match="has no float64"):
        pk.selective_scan(**inputs, backend=backend)
    assert torch.equal(pk.selective_scan(**inputs), pk.selective_scan(**inputs, backend="torch"))


@pytest.mark.skipif(not GPU or BF16, reason="needs a GPU below sm_80")
def test_bfloat16_names_float16():
    inputs = {
        k: v.cuda() if isinstance(v, torch.Tensor) else v
        for k, v in scan_inputs(1, 4, 4, 2, dtype=torch.bfloat16).items()
    }
    with pytest.raises(RuntimeError, match="use float16"):
        pk.selective_scan(**inputs)


@backends
def test_self_test(backend):
    from pixelbytes_kernels.__main__ import checks

    for check_op in checks(backend).values():
        check_op()


@backends
def test_offsets_beyond_two_to_the_31(backend):
    """A channels-last view whose last row starts more than 2**31 elements in."""
    free, _ = torch.cuda.mem_get_info()
    rows = 2**31 + 4096
    if free < 2.5 * rows:
        pytest.skip(reason="needs 6 GB of GPU memory")
    base = torch.zeros(rows, dtype=torch.float16, device="cuda")
    seqlen, dim = 20, 16
    u = base.as_strided((2, dim, seqlen), (2**31, 1, dim))
    u.copy_(torch.randn(2, dim, seqlen))
    small = {
        k: v.cuda() if isinstance(v, torch.Tensor) else v
        for k, v in scan_inputs(2, dim, seqlen, 4, dtype=torch.float16).items()
    }
    got = pk.selective_scan(**{**small, "u": u}, backend=backend)
    assert torch.equal(got, pk.selective_scan(**{**small, "u": u.clone()}, backend=backend))
