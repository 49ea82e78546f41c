"""pxby_embed in Triton's interpreter: the oracle in both forms, variants, ids, the sums by key, poisoned margins."""

from __future__ import annotations

import os

import pytest
import torch

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("runs in Triton's interpreter; a real GPU has test_device.py", allow_module_level=True)

from poisoned import Margins, poisoned_allocations  # noqa: E402

from pixelbytes_kernels import pxby_embed, pxby_embed_ref  # noqa: E402
from pixelbytes_kernels.ops.pxby_embed import gpu  # noqa: E402
from pixelbytes_kernels.ops.pxby_embed import triton as triton_path  # noqa: E402
from pixelbytes_kernels.testing import assert_matches, embed_inputs, run  # noqa: E402


def small(batch=2, seqlen=5, vocab=2, dim=12, width=1, **options):
    """Arguments of pxby_embed with few channels: the interpreter counts programs."""
    inputs = embed_inputs(batch, seqlen, vocab, dim, **options)
    cuts = {"emb": (..., slice(width)), "conv_weight": (slice(width), slice(width)), "conv_bias": (slice(width),)}
    for name, cut in cuts.items():
        if inputs[name] is not None:
            inputs[name] = inputs[name][cut].contiguous()
    inputs["proj_weight"] = inputs["proj_weight"][:, : 9 * width].contiguous() * 3
    return inputs


@pytest.fixture(params=["folded", "direct"])
def form(request, monkeypatch):
    """Forces one of the two forms, whatever the sizes."""
    monkeypatch.setattr(gpu, "folded_is_cheaper", lambda *sizes: request.param == "folded")
    return request.param


def check(inputs):
    assert_matches(pxby_embed, pxby_embed_ref, inputs, options={"backend": "triton"})


# D = 7: less than a program's width; D = 70 and 150: tails; 40 tokens of D = 70: several programs, and keys in several runs.
@pytest.mark.parametrize(
    ("batch", "seqlen", "vocab", "dim", "constant_cells"),
    [(1, 1, 3, 7, True), (2, 20, 2, 70, False), (1, 4, 1, 150, True)],
)
def test_oracle(form, batch, seqlen, vocab, dim, constant_cells):
    draws = 3 if batch * seqlen == 1 else 1
    check([embed_inputs(batch, seqlen, vocab, dim, constant_cells=constant_cells, seed=s) for s in range(draws)])


def test_half(form):
    check([small(dtype=torch.float16, seed=s) for s in range(2)])


@pytest.mark.parametrize(
    ("conv", "gate", "bias"), [(True, False, True), (False, True, True), (False, False, True), (True, True, False)]
)
def test_variants(form, conv, gate, bias):
    check(small(conv=conv, gate=gate, bias=bias, width=2))


def test_rows_of_the_mixing_in_tiles(monkeypatch):
    """As with more than 113 channels of an embedding."""
    monkeypatch.setattr(gpu, "folded_is_cheaper", lambda *sizes: True)
    monkeypatch.setattr(triton_path, "mixing_blocks", lambda width: triton_path.MixingBlocks(3, 8, 4))
    check(small(width=2))


@pytest.mark.parametrize("ids", [torch.uint8, torch.int16], ids=str)
def test_ids_are_read_as_they_are(monkeypatch, ids):
    monkeypatch.setattr(gpu, "folded_is_cheaper", lambda *sizes: True)
    inputs = small(ids=ids)
    expected = run(pxby_embed, {**inputs, "tokens": inputs["tokens"].long()}, backend="triton")
    apart = torch.full((5, 4, 3, 3), 99, dtype=ids)  # every other row, batch and sequence exchanged
    apart[:, ::2] = inputs["tokens"].transpose(0, 1)
    flipped = inputs["tokens"].transpose(2, 3).contiguous().transpose(2, 3)
    for tokens in (apart[:, ::2].transpose(0, 1), flipped):
        got = run(pxby_embed, {**inputs, "tokens": tokens}, backend="triton")
        for name, value in expected.items():
            assert torch.equal(got[name], value), name


