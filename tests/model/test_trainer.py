"""The trainer: resuming, interruption, selection, files, printed lines."""

from __future__ import annotations

import csv
import signal
import subprocess
import sys
import textwrap

import pytest
import torch
import torch.nn.functional as F
from model_forms import CtrlC, assert_same, make, weights

from pixelbytes import _training
from pixelbytes.dataset import PxByDataset
from pixelbytes.models import from_pretrained
from pixelbytes.rows import with_start
from pixelbytes.train import Trainer


@pytest.fixture
def data(rows):
    return (
        PxByDataset(with_start(rows[:16], 1), 32, 32, "all"),
        PxByDataset(with_start(rows[16:19], 1), 32, 32, "all"),
        PxByDataset(with_start(rows[19:], 1), 32, 32, "all"),
    )


def trainer(data, folder, model=None, epochs=2, **options):
    train, val, test = data
    options = {"val_dataset": val, "eval_every": 1, "quiet": True, "run_dir": folder} | options
    return Trainer(model or make("rnn"), train, test, 8, 0.01, epochs, **options)


@pytest.mark.parametrize("name", ["rnn", "mamba"])
def test_two_and_two_epochs_are_four(name, data, tmp_path):
    whole = trainer(data, tmp_path / "a", make(name), epochs=4)
    whole.train()
    trainer(data, tmp_path / "b", make(name), epochs=2).train()
    torch.manual_seed(99)  # whatever happened in between
    second = trainer(data, tmp_path / "b", make(name), epochs=4, resume=True)
    second.train()
    assert_same(weights(whole.model), weights(second.model))
    drop = {"seconds"}
    assert [{k: v for k, v in row.items() if k not in drop} for row in whole.history] == [
        {k: v for k, v in row.items() if k not in drop} for row in second.history
    ]
    assert whole.best_epoch == second.best_epoch


