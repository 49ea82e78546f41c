"""Autograd of the scan, for one direction or two, over whichever backend was chosen.

Eager code goes through `Scan`, a plain autograd.Function. Under torch.compile, export and opcheck the same calls are the
registered ops `pixelbytes::selective_scan` and `pixelbytes::bidirectional_selective_scan`, each with its backward op.

A backend is a module with `forward`, `backward` and `states_shape`; see `cpu.py` for what they take and return.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, library

from ..._autograd import once_differentiable


class Direction(NamedTuple):
    """One direction of a scan. In the second one None means: shared with the first.

    B, C: (dim, dstate) or (batch, groups, dstate, seqlen); for the backend cpu also (batch, dstate, seqlen), since views take their time.
    """

    u: Tensor | None
    delta: Tensor | None
    A: Tensor | None
    B: Tensor | None
    C: Tensor | None
    D: Tensor | None
    delta_bias: Tensor | None
    initial_state: Tensor | None = None
    reverse: bool = False

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """In the order of FIRST."""
        return (self.u, self.delta, self.A, self.B, self.C, self.D, self.delta_bias, self.initial_state)


def tensors_of(directions: Sequence[Direction]) -> list[Tensor | None]:
    """Every tensor that can have a gradient: 8 of the first direction, 7 of the second."""
    return [t for i, d in enumerate(directions) for t in d.tensors[: 8 if i == 0 else 7]]


def with_own_delta(directions: tuple[Direction, ...]) -> tuple[Direction, ...]:
    """A second direction with a bias of its own sees another step size: the kernel wants its delta named."""
    if len(directions) == 2 and directions[1].delta is None and directions[1].delta_bias is not None:
        return directions[0], directions[1]._replace(delta=directions[0].delta)
    return directions


class Options(NamedTuple):
    """What a scan does besides its tensors: out = scale * (sum of the directions) * silu(z), in `out_dtype`."""

    delta_softplus: bool
    scale: float
    out_dtype: torch.dtype


FIRST = ("u", "delta", "A", "B", "C", "D", "delta_bias", "initial_state")
SECOND = tuple(f"{name}_rev" for name in FIRST[:7])


@functools.cache
def implementation(backend: str):
    return importlib.import_module(f".{'torch_path' if backend == 'torch' else backend}", __package__)


def compute_dtype(u: Tensor) -> torch.dtype:
    """Dtype of states and sums."""
    return torch.float64 if u.dtype == torch.float64 else torch.float32


def directions_of(
    tensors: tuple[Tensor | None, ...], bidirectional: bool, reverse: bool, grouped: bool = True
) -> tuple[Direction, ...]:
    """From the tensors as FIRST, and SECOND where `bidirectional`. `grouped`: B and C that vary get their axis of groups."""

    def direction(of: tuple[Tensor | None, ...], initial_state: Tensor | None, reverse: bool) -> Direction:
        u, delta, A, B, C, D, delta_bias = of
        if grouped:
            B, C = with_groups(B), with_groups(C)
        return Direction(u, delta, A, B, C, D, delta_bias, initial_state, reverse)

    first = direction(tensors[:7], tensors[7], reverse)
    return (first, direction(tensors[8:15], None, not reverse)) if bidirectional else (first,)


def scan(
    backend: str,
    first: tuple[Tensor | None, ...],
    second: tuple[Tensor | None, ...] | None,
    z: Tensor | None,
    seq_idx: Tensor | None,
    delta_softplus: bool,
    scale: float,
    reverse: bool,
    out_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    """Runs a checked scan: `first` as FIRST, `second` as SECOND or None. Returns out and the first direction's last state."""
    u = first[0]
    assert u is not None
    options = Options(delta_softplus, scale, out_dtype or u.dtype)
    tensors = [*first, *(second or ())]
    if not torch.compiler.is_compiling():
        return Scan.apply(backend, options, reverse, seq_idx, z, *tensors)
    names = (*FIRST, *SECOND)[: len(tensors)]
    tensors = [with_groups(t) if name[0] in "BC" else t for name, t in zip(names, tensors, strict=True)]
    if second is None:
        ops = torch.ops.pixelbytes.selective_scan
        out, last_state, _ = ops(*tensors, z, seq_idx, delta_softplus, reverse, options.out_dtype, backend)
        return out, last_state
    ops = torch.ops.pixelbytes.bidirectional_selective_scan
    out, _ = ops(*tensors[:7], *tensors[8:], z, seq_idx, delta_softplus, scale, options.out_dtype, backend)
    return out, out


