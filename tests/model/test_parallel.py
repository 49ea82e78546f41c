"""Training in several processes: the same step as in one, nothing left behind, errors that surface."""

from __future__ import annotations

import multiprocessing
import os

import pytest
import torch
from model_forms import CtrlC, assert_same, make, weights
from torch.utils.data import Subset

from pixelbytes._parallel import GradientWorkers
from pixelbytes.dataset import PxByDataset
from pixelbytes.models import SimpleSeqModel, from_pretrained
from pixelbytes.rows import with_start
from pixelbytes.train import Trainer


@pytest.fixture
def data(rows):
    """19 windows of unequal length to train on, so that the last batch of 8 has 3."""
    train = PxByDataset(with_start(rows[:16], 1), 32, 32, "all")
    return Subset(train, range(19)), PxByDataset(with_start(rows[16:19], 1), 32, 32, "all")


@pytest.fixture(autouse=True)
def nothing_is_left():
    threads = torch.get_num_threads()
    yield
    assert multiprocessing.active_children() == []
    assert torch.get_num_threads() == threads


def trainer(data, folder, model=None, epochs=2, batch_size=8, **options):
    train, val = data
    options = {"val_dataset": val, "eval_every": 1, "quiet": True, "run_dir": folder, "processes": 2} | options
    return Trainer(model or make("rnn"), train, None, batch_size, 0.01, epochs, **options)


def gradients(model):
    return [p.grad for p in model.parameters()]


@pytest.mark.parametrize(("name", "processes"), [("mamba-norm-centre", 3), ("rnn-bi", 2)])
def test_gradients_are_those_of_the_whole_batch(name, processes, data):
    """Within the rounding of float32, in which the loss is summed; parts weighted wrongly differ by percents."""
    targets = "last" if name.endswith("bi") else "all"
    model = make(name).double()
    model.register_parameter("unused", torch.nn.Parameter(torch.ones(3)))  # and of another dtype
    with GradientWorkers(model, processes) as workers:
        for count in (7, 3, 2, 1):  # parts of unequal size, of one row, and fewer rows than processes
            x, target = data[0].dataset.batch(range(5, 5 + count))
            if targets == "last":
                target = target[:, 3]
            elif count == 3:
                target[1] = -100  # a part without targets
            model.zero_grad()
            loss, n = model.loss(x, target)
            loss.backward()
            wanted = gradients(model)
            model.zero_grad()
            assert workers.gradients(x, target) == (pytest.approx(loss.item(), rel=1e-6), n)
            for got, want in zip(gradients(model), wanted, strict=True):
                if want is None:
                    assert got is None
                else:
                    assert (got - want).abs().max() <= 1e-5 * want.abs().max()
            with torch.no_grad():  # the workers see what an optimiser does
                for parameter in model.parameters():
                    parameter.mul_(1.1)


def test_mixed_precision_reaches_the_workers(data, tmp_path):
    x, target = data[0].dataset.batch(range(8))
    target[:4] = -100  # the parent's part has no targets, so that the loss is the worker's alone
    found = {}
    for amp_dtype in (None, torch.bfloat16):
        model = make("rnn")
        with GradientWorkers(model, 2, amp_dtype) as workers:
            loss, _ = workers.gradients(x, target)
        found[amp_dtype] = loss
    assert found[None] != found[torch.bfloat16] == pytest.approx(found[None], rel=0.02)


def test_training_is_the_same_up_to_rounding_and_repeats_bit_for_bit(data, tmp_path):
    one = trainer(data, tmp_path / "one", epochs=3, processes=1)
    one.train()
    two = trainer(data, tmp_path / "two", epochs=3)
    two.train()
    # Losses, not weights: AdamW divides each gradient by its size, and makes steps of those that are all rounding.
    assert two.train_losses == pytest.approx(one.train_losses, rel=1e-4)
    assert [row["val_loss"] for row in two.history] == pytest.approx([row["val_loss"] for row in one.history], rel=1e-4)
    assert one.processes == 1 and two.processes == 2

    train, val = data
    interrupted = trainer((CtrlC(train, 19 + 12), val), tmp_path / "again", epochs=3)
    with pytest.raises(KeyboardInterrupt):
        interrupted.train()
    assert multiprocessing.active_children() == []
    assert (interrupted._epoch, interrupted._batch) == (1, 2)
    assert_same(weights(from_pretrained(tmp_path / "again" / "last")), weights(interrupted.model))
    resumed = trainer(data, tmp_path / "again", epochs=3, resume=True)
    resumed.train()
    assert_same(weights(two.model), weights(resumed.model))
    assert two.train_losses == resumed.train_losses


class Dying(SimpleSeqModel):
    """Ends its process, if that is a worker."""

    def loss(self, x, target):
        if multiprocessing.parent_process() is not None:
            os._exit(3)
        return super().loss(x, target)


def test_a_worker_that_dies_is_missed(data, tmp_path):
    model = Dying(vocab_size=113, embedding_dim=4, hidden_dim=16)
    with pytest.raises(RuntimeError, match="training process 2 ended unexpectedly with exit code 3"):
        trainer(data, tmp_path, model).train()


def test_an_error_in_a_worker_surfaces(data, tmp_path):
    x, target = data[0].dataset.batch(range(2))
    x[1, 3, 1, 1] = 200
    windows = torch.utils.data.TensorDataset(x, target)
    message = r"training process 2: ValueError: x: ids must be 0\.\.112, got 0\.\.200"
    with pytest.raises(RuntimeError, match=message) as caught:
        trainer((windows, data[1]), tmp_path, batch_size=2).train()
    assert "in check_windows" in str(caught.value.__cause__)  # the worker's traceback


def test_a_model_that_cannot_be_sent(data, tmp_path):
    model = make("rnn")
    model.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="processes: the model cannot be sent"):
        trainer(data, tmp_path, model).train()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"processes": 0}, "processes must be at least 1, got 0"),
        ({"device": "meta"}, "processes: more than one is for the CPU only, got 2 on meta"),
        ({"compile_model": True}, "processes: a compiled model trains in one, got 2"),
        ({"amp": "fp16"}, "fp16 needs a CUDA device"),
    ],
)
def test_bad_settings(options, message, data, tmp_path):
    with pytest.raises(ValueError, match=message):
        trainer(data, tmp_path, **({"device": "cpu"} | options))


def test_no_more_processes_than_rows(data, tmp_path):
    single = trainer(data, tmp_path, batch_size=1, max_steps=1)
    assert single.processes == 1
    single.train()
