"""pxby_embed: every backend and both of the kernel's forms against the float64 oracle; ids, determinism, compile,
errors."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import library

from pixelbytes_kernels import available_backends, pxby_embed, pxby_embed_ref
from pixelbytes_kernels.ops.pxby_embed import cpu as cpu_path
from pixelbytes_kernels.ops.pxby_embed import torch_path
from pixelbytes_kernels.ops.pxby_embed.formulation import folded_is_cheaper
from pixelbytes_kernels.testing import assert_matches, embed_inputs, run

CPU_USABLE, CPU_REASON = available_backends()["cpu"]
needs_cpu = pytest.mark.skipif(not CPU_USABLE, reason=CPU_REASON)
BACKENDS = [pytest.param("cpu", marks=needs_cpu), "torch"]
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


@pytest.fixture(params=["folded", "direct"])
def form(request, monkeypatch):
    """Forces one of the two forms, whatever the sizes."""
    for module in (cpu_path, torch_path):
        monkeypatch.setattr(module, "folded_is_cheaper", lambda *sizes: request.param == "folded")
    return request.param


def weights_of(inputs):
    return [v.requires_grad_() for k, v in inputs.items() if k != "tokens" and v is not None]


# D=81 and V=320: rows that end in a part of a vector; 1030 tokens: past the chunk of 512; B=L=1: one token; D=7: less
# than a vector.
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("batch", "seqlen", "vocab", "dim"), [(2, 37, 113, 64), (2, 515, 113, 81), (3, 105, 320, 256), (1, 1, 5, 7)]
)
def test_oracle(backend, form, dtype, batch, seqlen, vocab, dim):
    inputs = embed_inputs(batch, seqlen, vocab, dim, dtype=dtype)
    assert_matches(pxby_embed, pxby_embed_ref, inputs, options={"backend": backend})


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("conv", [True, False])
@pytest.mark.parametrize("gate", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_variants(backend, form, conv, gate, bias):
    inputs = embed_inputs(3, 50, 40, 48, conv=conv, gate=gate, bias=bias, constant_cells=False)
    assert_matches(pxby_embed, pxby_embed_ref, inputs, options={"backend": backend})


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_no_gate_is_an_even_gate(backend):
    without = embed_inputs(2, 9, gate=False)
    even = {**without, "alpha": torch.zeros(1, 1, 3, 3)}
    torch.testing.assert_close(pxby_embed(**without, backend=backend), pxby_embed(**even, backend=backend))


@needs_cpu
@pytest.mark.parametrize("ids", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64], ids=str)
def test_ids_are_read_as_they_are(form, ids):
    inputs = embed_inputs(3, 70, 100, 32, ids=ids)
    expected = run(pxby_embed, {**inputs, "tokens": inputs["tokens"].long()}, backend="cpu")
    apart = torch.full((70, 6, 3, 3), 99, dtype=ids)  # every other row, batch and sequence exchanged
    apart[:, ::2] = inputs["tokens"].transpose(0, 1)
    flipped = inputs["tokens"].transpose(2, 3).contiguous().transpose(2, 3)
    for tokens in (inputs["tokens"], apart[:, ::2].transpose(0, 1), flipped):
        got = run(pxby_embed, {**inputs, "tokens": tokens}, backend="cpu")
        for name, value in expected.items():
            assert torch.equal(got[name], value), name


@needs_cpu
def test_weights_of_any_layout(form):
    inputs = embed_inputs(2, 40, 50, 40)
    expected = run(pxby_embed, inputs, backend="cpu")
    odd = {k: v if k == "tokens" else v.movedim(0, -1).contiguous().movedim(-1, 0) for k, v in inputs.items()}
    got = run(pxby_embed, odd, backend="cpu")
    for name, value in expected.items():
        assert torch.equal(got[name], value), name


@needs_cpu
@pytest.mark.parametrize("constant_cells", [True, False])
def test_bitwise_equal_for_any_number_of_threads(form, constant_cells):
    inputs = embed_inputs(3, 401, 113, 81, constant_cells=constant_cells)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 1, 2, 3, 4):
            torch.set_num_threads(threads)
            results.append(run(pxby_embed, inputs, backend="cpu"))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for name, value in results[0].items():
            assert torch.equal(other[name], value), name


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize(("conv", "gate"), [(True, True), (False, True), (True, False)])
def test_gradcheck(backend, form, conv, gate):
    inputs = embed_inputs(1, 7, 5, 6, dtype=torch.float64, conv=conv, gate=gate)
    names = [k for k, v in inputs.items() if k != "tokens" and v is not None]

    def call(*weights):
        return pxby_embed(**{**inputs, **dict(zip(names, weights, strict=True))}, backend=backend)

    assert torch.autograd.gradcheck(call, weights_of(inputs))


@needs_cpu
@pytest.mark.parametrize(("conv", "gate"), [(True, True), (False, False)])
def test_opcheck(conv, gate):
    import pixelbytes_kernels.ops.pxby_embed.autograd  # noqa: F401, registers the op

    inputs = embed_inputs(2, 20, 30, 16, conv=conv, gate=gate, ids=torch.uint8)
    weights_of(inputs)
    library.opcheck(torch.ops.pixelbytes.pxby_embed, (*inputs.values(), 1e-5, "cpu"))


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_whole(backend):
    inputs = embed_inputs(2, 20, 30, 16)
    compiled = torch.compile(lambda **kw: pxby_embed(**kw, backend=backend), fullgraph=True, backend="aot_eager")
    expected, got = run(pxby_embed, inputs, backend=backend), run(compiled, inputs)
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, msg=name)


@pytest.mark.parametrize("conv", [True, False])
def test_compiles_with_sizes_that_vary(conv):
    shapes = [(2, 7), (3, 11), (5, 20)]
    compiled = torch.compile(pxby_embed, fullgraph=True, dynamic=True, backend="eager")
    for batch, seqlen in shapes:
        inputs = embed_inputs(batch, seqlen, 30, 16, conv=conv)
        torch.testing.assert_close(compiled(**inputs), pxby_embed(**inputs))


@needs_cpu
def test_backward_saves_the_inputs_alone():
    inputs = embed_inputs(4, 100)
    weights = weights_of(inputs)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        pxby_embed(**inputs, backend="cpu")
    assert set(saved) <= {inputs["tokens"].data_ptr(), *(w.data_ptr() for w in weights)}


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize(("batch", "seqlen"), [(0, 5), (5, 0)])
def test_no_tokens(backend, batch, seqlen):
    result = run(pxby_embed, embed_inputs(batch, seqlen, 20, 12), backend=backend)
    assert result["out0"].shape == (batch, seqlen, 12)
    for name, value in result.items():
        assert torch.equal(value, torch.zeros_like(value)), name


@needs_cpu
def test_only_wanted_gradients_exist(form):
    inputs = embed_inputs(2, 30)
    all_of_them = run(pxby_embed, inputs, backend="cpu")
    inputs["emb"].requires_grad_()
    out = pxby_embed(**inputs, backend="cpu")
    gen = torch.Generator().manual_seed(1)  # the output gradient of `run`
    out.backward(torch.randn(out.shape, generator=gen, dtype=torch.float64).to(torch.bfloat16).to(out.dtype))
    assert torch.equal(inputs["emb"].grad, all_of_them["demb"])
    assert inputs["proj_weight"].grad is None


@needs_cpu
def test_expanded_output_gradient(form):
    inputs = embed_inputs(2, 30)
    weights = weights_of(inputs)
    out = pxby_embed(**inputs, backend="cpu")
    expanded = torch.autograd.grad(out.sum(), weights, retain_graph=True)
    whole = torch.autograd.grad(out, weights, torch.ones_like(out).contiguous())
    for a, b in zip(expanded, whole, strict=True):
        assert torch.equal(a, b)


@needs_cpu
def test_autocast_changes_nothing():
    inputs = embed_inputs(2, 30)
    expected = run(pxby_embed, inputs, backend="cpu")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = run(pxby_embed, inputs, backend="cpu")
    for name, value in expected.items():
        assert torch.equal(got[name], value), name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [113, -1, 2**31 + 5, -(2**40)])
def test_id_outside_the_vocabulary(backend, form, bad):
    inputs = embed_inputs(3, 200)
    inputs["tokens"][1, 150, 0, 2] = bad
    inputs["tokens"][2, 0, 0, 0] = bad + 1
    with pytest.raises(IndexError, match=rf"id {bad} at tokens\[1, 150, 0, 2\] is outside the vocabulary \[0, 113\)"):
        pxby_embed(**inputs, backend=backend)


@needs_cpu
def test_id_outside_the_vocabulary_in_the_backward(form):
    inputs = embed_inputs(3, 200)
    weights_of(inputs)
    out = pxby_embed(**inputs, backend="cpu")
    inputs["tokens"].numpy()[2, 199, 1, 1] = 500  # behind autograd's back
    with pytest.raises(IndexError, match=r"id 500 at tokens\[2, 199, 1, 1\]"):
        out.sum().backward()


@needs_cpu
def test_largest_ids_of_narrow_dtypes(form):
    inputs = embed_inputs(1, 20, 300, 16, ids=torch.uint8)
    inputs["tokens"].fill_(255)
    expected = pxby_embed_ref(**inputs)
    torch.testing.assert_close(pxby_embed(**inputs, backend="cpu"), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["emb", "conv_weight", "alpha", "proj_weight", "norm_weight", "norm_bias"])
def test_nan_shows(backend, form, name):
    inputs = embed_inputs(2, 60, 10, 16)
    inputs[name].view(-1)[0] = float("nan")
    reference, got = pxby_embed_ref(**inputs).isnan(), pxby_embed(**inputs, backend=backend).isnan()
    assert reference.any()
    assert torch.equal(got, reference)


DIGEST = """
import hashlib, sys, torch
torch.set_num_threads(1)
torch.use_deterministic_algorithms(True)  # fills what torch.empty returns with NaN
from pixelbytes_kernels import pxby_embed
from pixelbytes_kernels.testing import embed_inputs, run
for size in ((2, 300, 113, 81), (1, 9, 40, 20)):
    for name, value in run(pxby_embed, embed_inputs(*size), backend="cpu").items():
        assert not value.isnan().any(), name
        print(name, hashlib.sha256(value.numpy().tobytes()).hexdigest())