def with_groups(coefficient: Tensor | None) -> Tensor | None:
    """(batch, dstate, seqlen) as one group of (batch, groups, dstate, seqlen)."""
    return coefficient.unsqueeze(1) if coefficient is not None and coefficient.ndim == 3 else coefficient


class Scan(torch.autograd.Function):
    """Saves the inputs and the state at each chunk's entry; everything else is recomputed."""

    @staticmethod
    def forward(
        ctx: Any,
        backend: str,
        options: Options,
        reverse: bool,
        seq_idx: Tensor | None,
        z: Tensor | None,
        *tensors: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        keep = any(ctx.needs_input_grad)
        directions = directions_of(tensors, len(tensors) > len(FIRST), reverse, grouped=backend != "cpu")
        out, last_state, states = implementation(backend).forward(directions, z, seq_idx, options, keep)
        ctx.save_for_backward(states, seq_idx, z, *tensors)
        ctx.config = backend, options, reverse
        ctx.set_materialize_grads(False)
        return out, last_state

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor | None, dlast_state: Tensor | None) -> tuple[Tensor | None, ...]:
        backend, options, reverse = ctx.config
        states, seq_idx, z, *tensors = ctx.saved_tensors
        if dout is None:
            dout = torch.zeros_like(tensors[0], dtype=options.out_dtype)
        grouped = backend != "cpu"
        directions = directions_of(tuple(tensors), len(tensors) > len(FIRST), reverse, grouped)
        needs = ctx.needs_input_grad
        grads, dz, _ = implementation(backend).backward(
            directions, z, seq_idx, options, states, dout, dlast_state, needs[5:], needs[4]
        )
        if grouped:  # of B and C without the axis that with_groups put in
            grads = [
                g.squeeze(1) if g is not None and g.ndim > t.ndim else g for g, t in zip(grads, tensors, strict=True)
            ]
        return (None, None, None, None, dz, *grads)


# ---- registered ops ---------------------------------------------------------------------------------------------------

_library = library.Library("pixelbytes", "FRAGMENT")
_ARGUMENTS = {
    "selective_scan": (
        (*FIRST, "z", "seq_idx"),
        "bool delta_softplus, bool reverse, ScalarType out_dtype, str backend",
    ),
    "bidirectional_selective_scan": (
        (*FIRST[:7], *SECOND, "z", "seq_idx"),
        "bool delta_softplus, float scale, ScalarType out_dtype, str backend",
    ),
}


