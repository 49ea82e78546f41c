"""The Mamba block under mamba_ssm's names: parameters, both paths, decoding, Vim's forms, checkpoints, training."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pixelbytes.modules import Mamba as OwnMamba
from pixelbytes_kernels import causal_conv1d_ref, selective_scan_ref
from pixelbytes_kernels.compat.generation import InferenceParams
from pixelbytes_kernels.compat.mamba_simple import Mamba
from pixelbytes_kernels.testing import error

F64 = torch.float64
# float32 kernels behind four matrix products against float64: errors of a few products of 64 terms.
BOUND = 256 * torch.finfo(torch.float32).eps

INNER, RANK, STATE, MODEL = 48, 2, 16, 24  # of Mamba(24)
MIXER = {
    "A_log": (INNER, STATE),
    "D": (INNER,),
    "in_proj.weight": (2 * INNER, MODEL),
    "conv1d.weight": (INNER, 1, 4),
    "conv1d.bias": (INNER,),
    "x_proj.weight": (RANK + 2 * STATE, INNER),
    "dt_proj.weight": (INNER, RANK),
    "dt_proj.bias": (INNER,),
    "out_proj.weight": (MODEL, INNER),
}
V1 = {**MIXER, "A_b_log": (INNER, STATE)}
V2 = {**V1, "D_b": (INNER,)} | {
    name.replace(".", "_b."): shape for name, shape in MIXER.items() if name.startswith(("conv1d", "x_proj", "dt_proj"))
}


def block(seed=0, **options):
    """A block with parameters away from their initial values, so that no two directions are alike by chance."""
    torch.manual_seed(seed)
    made = Mamba(MODEL, **options)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return made


def inputs(batch=2, seqlen=13):
    return torch.randn(batch, seqlen, MODEL, generator=torch.Generator().manual_seed(1))


def direction(p, xz, suffix="", A="A_log", downwards=False):
    """One direction up to the gate, from the definitions, by parameter names; `downwards` flips what the scan reads."""
    x, z = xz.chunk(2, dim=1)
    u = causal_conv1d_ref(x, p[f"conv1d{suffix}.weight"].squeeze(1), p[f"conv1d{suffix}.bias"], "silu")
    rows = u.transpose(1, 2) @ p[f"x_proj{suffix}.weight"].T
    dt, B, C = (r.transpose(1, 2) for r in rows.split([RANK, STATE, STATE], dim=-1))
    sequences = [u, (dt.transpose(1, 2) @ p[f"dt_proj{suffix}.weight"].T).transpose(1, 2), B, C, z]
    if downwards:
        sequences = [s.flip(-1) for s in sequences]
    u, delta, B, C, z = sequences
    y = selective_scan_ref(u, delta, -torch.exp(p[A]), B, C, p["D" + suffix], z, p[f"dt_proj{suffix}.bias"], True)
    return y.flip(-1) if downwards else y


def by_hand(made, hidden, kind="none"):
    p = {name: value.detach().double() for name, value in made.state_dict().items()}
    xz = (hidden.double() @ p["in_proj.weight"].T).transpose(1, 2)
    y = direction(p, xz)
    if kind == "v1":
        y = y + direction(p, xz, A="A_b_log", downwards=True)
    if kind == "v2":
        y = y + direction(p, xz.flip(-1), suffix="_b", A="A_b_log").flip(-1)
        y = y / 2 if made.if_devide_out else y
    out = F.linear(y.transpose(1, 2), p["out_proj.weight"])
    return out if made.init_layer_scale is None else out * p["gamma"]


@pytest.mark.parametrize(("kind", "wanted"), [("none", MIXER), ("v1", V1), ("v2", V2)])
def test_state_dict_names_and_shapes(kind, wanted):
    found = {name: tuple(value.shape) for name, value in Mamba(MODEL, bimamba_type=kind).state_dict().items()}
    assert found == wanted
    scaled = Mamba(MODEL, bias=True, conv_bias=False, init_layer_scale=0.1).state_dict()
    assert scaled.keys() == (MIXER.keys() | {"gamma", "in_proj.bias", "out_proj.bias"}) - {"conv1d.bias"}


def test_initial_values():
    made = Mamba(MODEL, dt_init="constant", dt_scale=2.0, dt_min=0.01, dt_max=0.02)
    assert torch.equal(made.A_log, torch.arange(1.0, STATE + 1).log().repeat(INNER, 1)) and torch.equal(
        made.D, torch.ones(INNER)
    )
    assert made.A_log._no_weight_decay and made.D._no_weight_decay and made.dt_proj.bias._no_reinit
    assert torch.equal(made.dt_proj.weight, torch.full((INNER, RANK), 2 * RANK**-0.5))
    dt = F.softplus(made.dt_proj.bias)
    assert dt.min() >= 0.01 * 0.999 and dt.max() <= 0.02 * 1.001
    half = Mamba(MODEL, dtype=torch.bfloat16)
    assert half.in_proj.weight.dtype == torch.bfloat16 and half.A_log.dtype == half.D.dtype == torch.float32


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_forward(fast, bias):
    made = block(use_fast_path=fast, bias=bias)
    hidden = inputs()
    if bias:
        with torch.no_grad():
            made.in_proj.bias.zero_()  # by_hand has no outer biases
            made.out_proj.bias.zero_()
    assert error(made(hidden).detach(), by_hand(made, hidden)) <= BOUND


@pytest.mark.parametrize("kind", ["v1", "v2"])
@pytest.mark.parametrize("divide", [False, True])
def test_vim_forms(kind, divide):
    made = block(bimamba_type=kind, if_devide_out=divide, init_layer_scale=0.5)
    hidden = inputs()
    assert error(made(hidden).detach(), by_hand(made, hidden, kind)) <= BOUND


def test_both_paths_give_the_same_gradients():
    fast = block()
    slow = copy.deepcopy(fast)
    slow.use_fast_path = False
    grads = []
    for made in (fast, slow):
        (made(inputs()) ** 2).sum().backward()
        grads.append({name: p.grad for name, p in made.named_parameters()})
    assert grads[0].keys() == MIXER.keys()
    for name, grad in grads[0].items():
        assert error(grad, grads[1][name]) <= BOUND, name


@pytest.mark.parametrize("prompt", [1, 2, 7])
def test_decoding_equals_the_whole_sequence(prompt):
    """Also with prompts shorter than the convolution."""
    made, hidden = block(layer_idx=3), inputs()
    params = InferenceParams(max_seqlen=13, max_batch_size=2)
    with torch.no_grad():
        outs = [made(hidden[:, :prompt], inference_params=params)]
        for t in range(prompt, 13):
            params.seqlen_offset = t
            outs.append(made(hidden[:, t : t + 1], inference_params=params))
    assert list(params.key_value_memory_dict) == [3]
    assert error(torch.cat(outs, dim=1), by_hand(made, hidden)) <= BOUND


def test_step_and_cache():
    made, hidden = block(init_layer_scale=0.5), inputs()
    conv_state, ssm_state = made.allocate_inference_cache(2, 99)
    assert conv_state.shape == (2, INNER, 4) and ssm_state.shape == (2, INNER, STATE)
    assert made.allocate_inference_cache(2, 99, dtype=torch.bfloat16)[1].dtype == torch.bfloat16
    outs = []
    for t in range(13):
        out, same_conv, same_ssm = made.step(hidden[:, t : t + 1], conv_state, ssm_state)
        assert same_conv is conv_state and same_ssm is ssm_state and out.shape == (2, 1, MODEL)
        outs.append(out)
    assert error(torch.cat(outs, dim=1).detach(), by_hand(made, hidden)) <= BOUND


@pytest.mark.parametrize(
    ("options", "call", "word"),
    [
        ({"d_conv": 5}, None, "d_conv=5"),
        ({"dt_init": "zeros"}, None, "dt_init"),
        ({"bimamba_type": "v3"}, None, "bimamba_type"),
        ({"bimamba_type": "v2", "use_fast_path": False}, lambda m: m(inputs()), "use_fast_path"),
        (
            {"bimamba_type": "v1", "layer_idx": 0},
            lambda m: m(inputs(), inference_params=InferenceParams(9, 9)),
            "inference_params",
        ),
        ({"bimamba_type": "v2"}, lambda m: m.step(inputs(seqlen=1), *m.allocate_inference_cache(2, 9)), "step"),
        ({}, lambda m: m.step(inputs(seqlen=2), *m.allocate_inference_cache(2, 9)), "one token"),
    ],
)
def test_what_is_not_served_is_named(options, call, word):
    with pytest.raises(NotImplementedError, match=word):
        made = Mamba(MODEL, **options)
        assert call is not None, "the constructor should have raised"
        call(made)


class Block(nn.Module):
    """The residual block of state-spaces/mamba-* models: norm, mixer."""

    def __init__(self, layer_idx):
        super().__init__()
        self.norm = nn.RMSNorm(MODEL, eps=1e-5)
        self.mixer = Mamba(MODEL, layer_idx=layer_idx)

    def forward(self, x, inference_params=None):
        return x + self.mixer(self.norm(x), inference_params=inference_params)


class Backbone(nn.Module):
    def __init__(self, layers, vocab):
        super().__init__()
        self.embedding = nn.Embedding(vocab, MODEL)
        self.layers = nn.ModuleList(Block(i) for i in range(layers))
        self.norm_f = nn.RMSNorm(MODEL, eps=1e-5)

    def forward(self, ids, inference_params=None):
        x = self.embedding(ids)
        for layer in self.layers:
            x = layer(x, inference_params)
        return self.norm_f(x)


class LanguageModel(nn.Module):
    """Third-party code as it is written against mamba_ssm, with the names of its checkpoints."""

    def __init__(self, layers=2, vocab=40):
        super().__init__()
        self.backbone = Backbone(layers, vocab)
        self.lm_head = nn.Linear(MODEL, vocab, bias=False)
        self.lm_head.weight = self.backbone.embedding.weight

    def forward(self, ids, inference_params=None):
        return self.lm_head(self.backbone(ids, inference_params))


def checkpoint(layers=2, vocab=40):
    """What a state-spaces/mamba-* file holds, by name and shape, in small."""
    gen = torch.Generator().manual_seed(7)
    names = {
        "backbone.embedding.weight": (vocab, MODEL),
        "backbone.norm_f.weight": (MODEL,),
        "lm_head.weight": (vocab, MODEL),
    }
    for i in range(layers):
        names[f"backbone.layers.{i}.norm.weight"] = (MODEL,)
        names |= {f"backbone.layers.{i}.mixer.{name}": shape for name, shape in MIXER.items()}
    tensors = {name: torch.randn(*shape, generator=gen) * 0.2 for name, shape in names.items()}
    tensors["lm_head.weight"] = tensors["backbone.embedding.weight"]
    return tensors


def test_checkpoints_load_strictly(tmp_path):
    """Through a file, into the stand-in and into the model package's own block, with the same result."""
    torch.save(checkpoint(), tmp_path / "pytorch_model.bin")
    tensors = torch.load(tmp_path / "pytorch_model.bin", weights_only=True)
    model = LanguageModel()
    model.load_state_dict(tensors, strict=True)
    prefix = "backbone.layers.1.mixer."
    own = OwnMamba(MODEL)
    own.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}, strict=True)
    mixer, hidden = model.backbone.layers[1].mixer, inputs()
    assert torch.equal(mixer(hidden), own(hidden))
    assert error(mixer(hidden).detach(), by_hand(mixer, hidden)) <= BOUND


def test_a_loaded_model_generates_what_it_scores():
    model = LanguageModel()
    model.load_state_dict(checkpoint())
    ids = torch.randint(0, 40, (2, 5), generator=torch.Generator().manual_seed(0))
    params = InferenceParams(max_seqlen=12, max_batch_size=2)
    with torch.no_grad():
        logits = model(ids, params)[:, -1:]
        params.seqlen_offset = 5
        for _ in range(6):
            ids = torch.cat([ids, logits.argmax(-1)], dim=1)
            logits = model(ids[:, -1:], params)
            params.seqlen_offset += 1
            assert error(logits, model(ids)[:, -1:]) <= 4 * BOUND  # a softmax-free stack of two blocks and a head


def test_training_loop_learns():
    """An optimizer, gradient clipping, a scheduler-free loop: the loss of a repeating row falls far below chance."""
    torch.manual_seed(0)
    model = LanguageModel()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    ids = torch.arange(24).remainder(6).repeat(4, 1)
    losses = []
    for _ in range(25):
        logits = model(ids[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * math.log(40)
