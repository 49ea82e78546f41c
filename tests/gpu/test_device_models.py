"""On a real GPU: every model trains in every precision with every usable GPU backend, and generates."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import Subset

import pixelbytes_kernels as pk
from pixelbytes.dataset import PxByDataset, load_embedded
from pixelbytes.generate import Prompt, generate
from pixelbytes.models import create, from_pretrained
from pixelbytes.tokenizer import PixelBytesTokenizer
from pixelbytes.train import Trainer

GPU = torch.cuda.is_available()
WHY = pk.available_backends()
BACKENDS = [
    pytest.param(name, marks=pytest.mark.skipif(not (GPU and WHY[name][0]), reason=f"needs a GPU: {WHY[name][1]}"))
    for name in ("cuda", "triton")
]
BF16 = GPU and torch.cuda.get_device_capability() >= (8, 0)
PRECISIONS = ["off", "fp16", pytest.param("bf16", marks=pytest.mark.skipif(not BF16, reason="needs sm_80+"))]
MODELS = {
    "mamba": ("mamba", {"dim": 32, "d_state": 16, "depth": 2, "bidirectional": False, "norm": True}),
    "mamba, both ways": ("mamba", {"dim": 81, "d_state": 64, "depth": 1, "norm": True}),
    "rnn": ("rnn", {"embedding_dim": 16, "hidden_dim": 64, "depth": 2}),
    "rnn, both ways": ("rnn", {"embedding_dim": 32, "hidden_dim": 64, "bidirectional": True, "pxby": True}),
    "attention": ("attention", {"embedding_dim": 32, "hidden_dim": 64, "num_layers": 2, "pxby": True}),
    "attention, both ways": ("attention", {"embedding_dim": 16, "hidden_dim": 64, "bidirectional": True}),
}
backends = pytest.mark.parametrize("backend", BACKENDS)
models = pytest.mark.parametrize("name", MODELS)
tokenizer = PixelBytesTokenizer()


def make(name):
    torch.manual_seed(0)
    family, config = MODELS[name]
    return create(family, vocab_size=tokenizer.vocab_size, **config)


def one_batch(causal):
    """Eight windows of 96 tokens."""
    rows = load_embedded(tokenizer, limit=8).rows
    return Subset(PxByDataset(rows, 96, 96, "all" if causal else "last"), range(8))


def trainer(model, folder, amp, epochs, device="cuda"):
    batch = one_batch(model.causal)
    return Trainer(
        model, batch, None, 8, 3e-3, epochs, val_dataset=batch, eval_every=epochs, amp=amp, device=device, run_dir=folder,
        quiet=True,
    )  # fmt: skip


@backends
@models
@pytest.mark.parametrize("amp", PRECISIONS)
def test_learns_one_batch(name, amp, backend, tmp_path):
    with pk.use_backend(backend):
        run = trainer(make(name), tmp_path, amp, 30)
        run.train()
    losses = torch.tensor(run.train_losses)
    assert losses.isfinite().all()
    assert losses[-5:].mean() < 0.8 * losses[:5].mean()
    assert run.history[-1]["val_loss"] < losses[0]


@backends
@models
def test_generates_what_the_cpu_does(name, backend, tmp_path):
    """From the weights of three steps: greedy ids are the same as on the CPU, where two scores are not all but equal."""
    with pk.use_backend(backend):
        trainer(make(name), tmp_path, "off", 3).train()
    model = from_pretrained(tmp_path / "last")
    options = {"temperature": 0, "max_tokens": 60, "max_side": 5, "max_text": 20, "context": 32}
    prompts = [Prompt(), Prompt(text="red")]
    expected = generate(model, tokenizer, prompts, **options)
    with pk.use_backend(backend):
        got = generate(model.cuda(), tokenizer, prompts, **options)
    for a, b in zip(got, expected, strict=True):
        assert len(a.ids) > 3
        assert (a.ids[:8] == b.ids[:8]).all()


@backends
def test_trained_steps_are_reproducible(backend, tmp_path):
    """The kernels have no atomics: two runs of a Mamba end in the same bits."""
    weights = []
    for folder in ("a", "b"):
        with pk.use_backend(backend):
            run = trainer(make("mamba, both ways"), tmp_path / folder, "off", 3)
            run.train()
        weights.append(run.model.state_dict())
    for key, value in weights[0].items():
        assert torch.equal(value, weights[1][key]), key


@backends
@models
def test_compiles(name, backend, tmp_path):
    """The loss of a whole model, forward and backward, without a graph break in the kernels."""
    model = make(name).cuda()
    x, target = (t.cuda()[None].expand(2, *t.shape) for t in one_batch(model.causal)[0])
    torch._dynamo.reset()
    with pk.use_backend(backend):
        logits, wanted = torch.compile(model.logits_for, backend="aot_eager")(x, target)
        plain, _ = model.logits_for(x, target)
        torch.testing.assert_close(logits, plain, rtol=1e-3, atol=1e-3)
        parameters = [p for p in model.parameters() if p.requires_grad]
        got = torch.autograd.grad(torch.nn.functional.cross_entropy(logits, wanted), parameters)
        expected = torch.autograd.grad(torch.nn.functional.cross_entropy(plain, wanted), parameters)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-4)
