"""A run: train in a folder of its own, evaluate and sample from it later.

RUN/config.json            settings
RUN/tokenizer.json         vocabulary and palette
RUN/best/ RUN/last/        checkpoints, each a save_pretrained folder; last/checkpoint.pth resumes
RUN/training_progress.csv  one line an epoch
RUN/metrics.json           evaluation of best/ on the test items
RUN/loss.png samples.png samples.txt
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pixelbytes._files import make_folder, read_json, write_json, write_text
from pixelbytes.config import TrainConfig
from pixelbytes.dataset import Corpus, PxByDataset, load_embedded, load_folder, load_pack
from pixelbytes.evaluate import evaluate, format_table
from pixelbytes.generate import Prompt, Sample, generate
from pixelbytes.models import SequenceModel, create, from_pretrained
from pixelbytes.report import loss_curve, save_png, sheet
from pixelbytes.rows import start_length, with_start
from pixelbytes.tokenizer import PixelBytesTokenizer
from pixelbytes.train import Trainer

FRACTIONS = (0.8, 0.1, 0.1)  # training, validation and test items
LONGEST_WINDOW = 1024
# What may differ when a run goes on.
RESUMABLE = ("epochs", "max_minutes", "max_steps", "eval_every", "workers", "processes", "device", "compile")


@dataclass
class Run:
    """An opened run folder."""

    path: Path
    config: TrainConfig
    seq_length: int
    tokenizer: PixelBytesTokenizer

    def model(self, checkpoint: str = "best", device: str | None = None) -> SequenceModel:
        """The model of "best" or "last", in evaluation mode."""
        return from_pretrained(str(self.path / checkpoint)).to(_device(device)).eval()

    def corpora(self) -> tuple[Corpus, Corpus, Corpus]:
        """The run's training, validation and test items."""
        return split_corpus(self.config, self.tokenizer)


def open_run(path: str | Path) -> Run:
    """Read a run folder; what is missing or damaged is an error that names the file."""
    path = Path(path)
    if not path.is_dir():
        raise OSError(f"{path}: no such run folder")
    described = read_json(path / "config.json")
    if not isinstance(described, dict) or not {"train", "seq_length"} <= described.keys():
        raise ValueError(f"{path / 'config.json'}: not the settings of a run")
    config = TrainConfig.from_dict(described["train"], str(path / "config.json"))
    return Run(path, config, int(described["seq_length"]), PixelBytesTokenizer.load(path / "tokenizer.json"))


def latest_run(folder: str | Path = "runs") -> Path:
    """The newest run in a folder of runs."""
    found = [p.parent for p in Path(folder).glob("*/config.json")]
    if not found:
        raise OSError(f"{folder}: no run there; train one with 'pixelbytes train', or name one with --run")
    return max(found, key=lambda p: ((p / "config.json").stat().st_mtime, p.name))


def new_run_folder(name: str, folder: str | Path = "runs") -> Path:
    """Make `folder`/NAME-001, or the next number that is free."""
    parent = make_folder(folder)
    for number in range(1, 10_000):
        path = parent / f"{name}-{number:03d}"
        try:
            path.mkdir()
        except FileExistsError:
            continue
        except OSError as error:
            raise OSError(f"cannot create the folder {path}: {error.strerror or error}") from error
        return path
    raise OSError(f"{parent}: 9999 runs of the name {name!r} are there already")


def load_corpus(data: str | None, config: TrainConfig, tokenizer: PixelBytesTokenizer) -> Corpus:
    """The embedded set (None), a packed file or a data folder."""
    order: Any = config.order
    if data is None:
        return load_embedded(tokenizer, config.limit, order=order)
    load = load_pack if Path(data).is_file() else load_folder
    return load(data, tokenizer, config.limit, order=order)


def data_palette(data: str | None) -> NDArray[np.uint8] | None:
    """The palette that a data folder's card names, so that its colours stay what they are."""
    card = None if data is None else Path(data) / "card.json"
    if card is None or not card.is_file():
        return None
    described = read_json(card)
    try:
        colours = described.get("palette")
        return None if colours is None else np.array([list(bytes.fromhex(c)) for c in colours], dtype=np.uint8)
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{card}: not a data card: {error}") from error


def split_corpus(config: TrainConfig, tokenizer: PixelBytesTokenizer) -> tuple[Corpus, Corpus, Corpus]:
    """Load what `config` names and split it by item."""
    corpus = load_corpus(config.data, config, tokenizer)
    if len(corpus) < 3:
        raise ValueError(f"{config.data}: {len(corpus)} item(s) are too few to train, validate and test on")
    train, val, test = corpus.split(FRACTIONS, config.seed)
    return train, val, test


