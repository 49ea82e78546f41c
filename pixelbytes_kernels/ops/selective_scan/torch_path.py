"""selective_scan in pure PyTorch, lean in memory: chunk by chunk, keeping one state a chunk and recomputing the rest.

The fallback where nothing compiled is usable; any device, any dtype that torch knows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..._autograd import autograd_inside_op
from .autograd import Direction, Options, compute_dtype, states_size, tensors_of
from .reference import selective_scan_ref

CHUNK = 64


def states_shape(batch: int, groups: int, dim: int, seqlen: int, dstate: int, dtype: torch.dtype) -> tuple[int, ...]:
    return ((seqlen + CHUNK - 1) // CHUNK, batch, dim, dstate)


def complete(directions: tuple[Direction, ...]) -> list[Direction]:
    """The second direction with the first's tensors where it shares them."""
    first = directions[0]
    whole = [first]
    for d in directions[1:]:
        tensors = [s if t is None else t for t, s in zip(d.tensors[:7], first.tensors[:7], strict=True)]
        whole.append(Direction(*tensors, reverse=d.reverse))  # type: ignore
    return whole


def chunk_spans(direction: Direction, seqlen: int) -> list[tuple[int, int, int]]:
    """(chunk, start, stop) in scan order."""
    spans = [(k, t, min(t + CHUNK, seqlen)) for k, t in enumerate(range(0, seqlen, CHUNK))]
    return spans[::-1] if direction.reverse else spans


def chunk_scan(
    tensors: Sequence[Tensor | None],
    state: Tensor,
    seq_idx: Tensor | None,
    delta_softplus: bool,
    direction: Direction,
    start: int,
    stop: int,
) -> tuple[Tensor, Tensor]:
    """One chunk of one direction, without gate: `tensors` are the chunk's u ... delta_bias."""
    u, delta, A, B, C, D, delta_bias = tensors
    assert u is not None and delta is not None and A is not None and B is not None and C is not None
    dtype = state.dtype
    u, delta, A, B, C = (t.to(dtype) for t in (u, delta, A, B, C))
    D, delta_bias = (None if t is None else t.to(dtype) for t in (D, delta_bias))
    if seq_idx is not None:
        edge = stop if direction.reverse else start - 1
        if 0 <= edge < seq_idx.shape[1]:
            same = seq_idx[:, edge] == seq_idx[:, stop - 1 if direction.reverse else start]
            state = torch.where(same[:, None, None], state, 0)
        seq_idx = seq_idx[:, start:stop]
    return selective_scan_ref(
        u,
        delta,
        A,
        B,
        C,
        D,
        None,
        delta_bias,
        delta_softplus,
        True,
        initial_state=state,
        seq_idx=seq_idx,
        reverse=direction.reverse,
    )  # type: ignore[return-value]


def cut(direction: Direction, start: int, stop: int) -> list[Tensor | None]:
    """The tensors of a direction as one chunk sees them."""
    return [t if t is None or t.ndim <= 2 else t[..., start:stop] for t in direction.tensors[:7]]


def forward(
    directions: tuple[Direction, ...], z: Tensor | None, seq_idx: Tensor | None, options: Options, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    first = directions[0]
    assert first.u is not None and first.A is not None
    u, dtype = first.u, compute_dtype(first.u)
    states = u.new_empty(states_size("torch", directions) if keep else (0,), dtype=dtype)
    y = torch.zeros_like(u, dtype=dtype)
    last_state = None
    for i, direction in enumerate(complete(directions)):
        state = u.new_zeros(u.shape[0], u.shape[1], first.A.shape[1], dtype=dtype)
        if direction.initial_state is not None:
            state = direction.initial_state.to(dtype)
        for chunk, start, stop in chunk_spans(direction, u.shape[2]):
            if keep:
                states[i, chunk] = state
            out, state = chunk_scan(
                cut(direction, start, stop), state, seq_idx, options.delta_softplus, direction, start, stop
            )
            y[..., start:stop] += out
        last_state = state.clone() if i == 0 else last_state
    assert last_state is not None
    return gate(y, z, options), last_state, states


def gate(y: Tensor, z: Tensor | None, options: Options) -> Tensor:
    y = y * options.scale if options.scale != 1 else y
    out = y if z is None else y * torch.nn.functional.silu(z.to(y.dtype))
    return out.to(options.out_dtype)


def backward(
    directions: tuple[Direction, ...],
    z: Tensor | None,
    seq_idx: Tensor | None,
    options: Options,
    states: Tensor,
    dout: Tensor,
    dlast_state: Tensor | None,
    needs: Sequence[bool],
    needs_z: bool,
    dz: Tensor | None = None,
    out: Tensor | None = None,
) -> tuple[list[Tensor | None], Tensor | None, Tensor | None]:
    whole = complete(directions)
    u = whole[0].u
    assert u is not None
    dtype = compute_dtype(u)
    dy = dout.to(dtype) * options.scale
    if z is not None:
        dy = dy * torch.nn.functional.silu(z.to(dtype))
    y = torch.zeros_like(dy) if z is not None else None
    grads = [None if t is None else torch.zeros_like(t, dtype=dtype) for t in tensors_of(directions)]
    for i, direction in enumerate(whole):
        dstate = torch.zeros_like(states[i, 0]) if states[i].shape[0] else states.new_zeros(())
        if i == 0 and dlast_state is not None:
            dstate = dlast_state.to(dtype)
        for chunk, start, stop in reversed(chunk_spans(direction, u.shape[2])):
            with autograd_inside_op():
                pieces = [None if t is None else t.detach().requires_grad_() for t in cut(direction, start, stop)]
                state = states[i, chunk].detach().requires_grad_()
                part, last = chunk_scan(pieces, state, seq_idx, options.delta_softplus, direction, start, stop)
                inputs = [t for t in (*pieces, state) if t is not None]
                found = torch.autograd.grad((part, last), inputs, (dy[..., start:stop], dstate), allow_unused=True)
            if y is not None:
                y[..., start:stop] += part.detach()
            piece_grads = iter(found)
            for k, piece in enumerate(pieces):
                if piece is None:
                    continue
                grad = next(piece_grads)
                target = grads[8 * i + k] if directions[i].tensors[k] is not None else grads[k]
                if grad is not None and target is not None:
                    (target if target.ndim <= 2 else target[..., start:stop]).add_(grad)
            last_grad = next(piece_grads)
            dstate = torch.zeros_like(state) if last_grad is None else last_grad
        if i == 0 and grads[7] is not None:
            grads[7] = dstate
    if needs_z and z is not None and y is not None:
        gate_input = z.to(dtype)
        sigmoid = torch.sigmoid(gate_input)
        grad = (dout.to(dtype) * options.scale * y * sigmoid * (1 + gate_input * (1 - sigmoid))).to(z.dtype)
        dz = grad if dz is None else dz.copy_(grad)
    if out is not None and y is not None:
        out.copy_(gate(y, z, options))
    result = [
        g.to(t.dtype) if need and g is not None and t is not None else None
        for g, t, need in zip(grads, tensors_of(directions), needs, strict=True)
    ]
    return result, dz, out
