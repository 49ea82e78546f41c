"""The models: shapes, causality, what may be a target, decoding, files."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from model_forms import BIDIRECTIONAL, CAUSAL, FORMS, make

from pixelbytes.models import (
    BysMamba,
    MambaConfig,
    SimpleAttentionModel,
    SimpleSeqModel,
    create,
    from_pretrained,
    load_weights,
)


def random_windows(batch=2, seqlen=7, seed=0):
    return torch.randint(0, 113, (batch, seqlen, 3, 3), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)


@pytest.mark.parametrize("name", FORMS)
def test_logits_and_gradients(name):
    model, x = make(name), random_windows()
    assert model(x).shape == (2, 7, 113)
    loss, n = model.loss(x, torch.tensor([5, 112]))
    assert n == 2
    loss.backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert torch.isfinite(parameter.grad).all(), parameter_name
        assert parameter.grad.abs().max() > 0, parameter_name


@pytest.mark.parametrize("name", FORMS)
def test_only_causal_models_ignore_what_follows(name):
    model, x = make(name).eval(), random_windows()
    other = x.clone()
    other[:, 4:] = random_windows(seed=1)[:, 4:]
    change = (model(x) - model(other)).abs().amax(dim=(0, 2))  # (seqlen,)
    assert change[4:].min() > 1e-4
    if model.causal:
        assert change[:4].max() == 0
    else:
        assert change[:4].max() > 1e-5


@pytest.mark.parametrize("name", BIDIRECTIONAL)
def test_every_position_with_a_bidirectional_model_is_refused(name):
    with pytest.raises(ValueError, match="leak"):
        make(name).loss(random_windows(), torch.zeros(2, 7, dtype=torch.long))


@pytest.mark.parametrize("name", CAUSAL)
def test_loss_of_all_positions_is_the_mean_over_targets(name):
    model, x = make(name), random_windows()
    target = torch.randint(0, 113, (2, 7), generator=torch.Generator().manual_seed(2))
    target[1, 3:] = -100
    loss, n = model.loss(x, target)
    assert n == 10
    torch.testing.assert_close(loss, F.cross_entropy(model(x).flatten(0, 1), target.flatten(), ignore_index=-100))
    nothing, n = model.loss(x, torch.full((2, 7), -100))
    assert (nothing.item(), n) == (0, 0)


@pytest.mark.parametrize("name", FORMS)
def test_one_target_runs_the_head_on_one_position(name):
    model, x = make(name).eval(), random_windows()
    head = model.lm_head if isinstance(model, BysMamba) else model.fc
    seen = []
    head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape))
    loss, _ = model.loss(x, torch.tensor([1, 2]))
    assert seen == [(2, 16)]
    torch.testing.assert_close(loss, F.cross_entropy(model(x)[:, -1], torch.tensor([1, 2])))


@pytest.mark.parametrize("name", CAUSAL)
def test_steps_equal_the_whole_forward(name):
    model, x = make(name).eval(), random_windows()
    state, logits = model.init_state(2), []
    for t in range(7):
        out, state = model.step(x[:, t], state)
        logits.append(out)
    # Sums in another order: a few float32 roundings of logits near 1.
    torch.testing.assert_close(torch.stack(logits, 1), model(x), rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", [*BIDIRECTIONAL, "attention"])
def test_steps_of_other_models_recompute_the_window(name):
    model, x = make(name).eval(), random_windows(seqlen=7)
    state = model.init_state(2, context=4)
    for t in range(7):
        out, state = model.step(x[:, t], state)
    torch.testing.assert_close(out, model(x[:, -4:])[:, -1])
    if not model.causal:  # the first steps see null windows before, as in training
        out, _ = model.step(x[:, 0], model.init_state(2, context=4))
        torch.testing.assert_close(out, model(torch.cat([torch.zeros_like(x[:, :3]), x[:, :1]], 1))[:, -1])


@pytest.mark.parametrize("name", ["attention", "attention-bi"])
def test_attention_knows_the_order_of_its_input(name):
    model, x = make(name).eval(), random_windows()
    swapped = x[:, [1, 0, 2, 3, 4, 5, 6]]
    assert (model(x)[:, -1] - model(swapped)[:, -1]).abs().max() > 1e-4


def test_attention_takes_the_width_third_and_saves_no_map():
    assert SimpleAttentionModel(113, 16, 64).settings["hidden_dim"] == 64
    model, x = SimpleAttentionModel(113, 4, 16), random_windows(1, 64)
    largest = 0

    def note(tensor):
        nonlocal largest
        largest = max(largest, tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model.loss(x, torch.tensor([1]))
    assert largest < 64 * 64 * 4  # a map of 4 heads
    with pytest.raises(ValueError, match="hidden_dim must be a multiple"):
        SimpleAttentionModel(113, 4, 18)


def test_sizes_are_upstreams():
    def count(model):
        return sum(p.numel() for p in model.parameters())

    assert count(SimpleSeqModel(113, 16, 64)) == 62_913
    # Ten Mamba of width 64 (32,640 each), the head, and the embedding of the paper's Algorithm 1 with 9 channels.
    assert count(BysMamba(MambaConfig(dim=64, d_state=16, depth=8, vocab_size=113))) == 326_400 + 7_232 + 7_140


def test_parameters_have_the_names_of_the_originals():
    names = set(BysMamba(MambaConfig(dim=8, depth=1)).state_dict())
    block = ("A_log", "D", "in_proj.weight", "conv1d.weight", "conv1d.bias", "x_proj.weight", "dt_proj.weight")
    for stage in ("in_mamba", "layers.0", "out_mamba"):
        assert {f"{stage}.{key}" for key in (*block, "dt_proj.bias", "out_proj.weight")} <= names
    embedding = {"alpha", "linear_embedding.weight", "patch_embedding.weight", "projection.bias", "norm.weight"}
    assert {f"pxby_embedding.{key}" for key in embedding} <= names
    assert MambaConfig(dim=8).vocab_size == 113


@pytest.mark.parametrize("name", FORMS)
def test_saved_models_come_back(name, tmp_path):
    model, x = make(name).eval(), random_windows()
    model.save_pretrained(tmp_path / "m")
    assert sorted(p.name for p in (tmp_path / "m").iterdir()) == ["config.json", "model.safetensors"]
    for loaded in (from_pretrained(tmp_path / "m"), type(model).from_pretrained(tmp_path / "m")):
        assert type(loaded) is type(model)
        assert torch.equal(loaded.eval()(x), model(x))


def test_a_checkpoint_of_the_first_version_loads(tmp_path):
    original = SimpleSeqModel(113, 16, 64)
    weights = {f"_orig_mod.{key}": value for key, value in original.state_dict().items()}
    optimizer = torch.optim.AdamW(original.parameters()).state_dict()
    path = tmp_path / "best_model_unnamed_unnamed.pth"
    torch.save({"epoch": 7, "model_state_dict": weights, "optimizer_state_dict": optimizer}, path)
    torch.manual_seed(1)
    model = SimpleSeqModel(113, 16, 64)
    assert load_weights(model, path)["epoch"] == 7
    assert torch.equal(model(random_windows()), original(random_windows()))


def test_damaged_files_are_named(tmp_path):
    model = make("rnn")
    model.save_pretrained(tmp_path)
    weights, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    whole = weights.read_bytes()
    for damage in (b"", b"garbage", whole[: len(whole) // 2]):
        weights.write_bytes(damage)
        with pytest.raises(ValueError, match=r"model\.safetensors.*damaged"):
            from_pretrained(tmp_path)
    (tmp_path / "x.pth").write_bytes(b"garbage")
    with pytest.raises(ValueError, match=r"x\.pth.*damaged"):
        load_weights(model, tmp_path / "x.pth")
    weights.write_bytes(whole)
    for damage in ("{", "[]", '{"model": "rnn"}', '{"model": "Unknown", "config": {}}'):
        config.write_text(damage)
        with pytest.raises(ValueError, match=r"config\.json"):
            from_pretrained(tmp_path)
    config.write_text(json.dumps({"model": "SimpleSeqModel", "config": {"vocab_size": 113, "nonsense": 1}}))
    with pytest.raises(ValueError, match=r"config\.json.*do not fit"):
        from_pretrained(tmp_path)
    make("attention").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds a SimpleAttentionModel, not a BysMamba"):
        BysMamba.from_pretrained(tmp_path)
    weights.write_bytes(whole)
    with pytest.raises(ValueError, match="does not fit the model"):
        from_pretrained(tmp_path)
    with pytest.raises(OSError, match="no such folder"):
        from_pretrained(str(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(OSError, match=r"config\.json is missing"):
        from_pretrained(tmp_path / "empty")


@pytest.mark.parametrize("name", ["mamba", "rnn", "attention"])
def test_bad_windows_are_refused(name):
    model = make(name)
    for shape in ((2, 7, 3), (2, 0, 3, 3), (2, 7, 2, 3), (2, 7, 9)):
        with pytest.raises(ValueError, match="x: windows must have shape"):
            model(torch.zeros(shape, dtype=torch.long))
    with pytest.raises(TypeError, match="integer ids"):
        model(torch.zeros(2, 7, 3, 3))
    for bad in (113, -1):
        x = random_windows().long()
        x[1, 6, 2, 2] = bad
        with pytest.raises(ValueError, match=r"ids must be 0\.\.112"):
            model(x)
    with pytest.raises(ValueError, match="target: shape must be"):
        model.loss(random_windows(), torch.zeros(3, dtype=torch.long))


def test_create_names_what_it_knows():
    assert type(create("BysMamba", dim=8, depth=0)) is BysMamba
    with pytest.raises(ValueError, match="mamba, rnn, attention"):
        create("resnet50")
    with pytest.raises(ValueError, match="do not fit"):
        create("mamba", dim=8, layers=3)