def window_length(config: TrainConfig, rows: Sequence[Any]) -> int:
    """Tokens in a window: as asked for, else the length that all but the longest 5 % of rows keep to."""
    lengths = np.array([len(row) for row in rows])
    if config.seq_length is not None:
        if config.seq_length > lengths.max():
            raise ValueError(
                f"seq_length: windows of {config.seq_length} tokens are longer than every sequence, "
                f"the longest has {lengths.max()}"
            )
        return config.seq_length
    if config.target_mode == "last":
        return int(min(256, lengths.max()))
    return int(min(LONGEST_WINDOW, np.percentile(lengths, 95)))


def build_model(config: TrainConfig, vocab_size: int) -> SequenceModel:
    """The model that `config` describes, with weights drawn by its seed."""
    torch.manual_seed(config.seed)
    shared = {"vocab_size": vocab_size, "bidirectional": config.bidirectional, "conv": config.conv}
    if config.model == "mamba":
        return create(
            "mamba",
            dim=config.dim,
            d_state=config.state,
            depth=config.depth,
            pxby_embed=config.embed == "pxby",
            norm=config.norm,
            **shared,
        )
    if config.embed != "pxby":
        raise ValueError(f"embed: {config.embed!r} is for mamba, {config.model} reads the 3x3 window")
    if config.model == "rnn":
        return create(
            "rnn", embedding_dim=config.dim, hidden_dim=2 * config.dim, depth=config.depth, pxby=True, **shared
        )
    return create(
        "attention",
        embedding_dim=config.dim,
        hidden_dim=config.dim,
        num_heads=config.heads,
        num_layers=config.depth,
        pxby=True,
        **shared,
    )


def train_run(
    config: TrainConfig, path: str | Path | None = None, *, resume: bool = False, say: Callable[[str], Any] = print
) -> Path:
    """Train, evaluate and draw samples; returns the run folder.

    On a CPU this starts processes (`config.processes`): a script needs `if __name__ == "__main__":` around the call.

    Args:
        config: the settings. With `resume`, those of the folder, changed where RESUMABLE names them.
        path: the run folder; None makes a new one in runs/. One that holds anything is refused unless `resume`.
        resume: go on where `last/` stands.
        say: takes each line of the report.
    """
    if path is not None and not resume and Path(path).exists() and (Path(path).is_file() or any(Path(path).iterdir())):
        raise ValueError(f"{path} exists and is not empty: go on with --resume, or name another folder")
    device = _device(config.device)
    if resume and path is None:
        raise ValueError("resume: name the run folder (--run)")
    tokenizer = (
        open_run(path).tokenizer if resume and path else PixelBytesTokenizer(config.vocab, data_palette(config.data))
    )
    train, val, test = split_corpus(config, tokenizer)
    seq_length = open_run(path).seq_length if resume and path else window_length(config, train.rows)
    mode: Any = config.target_mode
    stride = config.stride or (seq_length if mode == "all" else 32)
    lead = start_length(mode, seq_length)
    mirrored = train.mirrored(tokenizer) if config.mirror else None
    train_rows = train.rows + ([] if mirrored is None else mirrored.rows)
    datasets = [
        PxByDataset(with_start(rows, lead), seq_length, stride, mode, vocab_size=tokenizer.vocab_size)
        for rows in (train_rows, val.rows)
    ]
    model = build_model(config, tokenizer.vocab_size)
    if path is None:
        path = new_run_folder(config.model)
    tokens = sum(len(row) for row in train_rows)
    images = "" if mirrored is None else f"with mirror images of {len(mirrored)}, "
    say(
        f"data: {train.meta.get('source', config.data)}, {len(train)} + {len(val)} + {len(test)} items to train, "
        f"validate and test on, {images}{tokens:,} training tokens in windows of {seq_length}"
    )
    parameters = sum(p.numel() for p in model.parameters())
    say(f"model: {type(model).__name__}, {parameters:,} parameters, {'causal' if model.causal else 'bidirectional'}")
    path = make_folder(path)
    try:
        trainer = _trainer(config, model, datasets, device, path, resume)
    except BaseException:
        with contextlib.suppress(OSError):  # a folder of an earlier run is not empty and stays
            path.rmdir()
        raise
    say(f"training: on {device.type} in {trainer.processes} process{'es' if trainer.processes > 1 else ''}")
    write_json(path / "config.json", {"train": config.to_dict(), "seq_length": seq_length})
    tokenizer.save(path / "tokenizer.json")
    say(f"run: {path}")
    trainer.train()
    loss_curve(trainer.history, path / "loss.png", title=f"{path.name}: loss")
    run = open_run(path)
    best = run.model("best", config.device)
    evaluate_run(run, model=best, corpora=(train, val, test), say=say)
    write_samples(run, best, test)
    say(f"written: {path}/metrics.json, loss.png, samples.png, samples.txt")
    return path


