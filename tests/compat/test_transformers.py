"""Mamba and FalconMamba of transformers on these kernels against their own slow path: training, scoring, generation."""

from __future__ import annotations

import importlib
import sys

import pytest
import torch

from pixelbytes_kernels import compat
from pixelbytes_kernels.testing import error

transformers = pytest.importorskip("transformers", reason="needs transformers")
from pixelbytes_kernels.compat import transformers as kernels  # noqa: E402

MODELS = ("Mamba", "FalconMamba")
BOUND = 2e-5  # two stacks in float32 in another order of additions; a wrong term shows in the first digits


def modelling(name: str):
    module = {"Mamba": "mamba", "FalconMamba": "falcon_mamba"}[name]
    return sys.modules[f"transformers.models.{module}.modeling_{module}"]


def model(name: str):
    assert not compat.is_installed()  # else transformers would have picked the stand-ins as it was imported
    config = getattr(transformers, name + "Config")(
        vocab_size=50,
        hidden_size=32,
        state_size=8,
        num_hidden_layers=2,
        pad_token_id=0,
        eos_token_id=49,
        bos_token_id=1,
    )
    torch.manual_seed(0)
    made = getattr(transformers, name + "ForCausalLM")(config)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return made


@pytest.fixture
def counted(monkeypatch):
    """How often each of the five functions ran, once `use_kernels` has put them in place."""
    counts: dict[str, int] = {}

    def counting(name, function):
        def run(*arguments, **options):
            counts[name] = counts.get(name, 0) + 1
            return function(*arguments, **options)

        return run

    wrapped = {
        module: {name: counting(name, f) for name, f in functions.items()}
        for module, functions in kernels.FUNCTIONS.items()
    }
    monkeypatch.setattr(kernels, "FUNCTIONS", wrapped)
    yield counts
    kernels.restore()


def test_restore_puts_back_the_same_functions():
    for name in MODELS:
        model(name)

    def functions(name):
        return [getattr(modelling(name), f) for f in kernels.FUNCTIONS[modelling(name).__name__]]

    before = {name: functions(name) for name in MODELS}
    kernels.use_kernels()
    kernels.use_kernels()
    try:
        for name in MODELS:
            assert not set(before[name]) & set(functions(name))
    finally:
        kernels.restore()
    kernels.restore()
    assert before == {name: functions(name) for name in MODELS}


@pytest.mark.parametrize("name", MODELS)
def test_training_step(name, counted):
    made = model(name).train()
    ids = torch.randint(2, 49, (2, 33), generator=torch.Generator().manual_seed(0))

    def step():
        made.zero_grad()
        found = made(ids, labels=ids)
        found.loss.backward()
        return found.logits.detach(), {n: p.grad.clone() for n, p in made.named_parameters()}

    logits, grads = step()
    assert not counted
    kernels.use_kernels()
    our_logits, our_grads = step()
    assert counted == {"mamba_inner_fn": 2}
    assert error(our_logits, logits) <= BOUND
    for parameter, grad in grads.items():
        assert error(our_grads[parameter], grad) <= BOUND, parameter


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("padded", [False, True])
def test_generation(name, padded, counted):
    """Prefill and steps, with left-padded prompts too."""
    made = model(name).eval()
    ids = torch.randint(2, 49, (2, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    if padded:
        ids[1, :3], mask[1, :3] = 0, 0

    def generate():
        return made.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=10,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )

    slow = generate()
    kernels.use_kernels()
    ours = generate()
    assert torch.equal(slow.sequences, ours.sequences)
    assert error(torch.stack(ours.logits), torch.stack(slow.logits)) <= BOUND
    assert counted.keys() == {
        "causal_conv1d_fn",
        "causal_conv1d_update",
        "mamba_selective_scan",
        "mamba_selective_state_update",
    }
    assert counted["mamba_selective_scan"] == 2 and counted["mamba_selective_state_update"] == 2 * (
        slow.sequences.shape[1] - 8
    )


def test_a_release_without_these_functions_is_refused(monkeypatch):
    model("Mamba")
    monkeypatch.delattr(modelling("Mamba"), "mamba_selective_scan")
    before = modelling("Mamba").causal_conv1d_fn
    with pytest.raises(RuntimeError, match="mamba_selective_scan"):
        kernels.use_kernels()
    assert modelling("Mamba").causal_conv1d_fn is before


def test_install_before_transformers_serves_mamba_too(monkeypatch):
    """The other way: transformers finds the stand-ins, as it would find the real packages, where its module is imported."""
    model("Mamba")
    name = modelling("Mamba").__name__
    package, _, child = name.rpartition(".")
    monkeypatch.setattr(sys.modules[package], child, modelling("Mamba"))  # put back behind the test, like the next
    monkeypatch.delitem(sys.modules, name)
    compat.install()
    try:
        fresh = importlib.import_module(name)
    finally:
        compat.uninstall()
    config = transformers.MambaConfig(vocab_size=20, hidden_size=16, state_size=4, num_hidden_layers=1)
    made = fresh.MambaForCausalLM(config).train()
    ids = torch.arange(12)[None]
    nodes, todo = set(), [made(ids, labels=ids).loss.grad_fn]
    while todo:
        node = todo.pop()
        nodes.add(type(node).__name__)
        todo += [below for below, _ in node.next_functions if below is not None]
    assert "InnerBackward" in nodes