@pytest.mark.parametrize("bad", [4, -(2**40)])
def test_unknown_id_unchecked(form, bad, monkeypatch):
    """As on a GPU, where the ids are not checked: NaN in that token's row and in every shared gradient, nothing read or written outside."""
    monkeypatch.setattr(gpu, "check_ids", lambda *a: None)
    inputs = small(vocab=4)
    inputs["tokens"][1, 3, 0, 2] = bad
    margins = Margins()
    with poisoned_allocations():
        inside = {k: margins.around(k, v) for k, v in inputs.items()}
        result = run(pxby_embed, inside, backend="triton")
    margins.check()
    rows = result["out0"].isnan().any(-1)
    assert rows.nonzero().tolist() == [[1, 3]]
    assert result["out0"][1, 3].isnan().all()
    for name in ("dproj_weight", "dnorm_weight", "dalpha"):
        assert result[name].isnan().all(), name


def test_unknown_id_checked(form):
    inputs = small(vocab=4)
    inputs["tokens"][1, 3, 0, 2] = 4
    with pytest.raises(IndexError, match=r"id 4 at tokens\[1, 3, 0, 2\] is outside the vocabulary \[0, 4\)"):
        pxby_embed(**inputs, backend="triton")


def test_margins(form):
    inputs = small(vocab=4, dim=18)
    expected = run(pxby_embed, inputs, backend="triton")
    margins = Margins()
    with poisoned_allocations():
        got = run(pxby_embed, {k: margins.around(k, v) for k, v in inputs.items()}, backend="triton")
    margins.check()
    for name, value in expected.items():
        # Products of torch may take another path for another alignment.
        torch.testing.assert_close(got[name], value, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("name", ["emb", "alpha"])
def test_nan_shows(form, name):
    inputs = small(1, 4)
    inputs[name].view(-1)[0] = torch.nan
    expected, got = run(pxby_embed_ref, inputs), run(pxby_embed, inputs, backend="triton")
    assert expected["out0"].isnan().any()
    for key, value in expected.items():
        assert not (value.isnan() & ~got[key].isnan()).any(), key
    if name != "emb":  # the table of an id with NaN in one cell has it in all: more than the reference
        assert torch.equal(got["out0"].isnan(), expected["out0"].isnan())


# Runs of 64 entries: keys within one run, over several, up to the end of one, a run with many keys, unknown keys, a key of every row.
@pytest.mark.parametrize("whole", [True, False])
def test_sums_by_key(whole):
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(150, 20, generator=generator)
    cells = [torch.full((150,), 4), torch.randint(6, 9, (150,), generator=generator), torch.arange(150) % 40 + 9]
    cells[1][:42] = 5  # up to entry 192, where the first cell is whole
    keys = torch.cat([*cells, torch.full((150,), 50)]).to(torch.int16)
    keys[[3, 200, 390]] = 50
    if whole:
        keys[3] = 4
    expected = torch.zeros(51, 20, dtype=torch.float64).index_add_(0, keys.long(), rows.double().repeat(4, 1))[:50]
    with poisoned_allocations():  # most parts are never written, and must not be read
        got = triton_path.sums_by_key(rows, keys, 50, rows.sum(0) if whole else None)
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)
    assert (got[:4] == 0).all()


@pytest.mark.parametrize(("batch", "seqlen"), [(0, 5), (5, 0)])
def test_no_tokens(batch, seqlen):
    result = run(pxby_embed, embed_inputs(batch, seqlen, 20, 12), backend="triton")
    assert result["out0"].shape == (batch, seqlen, 12)
    for name, value in result.items():
        assert torch.equal(value, torch.zeros_like(value)), name


@pytest.mark.parametrize("name", ["emb", "norm_weight"])
def test_only_wanted_gradients(form, name):
    inputs = small()
    all_of_them = run(pxby_embed, inputs, backend="triton")
    inputs[name].requires_grad_()
    out = pxby_embed(**inputs, backend="triton")
    gen = torch.Generator().manual_seed(1)  # the output gradient of `run`
    out.backward(torch.randn(out.shape, generator=gen, dtype=torch.float64).to(torch.bfloat16).to(out.dtype))
    assert torch.equal(inputs[name].grad, all_of_them[f"d{name}"])


def test_expanded_output_gradient():
    inputs = small()
    weights = [v.requires_grad_() for k, v in inputs.items() if k != "tokens"]
    out = pxby_embed(**inputs, backend="triton")
    expanded = torch.autograd.grad(out.sum(), weights, retain_graph=True)
    whole = torch.autograd.grad(out, weights, torch.ones_like(out).contiguous())
    for a, b in zip(expanded, whole, strict=True):
        assert torch.equal(a, b)


def test_autocast_changes_nothing():
    inputs = small()
    expected = run(pxby_embed, inputs, backend="triton")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = run(pxby_embed, inputs, backend="triton")
    for name, value in expected.items():
        assert torch.equal(got[name], value), name
