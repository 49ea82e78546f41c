"""The settings of a training run: data only, so that the command line can show them without loading torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any

CHOICES = {
    "vocab": ("compat", "bytes"),
    "order": ("both", "image-first", "text-first"),
    "model": ("mamba", "rnn", "attention"),
    "embed": ("pxby", "centre"),
    "targets": ("auto", "all", "last"),
    "schedule": ("cosine", "constant"),
    "amp": ("off", "bf16", "fp16"),
}

# Settings that runs were once saved without, and what such a run did.
ONCE: dict[str, Any] = {"mirror": False}


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class TrainConfig:
    """What `pixelbytes train` does. Written to the run folder, read again by every later command.

    The defaults train a causal Mamba on every position of the embedded set, for a few minutes on two cores.
    """

    # data
    data: str | None = _option(
        None, "data folder (NAME.png + NAME.txt) or packed .npz; default: the embedded OpenMoji set"
    )
    vocab: str = _option("compat", "compat: 113 ids, lower-case ASCII; bytes: any text, unchanged")
    order: str = _option(
        "both", "what comes first in a row; both: each item is seen both ways, as generation from text wants"
    )
    limit: int | None = _option(None, "use at most this many items")
    mirror: bool = _option(
        True,
        "train on each sprite's mirror image too, unless its caption names a side; --no-mirror for pictures with writing",
    )
    seed: int = _option(0, "of the split into training, validation and test items, of the weights and of the order")
    # model
    model: str = _option("mamba", "family")
    bidirectional: bool = _option(False, "read windows both ways, one target a window (the paper's objective)")
    dim: int = _option(64, "width of the model")
    state: int = _option(8, "state size of a Mamba channel")
    depth: int = _option(1, "layers; for mamba those between the in and out stages")
    heads: int = _option(4, "attention heads")
    embed: str = _option("pxby", "pxby: the 3x3 window; centre: its centre alone (mamba)")
    conv: bool = _option(True, "the 3x3 convolution of the embedding")
    norm: bool = _option(True, "RMSNorm before each block (mamba); upstream has none")
    # training
    targets: str = _option("auto", "all: every position (causal models only); last: one a window; auto: all if causal")
    seq_length: int | None = _option(
        None, "tokens in a window; default: whole rows for all, at most 1024, 256 for last"
    )
    stride: int | None = _option(None, "tokens between windows; default: seq_length for all, 32 for last")
    batch_size: int = _option(2, "windows a step")
    learning_rate: float = _option(1e-2, "highest learning rate (AdamW)")
    weight_decay: float = _option(0.01, "of AdamW")
    beta2: float = _option(0.95, "share that AdamW's mean of squared gradients keeps a step")
    grad_clip: float = _option(0.3, "highest norm of the gradients")
    schedule: str = _option("cosine", "of the learning rate")
    epochs: int = _option(1000, "stop after this many epochs")
    max_minutes: float | None = _option(4.5, "stop after this many minutes of training; 0: no limit")
    max_steps: int | None = _option(None, "stop after this many steps")
    eval_every: int = _option(1, "epochs between evaluations on the validation items")
    amp: str = _option("off", "mixed precision")
    workers: int = _option(0, "processes that load data")
    processes: int | None = _option(
        None,
        "processes that share the windows of a step; default: on a CPU as many as cores, at most batch_size; else 1",
    )
    device: str | None = _option(None, "cpu, cuda, cuda:1, ...; default: cuda where there is one")
    compile: bool = _option(False, "torch.compile the model")

    def __post_init__(self) -> None:
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name == "beta2":
                if not 0 <= value < 1:
                    raise ValueError(f"beta2 must lie in 0 <= beta2 < 1, got {value}")
                continue
            at_least = {"weight_decay": 0, "workers": 0, "seed": 0, "max_minutes": 0}.get(f.name, 1)
            if f.name in ("learning_rate", "grad_clip"):
                if not value > 0:
                    raise ValueError(f"{f.name} must be positive, got {value}")
            elif isinstance(value, int | float) and not isinstance(value, bool) and not value >= at_least:
                raise ValueError(f"{f.name} must be at least {at_least}, got {value}")
        if self.bidirectional and self.targets == "all":
            raise ValueError(
                "targets: 'all' needs a causal model; a bidirectional one has read the windows after each position, so "
                "it would copy its target (a leak)"
            )

    @property
    def target_mode(self) -> str:
        """ "all" or "last"."""
        if self.targets != "auto":
            return self.targets
        return "last" if self.bidirectional else "all"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Any, name: str = "config") -> TrainConfig:
        """Inverse of `to_dict`, older runs' included; an error names `name`."""
        if not isinstance(values, dict):
            raise ValueError(f"{name}: not the settings of a run")
        unknown = values.keys() - {f.name for f in fields(cls)}
        if unknown:
            raise ValueError(f"{name}: unknown setting {sorted(unknown)[0]!r}")
        try:
            return cls(**(ONCE | values))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{name}: {error}") from error
