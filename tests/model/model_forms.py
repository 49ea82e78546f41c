"""Small models of every family and form."""

from __future__ import annotations

import torch

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
