"""Rows cut into stretches of time, for a device that too few rows leave idle.

A stretch is scanned like a row. What it starts from follows from the stretches before it: from the state that each of them reaches from
zero, and from the share exp(A sum(dt)) of an earlier state that is left at its end. So everything is computed twice, by many more blocks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .autograd import Direction

BLOCKS = 3  # that a multiprocessor holds at once: see docs/gpu.md
# Estimates, which nobody has timed: below this many steps a stretch is taken to cost more in launches and carried states than it gains, and
# twice the work to want clearly more than twice the blocks.
LEAST_STEPS = 128
LEAST_STRETCHES = 4


def stretch_steps(blocks: int, seqlen: int, multiprocessors: int, chunk: int) -> int:
    """Steps of a stretch, a multiple of `chunk`, or 0 where rows stay whole. `blocks`: of a launch that cuts nothing."""
    wanted = min(multiprocessors * BLOCKS // max(blocks, 1), seqlen // LEAST_STEPS)
    return -(-seqlen // (wanted * chunk)) * chunk if wanted >= LEAST_STRETCHES else 0


def shares_left(directions: Sequence[Direction], delta_softplus: bool, steps: int) -> list[Tensor]:
    """exp(A sum(dt)) over every stretch, by direction: (stretch, batch, dim, dstate), fp32."""
    first, found = directions[0], []
    for d in directions:
        delta, A, bias = (
            of if own is None else own
            for own, of in ((d.delta, first.delta), (d.A, first.A), (d.delta_bias, first.delta_bias))
        )
        assert delta is not None and A is not None
        dt = delta.detach().float()
        dt = dt if bias is None else dt + bias.detach().float()[:, None]
        dt = F.softplus(dt) if delta_softplus else dt
        sums = torch.stack([part.sum(2) for part in dt.split(steps, 2)])
        found.append(torch.exp(sums[..., None] * A.detach().float()))
    return found


def carried(reached: Tensor, shares: Tensor, downwards: bool, first: Tensor | None) -> Tensor:
    """What every stretch starts from, (stretch, batch, dim, dstate).

    `reached`: where a stretch arrives from zero, the one that is walked first from `first`. `downwards`: that is the last in time.
    """
    starts = torch.empty_like(reached)
    order = list(range(len(reached)))
    if downwards:
        order.reverse()
    before = order[0]
    starts[before] = 0 if first is None else first
    for stretch in order[1:]:
        # The share of `first` is in `reached` already.
        starts[stretch] = (
            reached[before] if before == order[0] else torch.addcmul(reached[before], shares[before], starts[before])
        )
        before = stretch
    return starts
