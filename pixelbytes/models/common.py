"""What every model shares: logits for each position, the loss, saving and loading, decoding step by step."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any, ClassVar

import safetensors
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pixelbytes._files import make_folder, read_json, write_bytes, write_json

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
IGNORE = -100  # target without meaning: padding


class SequenceModel(nn.Module):
    """A model of windows of 3x3 ids, predicting the centre of the next window.

    A family gives `hidden`, `head`, `config_dict` and `from_config`, and sets `vocab_size` and `causal`.
    `causal` says that position t depends on windows 0..t only, so that every position may be a target.
    """

    _classes: ClassVar[dict[str, type[SequenceModel]]] = {}
    vocab_size: int
    causal: bool

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        SequenceModel._classes[cls.__name__] = cls

    def hidden(self, x: Tensor) -> Tensor:
        """x (batch, seqlen, 3, 3), integers -> (batch, seqlen, width)."""
        raise NotImplementedError

    def head(self, h: Tensor) -> Tensor:
        """h (..., width) -> logits (..., vocab_size)."""
        raise NotImplementedError

    def config_dict(self) -> dict[str, Any]:
        """The settings that `from_config` takes, as plain JSON values."""
        raise NotImplementedError

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> SequenceModel:
        """Make a model with fresh weights."""
        try:
            return cls(**config)
        except TypeError as error:
            raise ValueError(f"{cls.__name__}: these settings do not fit: {error}") from error

    def forward(self, x: Tensor) -> Tensor:
        """x (batch, seqlen, 3, 3), integers -> logits (batch, seqlen, vocab_size)."""
        return self.head(self.hidden(check_windows(x, self.vocab_size)))

    def last_logits(self, x: Tensor) -> Tensor:
        """Logits of the last position only, (batch, vocab_size)."""
        return self.head(self.hidden(check_windows(x, self.vocab_size))[:, -1])

    def loss(self, x: Tensor, target: Tensor) -> tuple[Tensor, int]:
        """Mean cross-entropy in nats, and the number of targets that it is the mean of.

        Args:
            x: (batch, seqlen, 3, 3), integers.
            target: int64; (batch,): the centre of the window after the last; (batch, seqlen): that of the window after
                each position, for causal models only. -100 is ignored.

        Raises:
            ValueError: wrong shape; or a target for every position with a model that is not causal.
        """
        logits, target = self.logits_for(x, target)
        n_targets = int((target != IGNORE).sum())
        total = F.cross_entropy(logits.float(), target, ignore_index=IGNORE, reduction="sum")
        return total / max(n_targets, 1), n_targets

    def logits_for(self, x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """The logits that belong to `target` (see `loss`), both flattened to one row a target."""
        check_windows(x, self.vocab_size)
        if target.shape == x.shape[:1]:
            # The head is as wide as the vocabulary: it runs on the one position that has a target.
            return self.last_logits(x), target
        if target.shape == x.shape[:2]:
            if not self.causal:
                raise ValueError(
                    f"{type(self).__name__}: targets at every position need a causal model. This one is bidirectional: "
                    "each position has already read the windows after it, so it would copy its target (a leak). "
                    "Use bidirectional=False, or one target per window (targets='last')"
                )
            return self(x).flatten(0, 1), target.flatten()
        raise ValueError(
            f"target: shape must be {tuple(x.shape[:1])} or {tuple(x.shape[:2])} for windows {tuple(x.shape)}, "
            f"got {tuple(target.shape)}"
        )

    # -- decoding -----------------------------------------------------------------------------------------------

    @property
    def incremental(self) -> bool:
        """True when `step` costs the same however long the sequence is; otherwise it recomputes its window."""
        return False

    def init_state(self, batch: int, context: int = 256) -> Any:
        """State for `step` before the first window. Models that recompute see the last `context` windows.

        Those that are not causal were trained on full windows only: theirs begins as null windows.
        """
        device = next(self.parameters()).device
        before = 0 if self.causal else context - 1
        return {"context": context, "windows": torch.zeros(batch, before, 3, 3, dtype=torch.long, device=device)}

    @torch.no_grad()
    def step(self, window: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Read one window (batch, 3, 3); returns the logits of what follows, (batch, vocab_size), and the state."""
        windows = torch.cat([state["windows"], window[:, None].long()], dim=1)[:, -state["context"] :]
        return self.last_logits(windows).float(), {**state, "windows": windows}

    # -- saving and loading -------------------------------------------------------------------------------------

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors, each aside and then renamed."""
        folder = make_folder(folder)
        weights = {key: value.detach().cpu().contiguous() for key, value in self.state_dict().items()}
        write_bytes(folder / WEIGHTS_FILE, safetensors.torch.save(weights, metadata={"format": "pt"}))
        write_json(folder / CONFIG_FILE, {"model": type(self).__name__, "config": self.config_dict()})

    @classmethod
    def from_pretrained(cls, source: str | Path, *, subfolder: str = "", revision: str | None = None) -> SequenceModel:
        """Load from a folder, or from a repository on the Hugging Face hub ("user/name").

        Raises:
            OSError: nothing can be read there.
            ValueError: what is there is damaged or not a model of this class; the message names the file.
        """
        config_path, weights_path = (
            _locate(str(source), name, subfolder, revision) for name in (CONFIG_FILE, WEIGHTS_FILE)
        )
        described = read_json(config_path)
        if not isinstance(described, dict) or not {"model", "config"} <= described.keys():
            raise ValueError(f"{config_path}: not a PixelBytes model, 'model' and 'config' are wanted")
        found = cls._classes.get(str(described["model"]))
        if found is None or not issubclass(found, cls):
            raise ValueError(f"{config_path}: holds a {described['model']}, not a {cls.__name__}")
        try:
            model = found.from_config(described["config"])
        except (ValueError, TypeError) as error:
            raise ValueError(f"{config_path}: {error}") from error
        load_weights(model, weights_path)
        return model


def check_windows(x: Tensor, vocab_size: int) -> Tensor:
    """Refuse anything but (batch, seqlen >= 1, 3, 3) ids below `vocab_size`, with a sentence.

    On a GPU the range is not checked: reading it back would make every step wait.
    """
    if x.dim() != 4 or x.shape[2:] != (3, 3) or x.shape[1] == 0:
        raise ValueError(f"x: windows must have shape (batch, seqlen >= 1, 3, 3), got {tuple(x.shape)}")
    if x.dtype.is_floating_point or x.dtype == torch.bool:
        raise TypeError(f"x: windows must hold integer ids, got {x.dtype}")
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        low, high = (int(v) for v in torch.aminmax(x))
        if low < 0 or high >= vocab_size:
            raise ValueError(f"x: ids must be 0..{vocab_size - 1}, got {low}..{high}")
    return x


def load_weights(model: nn.Module, path: str | Path) -> dict[str, Any]:
    """Load weights into `model` from .safetensors, or from a .pth file of this or the first published version.

    A .pth is read with weights_only=True: a bare state_dict, or a dictionary with `model_state_dict`. The prefixes that
    torch.compile (`_orig_mod.`) and DataParallel (`module.`) leave on the names are taken off.

    Returns:
        What else the file holds (`epoch`, `optimizer_state_dict`, ...).

    Raises:
        OSError: the file cannot be read.
        ValueError: it is damaged, or does not fit the model; the message names the file.
    """
    path = Path(path)
    rest: dict[str, Any] = {}
    try:
        if path.suffix == ".safetensors":
            weights: Any = safetensors.torch.load(path.read_bytes())
        else:
            weights = torch.load(path, map_location="cpu", weights_only=True)
            if isinstance(weights, dict) and "model_state_dict" in weights:
                rest = {key: value for key, value in weights.items() if key != "model_state_dict"}
                weights = weights["model_state_dict"]
    except OSError as error:
        raise OSError(f"cannot read the checkpoint {path}: {error.strerror or error}") from error
    except (safetensors.SafetensorError, pickle.UnpicklingError, RuntimeError, ValueError, EOFError, KeyError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"the checkpoint {path} is damaged or not a checkpoint: {reason}") from error
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise ValueError(f"the checkpoint {path} holds no weights")
    weights = {key.removeprefix("module.").removeprefix("_orig_mod."): value for key, value in weights.items()}
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"the checkpoint {path} does not fit the model: {reason[:300]}") from error
    return rest


def _locate(source: str, name: str, subfolder: str, revision: str | None) -> Path:
    """The path of a file of a saved model, fetched from the hub if `source` is no folder."""
    folder = Path(source) / subfolder
    if folder.is_dir():
        if not (folder / name).is_file():
            raise OSError(f"{folder} holds no saved model: {name} is missing")
        return folder / name
    if source.count("/") != 1 or source.startswith((".", "/", "~")):
        raise OSError(f"{folder}: no such folder")
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(source, name, subfolder=subfolder or None, revision=revision))
    except Exception as error:  # the hub's client raises a dozen unrelated classes
        reason = str(error).strip().split("\n")[0]
        raise OSError(f"{source}: no such folder, and the hub does not give {name}: {reason}") from error