def _trainer(
    config: TrainConfig,
    model: SequenceModel,
    datasets: Sequence[PxByDataset],
    device: torch.device,
    path: Path,
    resume: bool,
) -> Trainer:
    return Trainer(
        model,
        datasets[0],
        None,
        config.batch_size,
        config.learning_rate,
        config.epochs,
        compile_model=config.compile,
        eval_every=config.eval_every,
        val_dataset=datasets[1],
        seed=config.seed,
        weight_decay=config.weight_decay,
        betas=(0.9, config.beta2),
        grad_clip=config.grad_clip,
        schedule=config.schedule,
        max_minutes=config.max_minutes or None,
        max_steps=config.max_steps,
        amp=config.amp,
        num_workers=config.workers,
        processes=_processes(config, device),
        device=device,
        resume=resume,
        run_dir=path,
    )


def _processes(config: TrainConfig, device: torch.device) -> int:
    """Where none are asked for, one for each thread of torch's: the cores it may use, or OMP_NUM_THREADS."""
    if config.processes is not None:
        return config.processes
    if device.type != "cpu" or config.compile:
        return 1
    return min(torch.get_num_threads(), config.batch_size)


def evaluate_run(
    run: Run,
    checkpoint: str = "best",
    split: str = "test",
    *,
    data: str | None = None,
    model: SequenceModel | None = None,
    corpora: tuple[Corpus, Corpus, Corpus] | None = None,
    device: str | None = None,
    say: Callable[[str], Any] = print,
) -> dict[str, Any]:
    """Evaluate a run's model and write the result as JSON beside it.

    Args:
        checkpoint, split: "best" or "last"; "train", "val" or "test".
        data: evaluate on all items of this folder instead.
        model, corpora: given when they are loaded already.
    """
    parts = dict(zip(("train", "val", "test"), corpora or run.corpora(), strict=True))
    measured = parts[split] if data is None else load_corpus(data, replace(run.config, limit=None), run.tokenizer)
    model = model or run.model(checkpoint, device)
    mode = run.config.target_mode
    metrics = evaluate(
        model,
        measured.rows,
        run.tokenizer,
        train_rows=parts["train"].rows,
        seq_length=run.seq_length,
        targets=mode,
        progress=True,
    )
    standard = checkpoint == "best" and split == "test" and data is None
    name = "metrics.json" if standard else f"metrics-{split if data is None else Path(data).name}-{checkpoint}.json"
    what = data or split
    described = {"checkpoint": checkpoint, "split": what, "items": len(measured), "targets": mode, "metrics": metrics}
    write_json(run.path / name, described)
    say(f"{what}: {len(measured)} items, checkpoint {checkpoint}")
    say(format_table(metrics))
    return described


def write_samples(run: Run, model: SequenceModel, test: Corpus) -> list[Sample]:
    """Draw images from captions of test items, and captions from their images; samples.png and samples.txt."""
    count = 8 if model.incremental else 2  # of each sort
    items = np.linspace(0, len(test) - 1, min(2 * count, len(test))).astype(int).tolist()
    titles, prompts = [], []
    if run.config.order != "image-first":
        prompts += [Prompt(text=test.captions[index], exact=True) for index in items[::2]]
        titles += ["drawn from the text"] * len(prompts)
    if run.config.order != "text-first":
        prompts += [Prompt(image=test.images[index]) for index in items[1::2]]
        titles += ["written for the image"] * (len(prompts) - len(titles))
    samples = generate(model, run.tokenizer, prompts, temperature=0.8, seed=0, context=run.seq_length)
    cells = [(sample.image, f"{title}: {sample.text}") for title, sample in zip(titles, samples, strict=True)]
    save_png(sheet(cells), run.path / "samples.png")
    write_text(run.path / "samples.txt", "".join(f"{index}\t{text}\n" for index, (_, text) in enumerate(cells, 1)))
    return samples


def changed(config: TrainConfig, values: dict[str, Any]) -> TrainConfig:
    """A run's settings with those that may differ when it goes on; another one is an error."""
    for name, value in values.items():
        if name not in RESUMABLE and value != getattr(config, name):
            raise ValueError(f"{name}: a run that goes on keeps its {getattr(config, name)!r}, got {value!r}")
    return replace(config, **values)


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"device: {name!r} cannot be used: {reason}") from error
    return device
