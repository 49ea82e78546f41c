"""The notebook's own case: its three models at its settings, whole iterations of the trainer, and where they go.

batch 32, windows of 256 tokens at a stride of 32, one target a window, AdamW at 1e-3, embeddings of 16, hidden width
64, BysMamba of dim 64, d_state 16 and depth 8. The embedded set stands in for the notebook's, which is not ours to
ship; the windows have the same shape.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils.data import Subset

from benchmarks.clock import wall
from benchmarks.contestants import auto
from benchmarks.harness import OURS, Row, Setup, Spread, spread
from pixelbytes._training import shuffled
from pixelbytes.dataset import PxByDataset, load_embedded
from pixelbytes.models import BysMamba, MambaConfig, SequenceModel, SimpleAttentionModel, SimpleSeqModel
from pixelbytes.tokenizer import PixelBytesTokenizer
from pixelbytes.train import Trainer

OP = "trainer"
VOCABULARY, BATCH, SEQLEN, STRIDE, RATE = 113, 32, 256, 32, 1e-3
MODELS: dict[str, Callable[[], SequenceModel]] = {
    "SimpleAttentionModel": lambda: SimpleAttentionModel(VOCABULARY, 16, 64),
    "SimpleSeqModel": lambda: SimpleSeqModel(VOCABULARY, 16, 64),
    "BysMamba": lambda: BysMamba(MambaConfig(dim=64, d_state=16, depth=8, vocab_size=VOCABULARY)),
}
# What the notebook printed while it trained its attention model, of 64 heads, on a Tesla T4 (seed notebook, 31 s for
# the 728 iterations of an epoch). Another machine: it stands beside ours, no ratio is made of it.
NOTEBOOK_T4 = 22.9
ITEMS = 160  # of the embedded set
SHARES = ("data loading", "forward", "backward", "clipping", "optimiser", "the rest")


@functools.cache
def windows() -> PxByDataset:
    corpus = load_embedded(PixelBytesTokenizer(), limit=ITEMS)
    return PxByDataset(corpus.rows, seq_length=SEQLEN, stride=STRIDE)


def make_trainer(setup: Setup, name: str, folder: str) -> Trainer:
    torch.manual_seed(0)
    amp = {torch.float16: "fp16", torch.bfloat16: "bf16"}.get(setup.dtype, "off")
    return Trainer(
        MODELS[name](), windows(), None, BATCH, RATE, 1, save_dir=folder, device=setup.device, quiet=True, amp=amp
    )


class Profile:
    """Seconds of the parts of an iteration, while `watch` is on; the device is waited for at each border."""

    def __init__(self, trainer: Trainer, device: str) -> None:
        self.trainer, self.device = trainer, device
        self.seconds: dict[str, list[float]] = {part: [] for part in SHARES}

    def timed(self, part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            start = wall(self.device)
            out = call(*args, **kwargs)
            self.seconds[part].append(wall(self.device) - start)
            return out

        return run

    def watch(self, count: int) -> None:
        """`count` iterations, the first of them not counted: it also starts the loader."""
        trainer, fetch = self.trainer, batches(self.trainer)
        with (
            mock.patch.object(trainer, "_loss", self.timed("forward", trainer._loss)),
            mock.patch.object(trainer.optimizer, "step", self.timed("optimiser", trainer.optimizer.step)),
            mock.patch.object(Tensor, "backward", self.timed("backward", Tensor.backward)),
            mock.patch.object(
                torch.nn.utils, "clip_grad_norm_", self.timed("clipping", torch.nn.utils.clip_grad_norm_)
            ),
        ):
            for _ in range(1 + count):
                start = wall(self.device)
                x, target = next(fetch)
                loaded = wall(self.device)
                trainer._train_step(x, target)
                self.seconds["data loading"].append(loaded - start)
                known = sum(self.seconds[part][-1] for part in SHARES[:-1])
                self.seconds["the rest"].append(wall(self.device) - start - known)

    def shares(self) -> dict[str, Spread]:
        """Percent of an iteration, by part."""
        totals = [sum(parts) for parts in zip(*self.seconds.values(), strict=True)][1:]
        return {
            part: spread([100 * s / total for s, total in zip(seconds[1:], totals, strict=True)])
            for part, seconds in self.seconds.items()
        }


def batches(trainer: Trainer) -> Iterator[tuple[Tensor, Tensor]]:
    """As an epoch fetches them: windows in random order, through the trainer's own loader."""
    order = shuffled(len(trainer.train_dataset), 0, 0)  # type: ignore[arg-type]
    return iter(trainer._loader(Subset(trainer.train_dataset, order)))


def rate(trainer: Trainer, device: str, warm_up: int, count: int) -> Spread:
    """Iterations per second, over `count` of them, data loading included."""
    taken = []
    fetch = batches(trainer)
    for turn in range(warm_up + count):
        start = wall(device)
        trainer._train_step(*next(fetch))
        if turn >= warm_up:
            taken.append(wall(device) - start)
    s = spread(taken)
    return Spread(1 / s.median, 1 / s.high, 1 / s.low)


def rows(setup: Setup) -> Iterator[Row]:
    warm_up, count = (2, 5) if setup.quick and not setup.on_gpu else (4, 16)
    for name in MODELS:
        setup.report(f"{OP} {name} {setup.dtype_name}")
        sizes = f"model={name} batch={BATCH} seqlen={SEQLEN} stride={STRIDE}"
        backend = auto(setup, "mamba_inner") if name == "BysMamba" else ""
        with tempfile.TemporaryDirectory() as folder:
            trainer = make_trainer(setup, name, folder)
            s = rate(trainer, setup.device, warm_up, count)
            profile = Profile(trainer, setup.device)
            profile.watch(count)
            shares = profile.shares()
        what = "iterations per second"
        yield setup.row(OP, what, sizes, OURS, s.median, "it/s", low=s.low, high=s.high, backend=backend)
        if name == "SimpleAttentionModel":
            yield setup.row(
                OP, what, sizes, "notebook", NOTEBOOK_T4, "it/s", device="cuda",
                machine="Tesla T4, as the notebook printed it", note="the notebook: 64 heads, on a Tesla T4",
            )  # fmt: skip
        for part, share in shares.items():
            yield setup.row(
                OP, f"{part}, share of an iteration", sizes, OURS, share.median, "%", low=share.low, high=share.high
            )


PARTS = {"all": rows}