def test_ctrl_c_within_an_epoch_loses_nothing(data, tmp_path):
    train, val, test = data
    steps = -(-len(train) // 8)
    options = {"schedule": "cosine", "epochs": 3}
    whole = trainer(data, tmp_path / "a", **options)
    whole.train()
    stopped = trainer((CtrlC(train, len(train) + 9), val, test), tmp_path / "b", **options)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        stopped.train()
    assert signal.getsignal(signal.SIGINT) is before
    assert (stopped._epoch, stopped._batch, stopped._step) == (1, 2, steps + 2)
    assert_same(weights(from_pretrained(tmp_path / "b" / "last")), weights(stopped.model))
    resumed = trainer(data, tmp_path / "b", resume=True, **options)
    resumed.train()
    assert_same(weights(whole.model), weights(resumed.model))
    assert [row["train_loss"] for row in whole.history] == [row["train_loss"] for row in resumed.history]


def test_a_step_limit_within_an_epoch_can_be_lifted(data, tmp_path):
    whole = trainer(data, tmp_path / "a", epochs=2)
    whole.train()
    first = trainer(data, tmp_path / "b", epochs=2, max_steps=3)
    first.train()
    assert first._step == 3 and first.history[-1]["val_loss"] is not None
    second = trainer(data, tmp_path / "b", epochs=2, resume=True)
    second.train()
    assert_same(weights(whole.model), weights(second.model))
    assert [row["epoch"] for row in second.history] == [1, 2]


def test_the_clock_ends_training(data, tmp_path):
    limited = trainer(data, tmp_path, epochs=100_000, max_minutes=0.01, schedule="cosine")
    limited.train()
    assert len(limited.history) < 100_000
    assert limited.history[-1]["val_loss"] is not None
    assert limited.history[-1]["learning_rate"] < 0.005  # the schedule knew when the end was near


def test_printed_lines_and_files_are_the_notebooks(data, tmp_path, capsys):
    train, _, test = data
    t = Trainer(
        model=make("rnn"),
        train_dataset=train,
        test_dataset=test,
        batch_size=32,
        learning_rate=0.001,
        num_epochs=3,
        save_dir=tmp_path / "model_checkpoints",
        compile_model=False,
        model_name="SimpleSeqModel",
        dataset_name="PixelBytes-Pokemon",
        eval_every=2,
    )
    t.train()
    lines = capsys.readouterr().out.splitlines()
    pattern = [
        r"Epoch 1/3, Average Training Loss: \d\.\d{4}",
        r"Epoch 2/3, Average Training Loss: \d\.\d{4}",
        r"Validation Accuracy: \d+\.\d\d%, Validation Loss: \d\.\d{4}",
        r"Test Accuracy: \d+\.\d\d%, Test Loss: \d\.\d{4}",
        r"Checkpoint saved for epoch 2( \(Best Model\))",
        r"Epoch 3/3, Average Training Loss: \d\.\d{4}",
        r"Validation Accuracy: .*",
        r"Test Accuracy: .*",
        r"Checkpoint saved for epoch 3( \(Best Model\))?",
        r"Best Test Accuracy: \d+\.\d\d%",
    ]
    lines = [line for line in lines if line.strip()]
    assert len(lines) == len(pattern)
    import re

    for line, wanted in zip(lines, pattern, strict=True):
        assert re.fullmatch(wanted, line.strip()), line
    folder = tmp_path / "model_checkpoints" / "SimpleSeqModel_PixelBytes-Pokemon"
    assert {p.name for p in folder.iterdir()} == {
        "metadata.json",
        "best",
        "last",
        "training_progress.csv",
        "final_training_progress.csv",
    }
    table = list(csv.DictReader((folder / "training_progress.csv").open()))
    assert [row["Epoch"] for row in table] == ["1", "2", "3"]
    assert list(table[0])[:4] == ["Epoch", "Train Loss", "Test Loss", "Test Accuracy"]
    assert [bool(row["Test Loss"]) for row in table] == [False, True, True]
    assert [float(row["Train Loss"]) for row in table] == t.train_losses
    assert [float(row["Test Loss"]) for row in table[1:]] == t.test_losses
    accuracy, loss = t.evaluate()
    assert (accuracy, loss) == (t.test_accuracies[-1], t.test_losses[-1])
    assert t.load_checkpoint(folder / "last" / "checkpoint.pth") == 3


def test_best_is_chosen_on_validation_only(data, tmp_path):
    t = trainer(data, tmp_path, epochs=4)
    scores = iter([3.0, 1.0, 2.0, 1.5])
    kept = []
    score = t._score

    def scripted(loader):
        if loader is t.val_loader:
            kept.append(weights(t.model))
            return 50.0, next(scores)
        return 100.0 * len(kept), -float(len(kept))  # the test part gets better every epoch

    t._score = scripted
    t.train()
    t._score = score
    assert t.best_epoch == 1
    assert_same(weights(from_pretrained(tmp_path / "best")), kept[1])
    assert_same(weights(from_pretrained(tmp_path / "last")), kept[3])


def test_score_counts_each_target_once(data, tmp_path):
    t = trainer(data, tmp_path)
    assert len(t.val_loader.dataset) % 8 != 0, "the case needs a short last batch"
    x, target = data[1].batch(range(len(data[1])))
    logits = t.model.eval()(x).flatten(0, 1)
    wanted, kept = target.flatten(), target.flatten() >= 0
    accuracy, loss = t._score(t.val_loader)
    assert loss == pytest.approx(F.cross_entropy(logits, wanted, ignore_index=-100).item(), rel=1e-5)
    assert accuracy == pytest.approx(100 * (logits.argmax(-1) == wanted)[kept].double().mean().item())


def test_compiled_models_keep_their_names(data, tmp_path, monkeypatch):
    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f: compiled(f, backend="eager"))
    t = trainer(data, tmp_path, epochs=1, compile_model=True, max_steps=1)
    t.train()
    saved = torch.load(tmp_path / "last" / "checkpoint.pth", weights_only=True)
    assert saved["model_state_dict"].keys() == make("rnn").state_dict().keys()


