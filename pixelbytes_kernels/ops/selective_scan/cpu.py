"""selective_scan on the CPU: memory for the C++ kernels of csrc/cpu/selective_scan_*.cpp, and the calls."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..._autograd import in_dtype_of
from ..._backend import load_extension
from .autograd import Direction, Options, compute_dtype, states_size, tensors_of, with_own_delta

COEFFICIENTS = (3, 4)  # B and C in a direction's tensors


def states_shape(batch: int, groups: int, dim: int, seqlen: int, dstate: int, dtype: torch.dtype) -> tuple[int, ...]:
    """One state a chunk, channels padded to whole vectors in every group."""
    cpu, _ = load_extension("_cpu")
    assert cpu is not None
    lanes = cpu.lanes // 2 if dtype == torch.float64 else cpu.lanes
    tiles = (dim // groups + lanes - 1) // lanes
    return ((seqlen + cpu.chunk - 1) // cpu.chunk, batch, groups * tiles, dstate, lanes)


def forward(
    directions: tuple[Direction, ...], z: Tensor | None, seq_idx: Tensor | None, options: Options, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns out, the first direction's last state (batch, dim, dstate), and (direction, *states_shape), empty unless `keep`."""
    cpu, reason = load_extension("_cpu")
    if cpu is None:
        raise RuntimeError(reason)
    first = directions[0]
    assert first.u is not None and first.A is not None
    u, dtype = first.u, compute_dtype(first.u)
    batch, dim, _ = u.shape
    out = torch.empty_like(u, dtype=options.out_dtype)
    last_state = u.new_empty((batch, dim, first.A.shape[1]), dtype=dtype)
    states = u.new_empty(states_size("cpu", directions) if keep else (0,), dtype=dtype)
    if u.numel() == 0:
        last_state = last_state.zero_() if first.initial_state is None else last_state.copy_(first.initial_state)
        return out.zero_(), last_state, states
    packed = [
        (d.reverse, *d.tensors, last_state if i == 0 else None, states[i] if keep else None)
        for i, d in enumerate(with_own_delta(directions))
    ]
    cpu.scan_forward(
        packed, z, seq_idx, options.scale, options.delta_softplus, dtype == torch.float64, torch.get_num_threads(), out
    )
    return out, last_state, states


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
    """Gradients of the tensors of every direction in order, of z (into `dz` if given), and `out` recomputed into the tensor for it.

    `needs` has one entry a tensor: 8 of the first direction, 7 of the second.
    """
    cpu, _ = load_extension("_cpu")
    assert cpu is not None
    u = directions[0].u
    assert u is not None
    dtype = compute_dtype(u)
    grads: list[Tensor | None] = []
    packed = []
    for i, d in enumerate(with_own_delta(directions)):
        tensors = d.tensors[: 8 if i == 0 else 7]
        # A delta lent to the second direction has its gradient wanted with the first one's.
        lent = i == 1 and directions[1].delta is None
        need = list(needs[len(grads) : len(grads) + len(tensors)])
        if lent:
            need[1] = needs[1]
        results = [
            None if t is None or not n else torch.empty_like(t) if k < 2 else gradient_room(t, dtype, k in COEFFICIENTS)
            for k, (t, n) in enumerate(zip(tensors, need, strict=True))
        ]
        kept = states[i] if u.numel() else None
        packed.append((d.reverse, *d.tensors, None, kept, dlast_state if i == 0 else None, *results))
        grads += [g.mT if g is not None and g.ndim > 2 and k in COEFFICIENTS else g for k, g in enumerate(results)]
    if dz is None and needs_z and z is not None:
        dz = torch.empty_like(z)
    if u.numel() == 0:
        for grad in grads:
            if grad is not None:
                grad.zero_()
        if len(grads) > 7 and grads[7] is not None and dlast_state is not None:
            grads[7].copy_(dlast_state)
    else:
        cpu.scan_backward(
            packed,
            z,
            seq_idx,
            options.scale,
            options.delta_softplus,
            dtype == torch.float64,
            torch.get_num_threads(),
            dout,
            dz,
            out,
        )
    flat = tensors_of(directions)
    if len(grads) > 8 and flat[9] is None and grads[1] is not None and grads[9] is not None:  # see with_own_delta
        grads[1], grads[9] = grads[1] + grads[9], None
    return [in_dtype_of(t, g) for g, t in zip(grads, flat, strict=True)], dz, out


def gradient_room(t: Tensor, dtype: torch.dtype, coefficient: bool) -> Tensor:
    """Contiguous. Coefficients that vary in time get their gradient with the state innermost, as the kernel writes it."""
    if coefficient and t.ndim > 2:
        *batch, dstate, seqlen = t.shape
        return t.new_empty((*batch, seqlen, dstate), dtype=dtype)
    return torch.empty_like(t, dtype=dtype, memory_format=torch.contiguous_format)
