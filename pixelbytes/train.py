"""The trainer: the notebook's constructor, methods and printed lines, with a validation part, seed, resume."""

from __future__ import annotations

import contextlib
import csv
import io
import math
import time
from collections.abc import Callable, Iterator, Sized
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm.auto import tqdm

from pixelbytes._files import make_folder, write_bytes, write_json, write_text
from pixelbytes._parallel import GradientWorkers
from pixelbytes._training import (
    SCHEDULES,
    Interrupt,
    ctrl_c_between_steps,
    hold_out,
    learning_rate_share,
    shuffled,
    trimmed,
)
from pixelbytes.models.common import IGNORE, SequenceModel, load_weights

__all__ = ["Trainer"]

AMP_TYPES = {"off": None, "fp16": torch.float16, "bf16": torch.bfloat16}
COLUMNS = {
    "epoch": "Epoch",
    "train_loss": "Train Loss",
    "test_loss": "Test Loss",
    "test_accuracy": "Test Accuracy",
    "val_loss": "Validation Loss",
    "val_accuracy": "Validation Accuracy",
    "learning_rate": "Learning Rate",
    "steps": "Steps",
    "seconds": "Seconds",
}


class Trainer:
    """Train a model on windows and their targets.

    The folder `save_dir/{model_name}_{dataset_name}` (or `run_dir`) gets `last/` and `best/`, each in save_pretrained
    form, `last/checkpoint.pth` with all that `resume` needs, and `training_progress.csv`, one line an epoch.
    `best` is the epoch with the lowest loss on the validation part; the test part is only reported.

    Args:
        model: one of pixelbytes.models.
        train_dataset, test_dataset: give (windows (L, 3, 3), target () or (L,)); `test_dataset` may be None.
        batch_size, learning_rate, num_epochs: as they say; AdamW.
        save_dir, model_name, dataset_name: where to write.
        compile_model: torch.compile the loss. Off unless asked for: the kernels are fused already.
        eval_every: epochs between evaluations; the last epoch is always evaluated.
        val_dataset: what `best` is chosen on; if None, a tenth of `train_dataset` is held out for it.
        seed: of the order of the windows, of the held-out part and of torch's generator.
        weight_decay, betas, grad_clip: of AdamW; highest norm of the gradients, None for no clipping.
        schedule: "constant", or "cosine" with a warm-up.
        max_minutes, max_steps: end earlier; "cosine" is then fitted to what ends first.
        amp: "off", "bf16" or "fp16" (CUDA only).
        num_workers: processes that load data.
        processes: that compute, each with its rows of a batch; on the CPU only, and no more than `batch_size`. The step
            is the same up to rounding. A script that asks for more than one needs `if __name__ == "__main__":`.
        device: default CUDA where there is one.
        resume: go on from `last/checkpoint.pth`. On the CPU the result is the same, bit for bit, as without the
            interruption (not with `max_minutes` and "cosine", where the rate depends on the clock).
        run_dir: write here instead of `save_dir/{model_name}_{dataset_name}`.
        quiet: no bars and no lines.
    """

    def __init__(
        self,
        model: SequenceModel,
        train_dataset: Dataset[Any],
        test_dataset: Dataset[Any] | None,
        batch_size: int,
        learning_rate: float,
        num_epochs: int,
        save_dir: str | Path = "models",
        compile_model: bool = False,
        model_name: str = "unnamed",
        dataset_name: str = "unnamed",
        eval_every: int = 5,
        *,
        val_dataset: Dataset[Any] | None = None,
        seed: int = 0,
        weight_decay: float = 0.01,
        betas: tuple[float, float] = (0.9, 0.999),
        grad_clip: float | None = 1.0,
        schedule: str = "constant",
        max_minutes: float | None = None,
        max_steps: int | None = None,
        amp: str = "off",
        num_workers: int = 0,
        processes: int = 1,
        device: str | torch.device | None = None,
        resume: bool = False,
        run_dir: str | Path | None = None,
        quiet: bool = False,
    ) -> None:
        if not isinstance(model, SequenceModel):
            raise TypeError(f"model: a model of pixelbytes.models is wanted, got {type(model).__name__}")
        counts = {"batch_size": batch_size, "num_epochs": num_epochs, "eval_every": eval_every, "processes": processes}
        for name, value in counts.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        for name, limit in (("learning_rate", learning_rate), ("max_minutes", max_minutes), ("max_steps", max_steps)):
            if limit is not None and not limit > 0:
                raise ValueError(f"{name} must be positive, got {limit}")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas must lie in 0 <= beta < 1, got {betas}")
        if schedule not in SCHEDULES:
            raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, got {schedule!r}")
        if amp not in AMP_TYPES:
            raise ValueError(f"amp must be one of {', '.join(AMP_TYPES)}, got {amp!r}")
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if amp == "fp16" and self.device.type != "cuda":
            raise ValueError(f"amp: fp16 needs a CUDA device, got {self.device}; use bf16 or off")
        if processes > 1 and self.device.type != "cpu":
            raise ValueError(f"processes: more than one is for the CPU only, got {processes} on {self.device}")
        if processes > 1 and compile_model:
            raise ValueError(f"processes: a compiled model trains in one, got {processes}; leave compile_model out")
        for name, data in (
            ("train_dataset", train_dataset),
            ("test_dataset", test_dataset),
            ("val_dataset", val_dataset),
        ):
            if data is not None and len(_sized(data)) == 0:
                raise ValueError(f"{name} is empty")

        self.num_epochs, self.eval_every, self.batch_size = num_epochs, eval_every, batch_size
        self.learning_rate, self.schedule, self.grad_clip = learning_rate, schedule, grad_clip
        self.max_seconds = math.inf if max_minutes is None else 60 * max_minutes
        self.max_steps, self.seed, self.num_workers, self.quiet = max_steps, seed, num_workers, quiet
        self.processes = min(processes, batch_size)
        self._workers: GradientWorkers | None = None  # while `train` runs
        self.model_name, self.dataset_name = model_name, dataset_name
        if val_dataset is None:
            train_dataset, val_dataset = hold_out(train_dataset, 0.1, seed)
        self.train_dataset = train_dataset
        self.val_loader = self._loader(val_dataset)
        self.test_loader = None if test_dataset is None else self._loader(test_dataset)
        self.train_loader = self._loader(train_dataset)

        self._face = run_dir is None  # the notebook's folder, with its metadata.json and final CSV
        self.save_dir = make_folder(run_dir or Path(save_dir) / f"{model_name}_{dataset_name}")
        self.model = model.to(self.device)
        fused = self.device.type in ("cpu", "cuda")
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=learning_rate, betas=betas, weight_decay=weight_decay, fused=fused
        )
        self.amp_dtype = AMP_TYPES[amp]
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=amp == "fp16")
        self._compiled = compile_model
        self._loss: Callable[[Tensor, Tensor], tuple[Tensor, int]] = model.loss
        if compile_model:
            self._say("Compiling model...")
            self._loss = torch.compile(model.loss)  # the model itself keeps its names: no `_orig_mod.` in checkpoints

        self.history: list[dict[str, Any]] = []  # one entry an epoch, see COLUMNS
        self.best_loss, self.best_epoch = math.inf, -1
        self._epoch = self._batch = self._step = 0  # where training stands
        self._sum, self._targets, self._seconds = 0.0, 0, 0.0  # of the epoch so far; of the whole training
        if resume:
            self.load_checkpoint(self.save_dir / "last" / "checkpoint.pth")
        elif self._face:
            write_json(self.save_dir / "metadata.json", self._metadata())

    # -- the notebook's attributes --------------------------------------------------------------------------------

    @property
    def train_losses(self) -> list[float]:
        return [row["train_loss"] for row in self.history]

    @property
    def test_losses(self) -> list[float]:
        return [row["test_loss"] for row in self.history if row["test_loss"] is not None]

    @property
    def test_accuracies(self) -> list[float]:
        return [row["test_accuracy"] for row in self.history if row["test_accuracy"] is not None]

    # -- training ---------------------------------------------------------------------------------------------------

    def train(self) -> None:
        """Train to the end of the epochs, steps or minutes. Ctrl-C saves `last` and raises KeyboardInterrupt."""
        if self._step == 0:
            torch.manual_seed(self.seed)
        with ctrl_c_between_steps() as interrupt, self._running_workers():
            start = time.monotonic() - self._seconds
            while self._epoch < self.num_epochs and not self._spent():
                self._train_epoch(start, interrupt)
                if interrupt.pressed:
                    self._save_last()
                    self._say(f"Interrupted in epoch {self._epoch + 1}; {self.save_dir / 'last'} can be resumed")
                    raise KeyboardInterrupt
        if self.history and self.best_epoch >= 0:
            best = next(row for row in self.history if row["epoch"] == self.best_epoch + 1)
            kind = "Validation" if best["test_accuracy"] is None else "Test"
            accuracy = best["val_accuracy"] if best["test_accuracy"] is None else best["test_accuracy"]
            self._say(f"Best {kind} Accuracy: {accuracy:.2f}%")
        if self._face:
            self.save_training_progress(final=True)

    @contextlib.contextmanager
    def _running_workers(self) -> Iterator[None]:
        if self.processes == 1:
            yield
            return
        with GradientWorkers(self.model, self.processes, self.amp_dtype) as self._workers:
            try:
                yield
            finally:
                self._workers = None

    def _spent(self) -> bool:
        return self._seconds >= self.max_seconds or (self.max_steps is not None and self._step >= self.max_steps)

    def _train_epoch(self, start: float, interrupt: Interrupt) -> None:
        """From batch `_batch` to the end of the epoch, then evaluation and files; or until it is time to stop."""
        n = len(_sized(self.train_dataset))
        n_batches = math.ceil(n / self.batch_size)
        total = min(n_batches * self.num_epochs, self.max_steps or n_batches * self.num_epochs)
        order = shuffled(n, self.seed, self._epoch)[self._batch * self.batch_size :]
        self.train_loader = self._loader(Subset(self.train_dataset, order))
        self.model.train()
        with tqdm(
            self.train_loader,
            desc=f"Epoch {self._epoch + 1}/{self.num_epochs}",
            total=n_batches,
            initial=self._batch,
            disable=self.quiet,
            leave=not self.max_seconds < math.inf,  # a run by the clock has many short epochs
        ) as bar:
            for x, target in bar:
                progress = max(self._step / total, self._seconds / self.max_seconds)
                share = learning_rate_share(self.schedule, self._step, total, progress)
                for group in self.optimizer.param_groups:
                    group["lr"] = self.learning_rate * share
                loss, n_targets = self._train_step(x, target)
                self._sum, self._targets = self._sum + loss * n_targets, self._targets + n_targets
                self._step, self._batch = self._step + 1, self._batch + 1
                self._seconds = time.monotonic() - start
                bar.set_postfix(loss=f"{self._sum / max(self._targets, 1):.4f}", refresh=False)
                if interrupt.pressed or self._spent():
                    break
        if interrupt.pressed:
            return
        train_loss = self._sum / max(self._targets, 1)
        self._say(f"Epoch {self._epoch + 1}/{self.num_epochs}, Average Training Loss: {train_loss:.4f}")
        if self.history and self.history[-1]["epoch"] == self._epoch + 1:
            self.history.pop()  # of the part of this epoch that an earlier limit allowed
        row: dict[str, Any] = dict.fromkeys(COLUMNS)
        row.update(epoch=self._epoch + 1, train_loss=train_loss, steps=self._step)
        row["learning_rate"] = self.optimizer.param_groups[0]["lr"]
        self.history.append(row)
        last = self._epoch + 1 == self.num_epochs or self._spent()
        evaluated = last or (self._epoch + 1) % self.eval_every == 0
        is_best = False
        if evaluated:
            row["val_accuracy"], row["val_loss"] = self._score(self.val_loader)
            self._say(f"Validation Accuracy: {row['val_accuracy']:.2f}%, Validation Loss: {row['val_loss']:.4f}")
            if self.test_loader is not None:
                row["test_accuracy"], row["test_loss"] = self.evaluate()
            if is_best := row["val_loss"] < self.best_loss:
                self.best_loss, self.best_epoch = row["val_loss"], self._epoch
        self._seconds = time.monotonic() - start
        row["seconds"] = round(self._seconds, 3)
        epoch = self._epoch
        if self._batch >= n_batches:
            self._epoch, self._batch, self._sum, self._targets = epoch + 1, 0, 0.0, 0
        if evaluated:
            self.save_checkpoint(epoch, is_best)
        else:
            self._save_last()
        self.save_training_progress()

    def _train_step(self, x: Tensor, target: Tensor) -> tuple[float, int]:
        self.optimizer.zero_grad(set_to_none=True)
        value, n_targets = self._gradients(x, target) if self._workers is None else self._workers.gradients(x, target)
        if not math.isfinite(value):
            raise RuntimeError(f"the loss is {value} at step {self._step + 1}: lower learning_rate, or clip harder")
        if self.grad_clip is not None:
            self.scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.grad_clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return value, n_targets

    def _gradients(self, x: Tensor, target: Tensor) -> tuple[float, int]:
        """Gradients of the mean loss, and that loss and its number of targets; GradientWorkers has the like."""
        if not self._compiled:  # every new length would be compiled anew
            x, target = trimmed(x, target)
        x, target = x.to(self.device, non_blocking=True), target.to(self.device, non_blocking=True)
        with self._autocast():
            loss, n_targets = self._loss(x, target)
        self.scaler.scale(loss).backward()
        return loss.item(), n_targets

    # -- evaluation -------------------------------------------------------------------------------------------------

    def evaluate(self) -> tuple[float, float]:
        """Accuracy in percent and mean loss in nats on the test part (on the validation part if there is none)."""
        accuracy, loss = self._score(self.test_loader or self.val_loader)
        kind = "Validation" if self.test_loader is None else "Test"
        self._say(f"{kind} Accuracy: {accuracy:.2f}%, {kind} Loss: {loss:.4f}")
        return accuracy, loss

    @torch.no_grad()
    def _score(self, loader: DataLoader[Any]) -> tuple[float, float]:
        """Over all targets, each counted once: a short last batch weighs what it holds."""
        self.model.eval()
        correct = count = 0
        total = 0.0
        with contextlib.nullcontext() if self._workers is None else self._workers.all_threads():
            for x, target in loader:
                if not self._compiled:
                    x, target = trimmed(x, target)
                with self._autocast():
                    logits, wanted = self.model.logits_for(x.to(self.device), target.to(self.device))
                kept = wanted != IGNORE
                total += F.cross_entropy(logits.float(), wanted, ignore_index=IGNORE, reduction="sum").item()
                correct += int((logits.argmax(-1) == wanted)[kept].sum())
                count += int(kept.sum())
        self.model.train()
        return 100 * correct / max(count, 1), total / max(count, 1)

    # -- files ------------------------------------------------------------------------------------------------------

    def save_checkpoint(self, epoch: int, is_best: bool = False) -> None:
        """Write `last/`, and `best/` if it is the best, and say so. `epoch` counts from 0."""
        self._save_last()
        if is_best:
            self.model.save_pretrained(self.save_dir / "best")
        self._say(f"Checkpoint saved for epoch {epoch + 1}" + (" (Best Model)" if is_best else ""))

    def _save_last(self) -> None:
        # Resuming reads checkpoint.pth alone: one rename, so that weights and optimiser always fit together.
        last = make_folder(self.save_dir / "last")
        buffer = io.BytesIO()
        torch.save(
            {
                "epoch": self._epoch,
                "model_state_dict": self.model.state_dict(),
                "optimizer_state_dict": self.optimizer.state_dict(),
                "scaler_state_dict": self.scaler.state_dict(),
                "rng_state": torch.get_rng_state(),
                "history": self.history,
                "progress": {
                    "batch": self._batch,
                    "step": self._step,
                    "sum": self._sum,
                    "targets": self._targets,
                    "seconds": self._seconds,
                    "best_loss": self.best_loss,
                    "best_epoch": self.best_epoch,
                    "batch_size": self.batch_size,
                    "seed": self.seed,
                },
            },
            buffer,
        )
        write_bytes(last / "checkpoint.pth", buffer.getvalue())
        self.model.save_pretrained(last)

    def load_checkpoint(self, path: str | Path) -> int:
        """Restore model and optimiser, and where training stood; returns the epoch that the file names.

        Reads files of the first published version too (weights, optimiser and epoch).
        """
        rest = load_weights(self.model, path)
        try:
            if "optimizer_state_dict" in rest:
                self.optimizer.load_state_dict(rest["optimizer_state_dict"])
            self._epoch = int(rest.get("epoch", 0))
            if "progress" not in rest:
                return self._epoch
            at = rest["progress"]
            if at["batch"] and (at["batch_size"], at["seed"]) != (self.batch_size, self.seed):
                raise ValueError(
                    f"{path}: stopped within an epoch with batch_size {at['batch_size']} and seed {at['seed']}; "
                    f"resuming wants the same, got {self.batch_size} and {self.seed}"
                )
            self.scaler.load_state_dict(rest["scaler_state_dict"])
            torch.set_rng_state(rest["rng_state"])
            self.history = rest["history"]
            self._batch, self._step, self._sum = at["batch"], at["step"], at["sum"]
            self._targets, self._seconds = at["targets"], at["seconds"]
            self.best_loss, self.best_epoch = at["best_loss"], at["best_epoch"]
        except (KeyError, TypeError) as error:
            raise ValueError(f"the checkpoint {path} is not complete: {error}") from error
        return self._epoch

    def save_training_progress(self, final: bool = False) -> None:
        """Write one CSV line for each epoch; what was not evaluated stays empty."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(COLUMNS.values())
        for row in self.history:
            writer.writerow("" if row[key] is None else row[key] for key in COLUMNS)
        write_text(self.save_dir / f"{'final_' if final else ''}training_progress.csv", text.getvalue())

    # -- small things -------------------------------------------------------------------------------------------------

    def _loader(self, dataset: Dataset[Any]) -> DataLoader[Any]:
        return DataLoader(
            dataset,
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            pin_memory=self.device.type == "cuda",
        )

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=self.amp_dtype, enabled=self.amp_dtype is not None)

    def _metadata(self) -> dict[str, Any]:
        return {
            "model_name": self.model_name,
            "dataset_name": self.dataset_name,
            "num_epochs": self.num_epochs,
            "batch_size": self.batch_size,
            "learning_rate": self.learning_rate,
            "device": str(self.device),
            "eval_every": self.eval_every,
            "seed": self.seed,
            "schedule": self.schedule,
        }

    def _say(self, line: str) -> None:
        if not self.quiet:
            tqdm.write(line)


def _sized(dataset: Dataset[Any]) -> Sized:
    if not isinstance(dataset, Sized):
        raise TypeError(f"a data set with a length is wanted, got {type(dataset).__name__}")
    return dataset
