"""What is installed, which kernels run here, what the embedded set and a run hold."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import torch

import pixelbytes_kernels
from pixelbytes import __version__
from pixelbytes._files import read_json
from pixelbytes.dataset import load_embedded
from pixelbytes.evaluate import format_table
from pixelbytes.runs import open_run
from pixelbytes.tokenizer import PixelBytesTokenizer


def describe(run: str | Path | None = None) -> str:
    """A few lines about the installation, or about a run folder."""
    return _describe_run(Path(run)) if run is not None else _describe_installation()


def _describe_installation() -> str:
    cuda = torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA device"
    lines = [
        f"pixelbytes {__version__}, Python {platform.python_version()}, torch {torch.__version__}, "
        f"{torch.get_num_threads()} threads, {cuda}",
        "kernels:",
    ]
    for name, (usable, reason) in pixelbytes_kernels.available_backends().items():
        lines.append(f"  {name:<10}{'usable' if usable else 'not usable'}{f' ({reason})' if reason else ''}")
    lines.append("vocabularies:")
    for kind in ("compat", "bytes"):
        tokenizer = PixelBytesTokenizer(kind)
        lines.append(f"  {kind:<10}{len(tokenizer)} ids, {len(tokenizer.palette)} of them colours")
    corpus = load_embedded(PixelBytesTokenizer())
    tokens = sum(len(row) for row in corpus.rows)
    lines.append(f"embedded set: {len(corpus)} items, {tokens:,} tokens")
    lines += [f"  {key}: {value}" for key, value in corpus.meta.items() if isinstance(value, str | int)]
    return "\n".join(lines)


def _describe_run(path: Path) -> str:
    run = open_run(path)
    lines = [f"{path}: windows of {run.seq_length}, {run.tokenizer}", "settings:"]
    lines += [f"  {key}: {value}" for key, value in run.config.to_dict().items() if value is not None]
    checkpoints = [name for name in ("best", "last") if (path / name / "model.safetensors").is_file()]
    lines.append(f"checkpoints: {', '.join(checkpoints) or 'none yet'}")
    metrics = path / "metrics.json"
    if metrics.is_file():
        described: Any = read_json(metrics)
        try:
            lines += [f"{described['split']}, {described['items']} items:", format_table(described["metrics"])]
        except (KeyError, TypeError) as error:
            raise ValueError(f"{metrics}: not the metrics of a run: {error}") from error
    return "\n".join(lines)
