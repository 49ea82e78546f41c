"""Whether every id is in the vocabulary."""

from __future__ import annotations

import os

import torch
from torch import Tensor

SWITCH = "PIXELBYTES_CHECK_IDS"


def check_ids(tokens: Tensor, vocab: int) -> None:
    """IndexError for the first id outside [0, vocab), with its place.

    On a GPU the check waits for the device, so it is done only where the environment variable PIXELBYTES_CHECK_IDS is 1. While a graph is
    compiled or captured it is left out.
    """
    if tokens.numel() == 0 or torch.compiler.is_compiling():
        return
    if tokens.device.type != "cpu" and (os.environ.get(SWITCH, "0") != "1" or _is_capturing(tokens)):
        return
    low, high = torch.aminmax(tokens)
    if low >= 0 and high < vocab:
        return
    first = torch.nonzero((tokens < 0) | (tokens.long() >= vocab))[0].tolist()
    raise IndexError(
        f"pxby_embed: id {int(tokens[tuple(first)])} at tokens{first} is outside the vocabulary [0, {vocab})"
    )


def _is_capturing(tokens: Tensor) -> bool:
    return tokens.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