def _register(op: str) -> None:
    names, rest = _ARGUMENTS[op]
    count = len(names)
    bidirectional = op == "bidirectional_selective_scan"
    required = ("u", "delta", "A", "B", "C")
    schema = ", ".join(f"Tensor{'' if name in required else '?'} {name}" for name in names)
    returns = "(Tensor out, Tensor states)" if bidirectional else "(Tensor out, Tensor last_state, Tensor states)"
    _library.define(f"{op}({schema}, {rest}) -> {returns}")
    _library.define(
        f"{op}_backward({schema}, Tensor states, Tensor dout, Tensor? dlast_state, bool[] needs, {rest}) -> Tensor[]"
    )

    def unpack(arguments: tuple) -> tuple[tuple[Direction, ...], Tensor | None, Tensor | None]:
        *tensors, z, seq_idx = arguments[:count]
        if bidirectional:
            tensors.insert(7, None)  # initial_state
        return directions_of(tuple(tensors), bidirectional, not bidirectional and arguments[-3]), z, seq_idx

    def options_of(arguments: tuple) -> Options:
        return Options(arguments[count], arguments[count + 1] if bidirectional else 1.0, arguments[-2])

    def pick(out: Tensor, last_state: Tensor, states: Tensor) -> tuple[Tensor, ...]:
        return (out, states) if bidirectional else (out, last_state, states)

    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        directions, z, seq_idx = unpack(arguments)
        found = implementation(arguments[-1]).forward(directions, z, seq_idx, options_of(arguments), True)
        return pick(as_promised(found[0], arguments[0]), *found[1:])

    def fake_forward(*arguments: Any) -> tuple[Tensor, ...]:
        directions, _, _ = unpack(arguments)
        u, A = directions[0].u, directions[0].A
        assert u is not None and A is not None
        out = torch.empty_like(u, dtype=arguments[-2])
        last_state = u.new_empty(u.shape[0], u.shape[1], A.shape[1], dtype=compute_dtype(u))
        return pick(out, last_state, u.new_empty(states_size(arguments[-1], directions), dtype=compute_dtype(u)))

    def backward(*arguments: Any) -> list[Tensor]:
        states, dout, dlast_state, needs = arguments[count : count + 4]
        arguments = arguments[:count] + arguments[count + 4 :]
        directions, z, seq_idx = unpack(arguments)
        *needs_tensors, needs_z, _ = needs
        if bidirectional:
            needs_tensors.insert(7, False)
        grads, dz, _ = implementation(arguments[-1]).backward(
            directions, z, seq_idx, options_of(arguments), states, dout, dlast_state, needs_tensors, needs_z
        )
        grads = list(grads)
        if bidirectional:
            del grads[7]
        pairs = zip((*grads, dz), arguments[: count - 1], strict=True)
        return [dout.new_empty(0) if grad is None else as_promised(grad, tensor) for grad, tensor in pairs]

    def fake_backward(*arguments: Any) -> list[Tensor]:
        dout, needs = arguments[count + 1], arguments[count + 3]
        return [
            torch.empty_like(t) if need and t is not None else dout.new_empty(0)
            for t, need in zip(arguments[: count - 1], needs[:-1], strict=True)
        ]

    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        ctx.save_for_backward(*inputs[:count], output[-1])
        ctx.rest = inputs[count:]

    def autograd_backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, states = ctx.saved_tensors
        needs = [ctx.needs_input_grad[i] for i in range(count)]
        dlast_state = None if bidirectional else grads[1]
        call = getattr(torch.ops.pixelbytes, f"{op}_backward")
        found = call(*tensors, states, grads[0], dlast_state, needs, *ctx.rest)
        return (
            *(g if need else None for g, need in zip([*found, None], needs, strict=True)),
            *(None for _ in ctx.rest),
        )

    def refuse(ctx: Any, *_: Any) -> None:
        raise RuntimeError(f"{op}: second derivatives are not implemented; use backend='reference' for them")

    for device in ("CPU", "CUDA", "XPU"):
        _library.impl(op, forward, device)
        _library.impl(f"{op}_backward", backward, device)
    library.register_fake(f"pixelbytes::{op}", fake_forward, lib=_library)
    library.register_fake(f"pixelbytes::{op}_backward", fake_backward, lib=_library)
    library.register_autograd(f"pixelbytes::{op}", autograd_backward, setup_context=setup_context, lib=_library)
    library.register_autograd(f"pixelbytes::{op}_backward", refuse, lib=_library)


def as_promised(found: Tensor, like: Tensor) -> Tensor:
    """`found` with the strides of `torch.empty_like(like)`, which the fakes promise and compiled code relies on."""
    strides = torch.empty_like(like, device="meta").stride()
    return found if found.stride() == strides else torch.empty_like(like, dtype=found.dtype).copy_(found)


def states_size(backend: str, directions: tuple[Direction, ...]) -> tuple[int, ...]:
    """Shape of what a backend keeps between forward and backward."""
    first = directions[0]
    assert first.u is not None and first.A is not None
    groups = next((t.shape[1] for d in directions for t in (d.B, d.C) if t is not None and t.ndim == 4), 1)
    batch, dim, seqlen = first.u.shape
    shape = implementation(backend).states_shape(batch, groups, dim, seqlen, first.A.shape[1], compute_dtype(first.u))
    return (len(directions), *shape)


for _op in _ARGUMENTS:
    _register(_op)