def test_a_loss_that_is_not_finite_stops(data, tmp_path):
    model = make("rnn")
    with torch.no_grad():
        model.fc.bias[0] = float("nan")
    with pytest.raises(RuntimeError, match="the loss is nan at step 1"):
        trainer(data, tmp_path, model).train()


def test_hold_out_is_one_run_of_neighbours(data):
    train, held = _training.hold_out(data[0], 0.25, seed=3)
    assert sorted([*train.indices, *held.indices]) == list(range(len(data[0])))
    assert held.indices == list(range(held.indices[0], held.indices[0] + len(held)))
    assert _training.hold_out(data[0], 0.25, seed=3)[1].indices == held.indices
    assert len({_training.hold_out(data[0], 0.25, seed=s)[1].indices[0] for s in range(8)}) > 1
    with pytest.raises(ValueError, match="too few"):
        _training.hold_out(torch.utils.data.TensorDataset(torch.zeros(1)), 0.1, 0)


def test_schedule():
    share = _training.learning_rate_share
    assert share("constant", 0, 1000, 0.0) == share("constant", 999, 1000, 1.0) == 1
    rising = [share("cosine", step, 10_000, 0.0) for step in range(_training.WARM_UP_STEPS)]
    assert rising[0] == pytest.approx(1 / _training.WARM_UP_STEPS) and rising[-1] == 1
    assert share("cosine", 5000, 10_000, 0.5) == pytest.approx((1 + _training.FINAL_SHARE) / 2)
    assert share("cosine", 9999, 10_000, 1.0) == pytest.approx(_training.FINAL_SHARE)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "num_epochs must be at least 1"),
        ({"schedule": "linear"}, "schedule must be one of"),
        ({"amp": "fp16", "device": "cpu"}, "fp16 needs a CUDA device"),
        ({"amp": "int8"}, "amp must be one of"),
        ({"max_minutes": 0}, "max_minutes must be positive"),
        ({"betas": (0.9, 1.0)}, "betas must lie in 0 <= beta < 1"),
    ],
)
def test_bad_settings(options, message, data, tmp_path):
    with pytest.raises(ValueError, match=message):
        trainer(data, tmp_path, **options)
    with pytest.raises(ValueError, match="train_dataset is empty"):
        trainer((torch.utils.data.Subset(data[0], []), *data[1:]), tmp_path)
    with pytest.raises(TypeError, match="model: a model of pixelbytes"):
        trainer(data, tmp_path, torch.nn.Linear(2, 2))


def test_bf16_trains(data, tmp_path):
    t = trainer(data, tmp_path, epochs=2, amp="bf16")
    t.train()
    assert t.history[1]["train_loss"] < t.history[0]["train_loss"]


def test_resuming_with_another_order_is_refused(data, tmp_path):
    trainer(data, tmp_path, max_steps=1).train()
    with pytest.raises(ValueError, match="wants the same"):
        trainer(data, tmp_path, seed=1, resume=True)
    with pytest.raises(OSError, match=r"nowhere.*checkpoint\.pth"):
        trainer(data, tmp_path / "nowhere", resume=True)


def test_a_full_disk_keeps_the_older_checkpoint(tmp_path):
    """A limit on the size of files gives the same error as a full disk, at the same place."""
    program = """
        import resource, sys
        from pathlib import Path
        import torch
        from pixelbytes.models import create, from_pretrained
        folder = Path(sys.argv[1])
        model = create("rnn", vocab_size=113, embedding_dim=4, hidden_dim=16)
        model.save_pretrained(folder)
        before = (folder / "model.safetensors").read_bytes()
        with torch.no_grad():
            model.fc.bias.add_(1)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        try:
            model.save_pretrained(folder)
        except OSError as error:
            assert "model.safetensors" in str(error), error
            print("refused:", error)
        assert (folder / "model.safetensors").read_bytes() == before
        assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"]
        from_pretrained(folder)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), str(tmp_path / "m")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "refused: cannot write" in done.stdout
