"""selective_scan on a GPU through Triton: memory for the kernels of triton_kernels.py, their block sizes, and the calls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..._triton import Device, cdiv, device_of, launch, next_power_of_2
from . import triton_kernels as kernels
from .autograd import FIRST, Direction, Options, states_size, tensors_of

CHUNK = 32  # steps between two states that the forward keeps


class Plan(NamedTuple):
    """Sizes of one launch."""

    states: int  # dstate, rounded up to a power of two
    tile: int  # channels of a program
    tiles: int  # of a group
    num_warps: int = 1
    max_registers: int | None = None


def plan(batch: int, groups: int, dim: int, dstate: int, device: Device, backward: bool = False) -> Plan:
    """One warp with 8 numbers of the state a thread, and 4 where that leaves a GPU with too few warps to hide latency."""
    channels = dim // groups
    states = next_power_of_2(dstate)
    tile = min(32, max(1, 256 // states), next_power_of_2(channels))
    while tile * states > 128 and tile > 8 and batch * groups * cdiv(channels, tile) < 4 * device.multiprocessors:
        tile //= 2
    return Plan(states, tile, cdiv(channels, tile), 1, None if backward else 128)


def states_shape(batch: int, groups: int, dim: int, seqlen: int, dstate: int, dtype: torch.dtype) -> tuple[int, ...]:
    return (cdiv(seqlen, CHUNK), batch, dim, dstate)


class Scan(NamedTuple):
    """Two directions, or one, as the kernels read them."""

    directions: list[Direction]  # complete, what the second one shares included
    shares: list[bool]  # for each of FIRST but the initial state: whether the second direction shares it
    groups: int


def prepared(directions: tuple[Direction, ...]) -> Scan:
    """Makes both directions alike: kinds of B and C, dtypes, what is there; states innermost; small things contiguous."""
    first, *rest = directions
    shares = [bool(rest) and t is None for t in directions[-1].tensors[:7]]
    whole = [dict(zip(FIRST, d.tensors, strict=True)) for d in directions]
    for d in whole[1:]:
        d.update({name: whole[0][name] for name, shared in zip(FIRST, shares, strict=False) if shared})
    varying = [t for d in whole for t in (d["B"], d["C"]) if t.ndim == 4]
    groups = varying[0].shape[1] if varying else 1
    if any(whole[0][name].ndim != d[name].ndim for name in ("B", "C") for d in whole[1:]):
        groups = first.A.shape[0]  # type: ignore[union-attr]
        for d in whole:
            d["B"], d["C"] = (every_channel(t, first.u) for t in (d["B"], d["C"]))  # type: ignore[arg-type]
    for d in whole:
        for name in FIRST[2:]:
            if d[name] is not None:
                d[name] = state_innermost(d[name]) if d[name].ndim == 4 else d[name].contiguous()
    for name, shared in zip(FIRST, shares, strict=False):
        if rest and not shared:
            a, b = whole[0][name], whole[1][name]
            if a is None:
                a = torch.zeros_like(b)
            both = torch.promote_types(a.dtype, b.dtype)
            whole[0][name], whole[1][name] = a.to(both), b.to(both)
    return Scan([Direction(**d, reverse=own.reverse) for d, own in zip(whole, directions, strict=True)], shares, groups)


def every_channel(t: Tensor, u: Tensor) -> Tensor:
    """B or C of any kind as one group a channel."""
    batch, dim, seqlen = u.shape
    if t.ndim == 2:
        return t[None, :, :, None].expand(batch, *t.shape, seqlen)
    return t.repeat_interleave(dim // t.shape[1], dim=1)


def state_innermost(t: Tensor) -> Tensor:
    """(batch, groups, dstate, seqlen) with stride 1 along dstate: in place where it is so."""
    return t if t.stride(2) == 1 or t.shape[2] == 1 else t.transpose(2, 3).contiguous().transpose(2, 3)


def strides(name: str, t: Tensor | None, letters: str = "bdt", axes: Sequence[int] = (0, 1, 2)) -> dict[str, int]:
    wanted = t is not None and t.ndim > max(axes)
    return {f"{name}_s{x}": t.stride(axis) if wanted else 0 for x, axis in zip(letters, axes, strict=True)}  # type: ignore[union-attr]


def arguments_of(scan: Scan) -> dict[str, Any]:
    """What both kernels take of the directions, by their names."""
    found: dict[str, Any] = {}
    for i in range(2):
        d = scan.directions[min(i, len(scan.directions) - 1)]
        absent = i == len(scan.directions)
        for name, t, shared in zip(("u", "delta", "A", "B", "C", "D", "bias"), d.tensors, scan.shares, strict=False):
            found[f"{name}{i}"] = None if i and (absent or shared) else t
            if name in ("u", "delta"):
                found |= strides(f"{name}{i}", t)
            elif name in ("B", "C"):
                found |= strides(f"{name}{i}", t, "bgt", (0, 1, 3))
    B, C = scan.directions[0].B, scan.directions[0].C
    return {**found, "B_CONSTANT": B is not None and B.ndim == 2, "C_CONSTANT": C is not None and C.ndim == 2}


def run(kernel: Any, grid: int, u: Tensor, chosen: Plan, **arguments: Any) -> None:
    arguments |= {"NP": chosen.states, "BD": chosen.tile, "CHUNK": CHUNK}
    in_order = {name: arguments[name] for name in kernel.arg_names}
    limits = {"num_warps": chosen.num_warps, "max_registers": chosen.max_registers}
    launch("selective_scan", kernel, (grid,), u, **limits, **in_order)


def forward(
    directions: tuple[Direction, ...], z: Tensor | None, seq_idx: Tensor | None, options: Options, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns out, the first direction's last state (batch, dim, dstate), and (direction, *states_shape), empty unless `keep`."""
    first = directions[0]
    assert first.u is not None and first.A is not None
    u, (dim, dstate) = first.u, first.A.shape
    batch, _, seqlen = u.shape
    out = torch.empty_like(u, dtype=options.out_dtype)
    last = u.new_empty(batch, dim, dstate, dtype=torch.float32)
    states = u.new_empty(states_size("triton", directions) if keep else (0,), dtype=torch.float32)
    if u.numel() == 0:
        last = last.zero_() if first.initial_state is None else last.copy_(first.initial_state)
        return out.zero_(), last, states
    scan = prepared(directions)
    chosen = plan(batch, scan.groups, dim, dstate, device_of(u))
    waits = len(directions) == 2 and out.dtype != torch.float32
    run(
        kernels.scan_forward, batch * scan.groups * chosen.tiles, u, chosen,
        **arguments_of(scan), initial=scan.directions[0].initial_state, last=last, states=states if keep else None,
        z=z, out=out, partial=torch.empty_like(out, dtype=torch.float32) if waits else None, seq_idx=seq_idx,
        batch=batch, dim=dim, seqlen=seqlen, channels=dim // scan.groups, tiles=chosen.tiles, scale=float(options.scale),
        **strides("z", z), **strides("out", out), **strides("seq", seq_idx, "bt", (0, 1)),
        DIRECTIONS=len(directions), REVERSE=int(first.reverse), SOFTPLUS=options.delta_softplus, DSTATE=dstate,
    )  # fmt: skip
    return out, last, states


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
    first = directions[0]
    assert first.u is not None and first.A is not None
    u, (dim, dstate) = first.u, first.A.shape
    batch, _, seqlen = u.shape
    flat = tensors_of(directions)
    wanted = [t if need else None for t, need in zip(flat, needs, strict=True)]
    if dz is None and needs_z and z is not None:
        dz = torch.empty_like(z)
    if u.numel() == 0:
        grads = [None if t is None else torch.zeros_like(t) for t in wanted]
        if grads[7] is not None and dlast_state is not None:
            grads[7].copy_(dlast_state)
        return grads, dz, out
    scan = prepared(directions)
    chosen = plan(batch, scan.groups, dim, dstate, device_of(u), backward=True)
    two = len(directions) == 2

    def float32(*shape: int) -> Tensor:
        return u.new_empty(shape, dtype=torch.float32)

    # Where the gradients go: of u and delta in place, of the rest as partial sums, (direction, ...), added up in order afterwards.
    grads = [None] * len(flat)
    rooms: dict[int, Tensor] = {}
    pointers: dict[str, Any] = {"du_partial": None, "ddelta_partial": None}
    for k, name in enumerate(("du", "ddelta", "dA", "dB", "dC", "dD", "dbias")):
        owners = [k] if scan.shares[k] or not two else [k, 8 + k]
        for i in range(2):
            pointers[f"{name}{i}"] = None
            if k < 2:
                pointers |= strides(f"{name}{i}", None)
        if all(wanted[owner] is None for owner in owners):
            continue
        for i, owner in enumerate(owners):
            t = scan.directions[i].tensors[k]
            assert t is not None
            if k < 2:
                grads[owner] = pointers[f"{name}{i}"] = torch.empty_like(t)
                pointers |= strides(f"{name}{i}", grads[owner])
                continue
            shape = (chosen.tiles, scan.groups, batch, seqlen, dstate) if t.ndim == 4 else (batch, *t.shape)
            rooms[owner] = float32(2 if scan.shares[k] else 1, *shape)
            for slot, room in enumerate(rooms[owner], start=i):
                pointers[f"{name}{slot}"] = room
        if k < 2 and scan.shares[k]:
            pointers[f"{name}_partial"] = float32(batch, seqlen, dim)
            pointers |= strides(f"{name}1", pointers[f"{name}0"])
    if wanted[7] is not None:
        grads[7] = float32(batch, dim, dstate)
    need_y = z is not None and (dz is not None or out is not None)
    grid = batch * scan.groups * chosen.tiles
    run(
        kernels.scan_backward, grid, u, chosen, **arguments_of(scan), **pointers,
        dlast=None if dlast_state is None else dlast_state.contiguous(), dinitial=grads[7], states=states,
        z=z, dout=dout, dz=dz, out=out if z is not None else None, seq_idx=seq_idx,
        y_partial=float32(batch, seqlen, dim) if two and need_y else None,
        scratch=float32(grid, CHUNK // 4, chosen.states, chosen.tile),
        batch=batch, dim=dim, seqlen=seqlen, channels=dim // scan.groups, tiles=chosen.tiles, scale=float(options.scale),
        **strides("z", z), **strides("dout", dout), **strides("dz", dz), **strides("out", out),
        **strides("seq", seq_idx, "bt", (0, 1)),
        DIRECTIONS=len(directions), REVERSE=int(first.reverse), NEED_Y=need_y, SOFTPLUS=options.delta_softplus,
        SHARED_U=scan.shares[0], SHARED_DELTA=scan.shares[1], DSTATE=dstate,
    )  # fmt: skip
    for owner, room in rooms.items():
        grads[owner] = summed(room, flat[owner], dim)
    found = [g.to(t.dtype) if w is not None else None for g, t, w in zip(grads, flat, wanted, strict=True)]  # type: ignore[union-attr]
    return found, dz, out


def summed(room: Tensor, t: Tensor | None, dim: int) -> Tensor | None:
    """Partial sums (direction, tile or batch, ...) added up, as the gradient of t."""
    if t is None:  # its place in the kernel, but no such tensor
        return None
    total = room.flatten(0, 1)
    total = total[0] if total.shape[0] == 1 else total.sum(0)
    if total.ndim == 2 or total.ndim == 1:
        return total
    total = total.permute(1, 0, 3, 2)  # (batch, groups, dstate, seqlen)
    if t.ndim == 2:
        return total.sum((0, 3))
    return total if t.shape[1] == total.shape[1] else total.unflatten(1, (t.shape[1], -1)).sum(2)