"""


@needs_cpu
def test_uninitialised_memory_is_never_seen():
    """The same bits whatever malloc hands out: glibc fills it with 0xfe or 0x01."""
    outputs = []
    for perturb in ("1", "254"):
        env = {**os.environ, "MALLOC_PERTURB_": perturb, "MALLOC_MMAP_THRESHOLD_": str(1 << 30)}
        done = subprocess.run([sys.executable, "-c", DIGEST], env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        outputs.append(done.stdout)
    assert len(outputs[0].splitlines()) == 18
    assert outputs[0] == outputs[1]


@needs_cpu
def test_double_backward_is_refused(form):
    inputs = embed_inputs(1, 5, 10, 12)
    weights = weights_of(inputs)
    (grad,) = torch.autograd.grad(pxby_embed(**inputs, backend="cpu").square().sum(), weights[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_reference_is_twice_differentiable():
    inputs = embed_inputs(1, 2, 4, 3, dtype=torch.float64)
    names = [k for k in inputs if k in ("alpha", "proj_weight")]

    def call(*weights):
        return pxby_embed(**{**inputs, **dict(zip(names, weights, strict=True))}, backend="reference")

    assert torch.autograd.gradgradcheck(call, [inputs[k].requires_grad_() for k in names], atol=1e-4)


def test_form_follows_the_sizes():
    assert not folded_is_cheaper(1, 113, 9, 64)
    assert folded_is_cheaper(1000, 113, 9, 64)
    assert folded_is_cheaper(1000, 320, 28, 256)
    assert not folded_is_cheaper(1000, 100_000, 28, 256)  # a table that few of the tokens would use


@pytest.mark.parametrize(
    ("name", "change", "error", "message"),
    [
        ("tokens", lambda t: t[:, :, 0], ValueError, r"tokens must have shape \(batch, seqlen, rows=3, columns=3\)"),
        ("tokens", lambda t: t.float(), TypeError, "tokens must be an integer tensor, got torch.float32"),
        ("emb", lambda t: t.long(), TypeError, "emb must be float32"),
        ("emb", lambda t: t[:, :4], ValueError, "conv_weight must have shape"),
        ("conv_weight", lambda t: t.double(), TypeError, "conv_weight must be torch.float32 like emb"),
        ("conv_weight", lambda t: None, ValueError, "conv_bias must be None where conv_weight is None"),
        ("alpha", lambda t: t[0, 0], ValueError, "alpha must have shape"),
        ("proj_weight", lambda t: t[:, 1:], ValueError, r"proj_weight must have shape \(dim, inputs=81\)"),
        ("proj_bias", lambda t: t[1:], ValueError, r"proj_bias must have shape \(dim=64\)"),
        ("norm_weight", lambda t: t[1:], ValueError, "norm_weight must have shape"),
    ],
)
def test_bad_arguments(name, change, error, message):
    inputs = embed_inputs(2, 3)
    inputs[name] = change(inputs[name])
    with pytest.raises(error, match=message):
        pxby_embed(**inputs)


def test_unknown_backend():
    with pytest.raises(ValueError, match="backend"):
        pxby_embed(**embed_inputs(1, 2), backend="quick")
