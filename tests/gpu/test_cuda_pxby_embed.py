"""pxby_embed in CUDA C++, run by the emulator: the oracle in both forms, every variant, hot and constant ids, thread orders."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from emulated import emulated, run_in_every_order

from pixelbytes_kernels import pxby_embed, pxby_embed_ref
from pixelbytes_kernels.ops.pxby_embed import cuda, gpu
from pixelbytes_kernels.testing import assert_matches, embed_inputs, run


@pytest.fixture(params=[True, False], ids=["table", "direct"])
def form(request):
    """Both forms at any size; the sizes of these tests would choose the second."""
    with mock.patch.object(gpu, "folded_is_cheaper", lambda *sizes: request.param):
        yield request.param


@pytest.fixture
def table():
    with mock.patch.object(gpu, "folded_is_cheaper", lambda *sizes: True):
        yield


def check(inputs, **shared):
    with emulated():
        assert_matches(pxby_embed, pxby_embed_ref, inputs, options={"backend": "cuda"}, **shared)


# Widths: whole packets on few lanes, on all lanes, padded lanes, eight packets a lane, no packets (81 is upstream's); too wide for a table.
@pytest.mark.parametrize("dim", [16, 96, 256, 300, 81, 301])
def test_matches_the_oracle(form, dim):
    check(embed_inputs(2, 9, 20, dim, seed=dim))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("dim", [64, 81])
def test_16_bits(form, dim, dtype):
    check([embed_inputs(2, 8, 20, dim, dtype=dtype, seed=s) for s in range(3)])


@pytest.mark.parametrize("conv", [True, False])
@pytest.mark.parametrize("gate", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_variants(form, conv, gate, bias):
    check(embed_inputs(1, 12, 20, 32, conv=conv, gate=gate, bias=bias))


@pytest.mark.parametrize("ids", [torch.uint8, torch.int8, torch.int16, torch.int32], ids=str)
def test_ids_of_any_dtype_and_layout(table, ids):
    inputs = embed_inputs(2, 10, 100, 32, ids=ids)
    inputs["tokens"] = inputs["tokens"].permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)
    check(inputs)


# More tokens than groups of lanes, keys in several runs, one id nearly everywhere, one cell constant, ids that never occur.
def test_hot_ids_over_many_runs(table):
    inputs = embed_inputs(2, 150, 12, 16, constant_cells=True)
    hot = torch.rand(inputs["tokens"].shape, generator=torch.Generator().manual_seed(1)) < 0.7
    inputs["tokens"] = inputs["tokens"].masked_fill(hot, 0).clamp(max=9)
    with mock.patch.object(cuda, "multiprocessors", lambda _: 1), mock.patch.object(cuda, "WARPS", 1):
        check(inputs)


def test_wide_keys(table):
    check(embed_inputs(1, 5, 4000, 16))


@pytest.mark.parametrize("dim", [32, 81, 300])
def test_every_thread_order_gives_the_same_bits(form, dim):
    run_in_every_order(pxby_embed, embed_inputs(2, 20, 30, dim))


# On a GPU ids are not checked: one outside the vocabulary must read nothing and show in its own row, and in gradients.
@pytest.mark.parametrize("bad", [-1, 20, 2**31 - 1])
def test_unknown_ids_give_nan(form, bad):
    inputs = embed_inputs(1, 6, 20, 32, ids=torch.int32)
    inputs["tokens"][0, 2, 0, 1] = bad
    with mock.patch.object(gpu, "check_ids", lambda *_: None), emulated():
        got = run(pxby_embed, inputs, backend="cuda")
    rows = got["out0"].isnan().all(-1)[0]
    assert rows.tolist() == [i == 2 for i in range(6)]
    assert not got["out0"][:, [0, 1, 3, 4, 5]].isnan().any()
    assert got["demb"].isnan().any()


def test_partial_gradients(form):
    inputs = embed_inputs(1, 10, 20, 32)
    names = [k for k, v in inputs.items() if v is not None and v.is_floating_point()]
    with emulated():
        expected = run(pxby_embed, inputs, backend="cuda")
        for name in names:
            leaf = inputs[name].clone().requires_grad_()
            out = pxby_embed(**{**inputs, name: leaf}, backend="cuda")
            gen = torch.Generator().manual_seed(1)
            grad = torch.randn(out.shape, generator=gen, dtype=torch.float64).to(torch.bfloat16).to(out.dtype)
            (found,) = torch.autograd.grad(out, leaf, grad)
            assert torch.equal(found, expected[f"d{name}"]), name


# The (N, D) tensors: out written once; dout read, dpre written once, and read once for every cell that varies.
def test_bytes_moved(table):
    tokens, dim = 64, 32
    inputs = embed_inputs(1, tokens, 20, dim)
    with emulated() as module:
        module.emulator_reset_counts()
        run(pxby_embed, inputs, backend="cuda")
        rows = module.emulator_counts()
    size = tokens * dim * 4
    sums: dict[str, list[float]] = {}
    for kernel, shape, _, read, written in rows:
        if shape in ((1, tokens, dim), (tokens, dim)):
            total = sums.setdefault(kernel, [0, 0])
            total[0] += read / size
            total[1] += written / size
    varying = 5
    assert sums == {"embed_forward": [0, 1], "embed_backward": [1, 1], "embed_key_parts": [varying, 0]}


def test_empty_tensors():
    for shape in ((0, 4), (2, 0)):
        inputs = embed_inputs(*shape, 10, 16)
        with emulated():
            got = run(pxby_embed, inputs, backend="cuda")
        assert got["out0"].shape == (*shape, 16)
        assert all(not got[f"d{name}"].any() for name in ("emb", "proj_weight", "norm_bias"))
