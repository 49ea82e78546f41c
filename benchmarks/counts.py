"""What each op cannot avoid: bytes (every input read once, every output written once) and operations.

Operations are those of the formula: each multiplication, addition and exponential counts one. Roofs and predictions
(model.py) and the shares of bandwidth and peak in every table come from here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

BOTH = "forward + backward"

# Of one state update (one step of one state of one channel):
#   forward   delta A, exp, decay h, (delta u) B, sum, C h and its sum
#   backward  the same again without y, then dh += C dy, dC += dy h, dB += x dh, dx += B dh (2 each), dh *= decay,
#             decay h dh, ddelta += A g, dA += delta g (2 each)
SCAN_FORWARD, SCAN_BACKWARD = 7, 5 + 14


@dataclass(frozen=True)
class Work:
    """Of one call: bytes moved, operations, and how many of these are exponentials."""

    bytes: float
    flops: float
    exps: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(self.bytes + other.bytes, self.flops + other.flops, self.exps + other.exps)


def _parts(forward: Work, backward: Work) -> dict[str, Work]:
    return {"forward": forward, "backward": backward, BOTH: forward + backward}


def scan(sizes: Mapping[str, int], itemsize: int, bidirectional: bool) -> dict[str, Work]:
    """Of a scan with z, delta bias and softplus, B and C of one group; both directions share their inputs."""
    steps = sizes["batch"] * sizes["seqlen"] * sizes["dim"]  # of a channel
    updates = steps * sizes["dstate"] * (2 if bidirectional else 1)
    shared = sizes["batch"] * sizes["seqlen"] * sizes["dstate"]  # of B, and of C
    return _parts(
        Work(itemsize * (4 * steps + 2 * shared), SCAN_FORWARD * updates, updates),  # u, delta, z -> out
        Work(itemsize * (7 * steps + 4 * shared), SCAN_BACKWARD * updates, updates),  # and dout -> du, ddelta, dz
    )


def conv(batch: int, seqlen: int, dim: int, width: int, itemsize: int) -> dict[str, Work]:
    """Of `causal_conv1d` with a bias and SiLU (a multiplication and an addition a tap, four for SiLU)."""
    elements = batch * seqlen * dim
    return _parts(
        Work(2.0 * itemsize * elements, (2 * width + 4) * elements, elements),
        Work(3.0 * itemsize * elements, (6 * width + 8) * elements, elements),
    )


def embed(batch: int, seqlen: int, dim: int, id_bytes: int, itemsize: int) -> dict[str, Work]:
    """Of `pxby_embed`, folded: nine table rows are summed and normed (some eight operations an element). The table and
    the fold are left out: they do not grow with the sequence.
    """
    tokens = batch * seqlen
    return _parts(
        Work(tokens * (9 * id_bytes + dim * itemsize), tokens * dim * (9 + 8)),
        Work(tokens * (9 * id_bytes + dim * itemsize), tokens * dim * (9 + 8 + 12)),
    )


def decode(layers: int, d_model: int, batch: int, d_state: int = 16, d_conv: int = 4, expand: int = 2) -> Work:
    """Of one token through a stack of Mamba blocks in float32: weights read once, states read and written."""
    inner, rank = expand * d_model, -(-d_model // 16)
    matrices = d_model * 2 * inner + inner * (rank + 2 * d_state) + rank * inner + inner * d_model
    vectors = inner * (d_conv + d_state + 3) + d_model
    states = inner * (d_state + d_conv - 1)
    flops = layers * batch * (2 * matrices + inner * (SCAN_FORWARD * d_state + 2 * d_conv + 12))
    exps = layers * batch * inner * (d_state + 3)
    return Work(4.0 * layers * (matrices + vectors + 2 * batch * states), flops, exps)
