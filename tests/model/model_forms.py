"""Small models of every family and form, and what tests of their training share."""

from __future__ import annotations

import multiprocessing
import os
import signal

import torch
from torch.utils.data import Dataset

from pixelbytes.models import create

FORMS = {
    "mamba": ("mamba", {"dim": 16, "d_state": 4, "depth": 1, "bidirectional": False}),
    "mamba-norm-centre": (
        "mamba",
        {"dim": 16, "d_state": 4, "depth": 1, "bidirectional": False, "norm": True, "pxby_embed": False},
    ),
    "mamba-bi": ("mamba", {"dim": 16, "d_state": 4, "depth": 1, "conv": False}),
    "rnn": ("rnn", {"embedding_dim": 4, "hidden_dim": 16, "depth": 2}),
    "rnn-bi": ("rnn", {"embedding_dim": 12, "hidden_dim": 16, "depth": 2, "bidirectional": True, "pxby": True}),
    "attention": ("attention", {"embedding_dim": 4, "hidden_dim": 16, "num_heads": 2, "num_layers": 2}),
    "attention-bi": ("attention", {"embedding_dim": 12, "hidden_dim": 16, "bidirectional": True, "pxby": True}),
}
CAUSAL = [
    name for name, (_, config) in FORMS.items() if config.get("bidirectional") is False or name in ("rnn", "attention")
]
BIDIRECTIONAL = [name for name in FORMS if name not in CAUSAL]


def make(name, vocab_size=113):
    family, config = FORMS[name]
    torch.manual_seed(0)
    return create(family, vocab_size=vocab_size, **config)


def weights(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def assert_same(a, b):
    assert a.keys() == b.keys()
    for key in a:
        assert torch.equal(a[key], b[key]), key


class CtrlC(Dataset):
    """Presses Ctrl-C in a terminal, which all processes of the group get, when asked for its `at`-th item."""

    def __init__(self, inner, at):
        self.inner, self.left = inner, at

    def __len__(self):
        return len(self.inner)

    def __getitem__(self, index):
        self.left -= 1
        if self.left == 0:
            for process in (multiprocessing.parent_process(), *multiprocessing.active_children()):
                if process is not None:
                    os.kill(process.pid, signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        return self.inner[index]
