"""selective_scan on a GPU through Triton: memory for the kernels of triton_kernels.py, their block sizes, and the calls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..._triton import Case, Device, cdiv, device_of, launch, next_power_of_2
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


def plan(
    programs: int,
    channels: int,
    dstate: int,
    device: Device,
    *,
    backward: bool = False,
    resets: bool = False,
    more: bool = False,
    itemsize: int = 4,
) -> Plan:
    """Sizes for `programs` groups of `channels` channels each, counted over batch rows and directions.

    `numbers` of the state are what the registers hold, and `registers` is a limit, so that nothing spills and a T4 can have half of
    its threads resident, in the backward a quarter; found by `python -m gpu_checks.triton_budget`. `itemsize`: bytes of an element of u.
    Fewer channels where a GPU would be left with too few warps to hide latency.
    """
    states = next_power_of_2(dstate)
    padded = dstate < states
    if not backward:
        roomy = dstate == 16 and not resets and not more
        numbers, registers = (512 if roomy else 128 if padded else 256), 128
        if roomy and itemsize == 2 and device.arch >= 90:
            registers = 136
    elif resets:
        numbers, registers = (64, 224) if states <= 8 else (128, 255)
    elif padded or states == 128:
        numbers, registers = 128, 224
    else:
        numbers, registers = 256, 255  # said, though it is all there are: else the compiler may spill for more programs
    tile = min(
        max(1, numbers // states), 32 if numbers == 512 else 16 if numbers > 64 else 8, next_power_of_2(channels)
    )
    while tile * states > 128 and tile > 8 and programs * cdiv(channels, tile) < 8 * device.multiprocessors:
        tile //= 2
    num_warps = 2 if backward and resets and states == 256 else 1
    return Plan(states, tile, cdiv(channels, tile), num_warps, registers)


def holds_more(d: Direction) -> bool:
    """Whether the forward needs registers for a state to start from, or for B or C that are constant in time."""
    return d.initial_state is not None or any(t is not None and t.ndim == 2 for t in (d.B, d.C))


def states_shape(batch: int, groups: int, dim: int, seqlen: int, dstate: int, dtype: torch.dtype) -> tuple[int, ...]:
    return (cdiv(seqlen, CHUNK), batch, dim, dstate)


class Scan(NamedTuple):
    """Two directions, or one, as the kernels read them, and the gradient of `out`."""

    directions: list[Direction]  # complete, what the second one shares included
    dout: Tensor | None
    shares: list[bool]  # for each of FIRST but the initial state: whether the second direction shares it
    groups: int


def prepared(directions: tuple[Direction, ...], dout: Tensor | None = None) -> Scan:
    """Makes both directions alike: kinds of B and C, dtypes, what is there; states innermost; small things contiguous.

    u, delta and dout get one layout, so that the kernels form their offsets once. A tensor is copied only where its own layout is not
    that of the others.
    """
    first, *rest = directions
    shares = [bool(rest) and t is None for t in directions[-1].tensors[:7]]
    whole: list[dict[str, Any]] = [dict(zip(FIRST, d.tensors, strict=True)) for d in directions]
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
    *pairs, dout = alike([*(d[name] for d in whole for name in ("u", "delta")), dout])
    for i, d in enumerate(whole):
        d["u"], d["delta"] = pairs[2 * i : 2 * i + 2]
    whole_directions = [Direction(**d, reverse=own.reverse) for d, own in zip(whole, directions, strict=True)]
    return Scan(whole_directions, dout, shares, groups)


def alike(tensors: list[Tensor | None]) -> list[Tensor | None]:
    """Tensors of one shape in one layout, which is that of most of them."""

    def layout(t: Tensor) -> tuple[int, ...]:
        return tuple(stride for size, stride in zip(t.shape, t.stride(), strict=True) if size > 1)

    given = [t for t in tensors if t is not None]
    kinds = [layout(t) for t in given if 0 not in layout(t)]
    if not kinds:
        return [t if t is None else t.contiguous() for t in tensors]
    wanted = max(kinds, key=kinds.count)
    strides = next(t.stride() for t in given if layout(t) == wanted)
    return [t if t is None or layout(t) == wanted else t.new_empty_strided(t.shape, strides).copy_(t) for t in tensors]


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
            if name in ("B", "C"):
                found |= strides(f"{name}{i}", t, "bgt", (0, 1, 3))
    B, C = scan.directions[0].B, scan.directions[0].C
    found |= strides("in", scan.directions[0].u)
    return {**found, "B_CONSTANT": B is not None and B.ndim == 2, "C_CONSTANT": C is not None and C.ndim == 2}


def is_wide(arguments: dict[str, Any]) -> bool:
    """Whether an offset within a batch row, or one in a tensor (batch, dim, dstate), may need more than 31 bits."""
    tensors = [
        t[0] if t.ndim == 4 and name.endswith("partial") else t
        for name, t in arguments.items()
        if isinstance(t, Tensor) and t.ndim >= 2
    ]
    spans = [sum((n - 1) * abs(s) for n, s in zip(t.shape[1:], t.stride()[1:], strict=True)) for t in tensors]
    batch, dim, seqlen, dstate = (arguments[name] for name in ("batch", "dim", "seqlen", "DSTATE"))
    sizes = dim * max(seqlen, batch * dstate), seqlen * dstate
    return max(*spans, *sizes) >= 2**31 - 2**16  # the loads ahead may point a little beyond, under a mask


def run(kernel: Any, grid: tuple[int, ...], u: Tensor, chosen: Plan, **arguments: Any) -> None:
    arguments |= {"NP": chosen.states, "BD": chosen.tile, "CHUNK": CHUNK, "WIDE": is_wide(arguments)}
    in_order = {name: arguments[name] for name in kernel.arg_names}
    limits: dict[str, Any] = {"num_warps": chosen.num_warps, "max_registers": chosen.max_registers}
    launch("selective_scan", kernel, grid, u, **limits, **in_order)


SMALL = {"batch": 1, "dim": 1, "seqlen": 1, "DSTATE": 1}
MERGE = (32, 32)  # channels and steps of a program


def merge(u: Tensor, **arguments: Any) -> None:
    """Adds up what both directions have left."""
    batch, dim, seqlen = u.shape
    blocks = [cdiv(dim, MERGE[0]), cdiv(seqlen, MERGE[1])]
    arguments |= {
        "dim": dim,
        "seqlen": seqlen,
        "blocks_d": blocks[0],
        "blocks_t": blocks[1],
        "BD": MERGE[0],
        "BT": MERGE[1],
    }
    in_order = {name: arguments.get(name) for name in kernels.scan_merge.arg_names}
    launch("selective_scan", kernels.scan_merge, (batch * blocks[0] * blocks[1],), u, num_warps=4, **in_order)


def planes(u: Tensor, lines: tuple[int, ...]) -> tuple[Tensor, int]:
    """A float32 buffer of u's shape for each direction, with the strides `lines`, and how far apart they are."""
    plane = 1 + sum((n - 1) * stride for n, stride in zip(u.shape, lines, strict=True))
    plane = cdiv(plane, 16) * 16
    return u.new_empty_strided((2, *u.shape), (plane, *lines), dtype=torch.float32), plane


def forward(
    directions: tuple[Direction, ...], z: Tensor | None, seq_idx: Tensor | None, options: Options, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns out, the first direction's last state (batch, dim, dstate), and (direction, *states_shape), empty unless `keep`."""
    first = directions[0]
    assert first.u is not None and first.A is not None
    u, (dim, dstate) = first.u, first.A.shape
    batch, _, seqlen = u.shape
    z = None if z is None else alike([z])[0]
    out = torch.empty_like(u, dtype=options.out_dtype)
    last = u.new_empty(batch, dim, dstate, dtype=torch.float32)
    states = u.new_empty(states_size("triton", directions) if keep else (0,), dtype=torch.float32)
    if u.numel() == 0:
        last = last.zero_() if first.initial_state is None else last.copy_(first.initial_state)
        return out.zero_(), last, states
    scan = prepared(directions)
    two = len(directions) == 2
    kind: dict[str, Any] = {"resets": seq_idx is not None, "more": holds_more(first), "itemsize": u.element_size()}
    chosen = plan(batch * scan.groups * len(directions), dim // scan.groups, dstate, device_of(u), **kind)
    partial, plane = planes(u, out.stride()) if two else (None, 0)
    common = {
        **arguments_of(scan),
        **strides("z", z),
        **strides("out", out),
        "plane": plane,
        "scale": float(options.scale),
    }
    run(
        kernels.scan_forward, (batch * scan.groups * chosen.tiles, len(directions)), u, chosen,
        **common, initial=scan.directions[0].initial_state, last=last, states=states if keep else None,
        z=z, out=out, partial=partial, seq_idx=seq_idx, batch=batch, dim=dim, seqlen=seqlen,
        channels=dim // scan.groups, tiles=chosen.tiles, reverse=int(first.reverse), **strides("seq", seq_idx, "bt", (0, 1)),
        DIRECTIONS=len(directions), SOFTPLUS=options.delta_softplus, DSTATE=dstate,
    )  # fmt: skip
    if two:
        merge(u, **common, y=partial, z=z, out=out, WIDE=is_wide({"partial": partial, "z": z, **SMALL}))
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
    if u.numel() == 0:
        grads = [None if t is None else torch.zeros_like(t) for t in wanted]
        if grads[7] is not None and dlast_state is not None:
            grads[7].copy_(dlast_state)
        return grads, torch.zeros_like(z) if dz is None and needs_z and z is not None else dz, out
    scan = prepared(directions, dout)
    count = batch * scan.groups * len(directions)
    two = len(directions) == 2
    chosen = plan(count, dim // scan.groups, dstate, device_of(u), backward=True, resets=seq_idx is not None)

    def float32(*shape: int) -> Tensor:
        return u.new_empty(shape, dtype=torch.float32)

    # dz gets the layout of z; all else of u's shape, that of `out`.
    z = None if z is None else alike([z])[0]
    dz_asked = dz
    if z is not None and (needs_z or dz is not None) and (dz is None or dz.stride() != z.stride()):
        dz = z.new_empty_strided(z.shape, z.stride(), dtype=z.dtype if dz is None else dz.dtype)
    lines = (torch.empty_like(u, device="meta") if out is None else out).stride()

    def line(dtype: torch.dtype = torch.float32) -> Tensor:
        return u.new_empty_strided(u.shape, lines, dtype=dtype)

    # Where the gradients go: of u and delta in place, of the rest as partial sums, (direction, ...), added up in order afterwards.
    grads = [None] * len(flat)
    rooms: dict[int, Tensor] = {}
    pointers: dict[str, Any] = {"du_partial": None, "ddelta_partial": None}
    for k, name in enumerate(("du", "ddelta", "dA", "dB", "dC", "dD", "dbias")):
        owners = [k] if scan.shares[k] or not two else [k, 8 + k]
        for i in range(2):
            pointers[f"{name}{i}"] = None
        if all(wanted[owner] is None for owner in owners):
            continue
        for i, owner in enumerate(owners):
            t = scan.directions[i].tensors[k]
            assert t is not None
            if k < 2:
                grads[owner] = pointers[f"{name}{i}"] = line(t.dtype)
                continue
            shape = (chosen.tiles, scan.groups, batch, seqlen, dstate) if t.ndim == 4 else (batch, *t.shape)
            rooms[owner] = float32(2 if scan.shares[k] else 1, *shape)
            for slot, room in enumerate(rooms[owner], start=i):
                pointers[f"{name}{slot}"] = room
        if k < 2 and scan.shares[k]:
            pointers[f"{name}_partial"] = planes(u, lines)[0]
    if wanted[7] is not None:
        grads[7] = float32(batch, dim, dstate)
    need_y = z is not None and (dz is not None or out is not None)
    y_partial, plane = planes(u, lines) if two else (None, 0)
    y_partial = y_partial if need_y else None
    grid = batch * scan.groups * chosen.tiles, len(directions)
    common = {
        **arguments_of(scan), **strides("z", z), **dict(zip(("out_sb", "out_sd", "out_st"), lines, strict=True)),
        **pointers, "z": z, "dout": scan.dout, "dz": dz, "out": out if z is not None else None, "plane": plane,
        "scale": float(options.scale),
    }  # fmt: skip
    run(
        kernels.scan_backward, grid, u, chosen, **common,
        dlast=None if dlast_state is None else dlast_state.contiguous(), dinitial=grads[7], states=states,
        y_partial=y_partial, seq_idx=seq_idx,
        scratch=float32(*grid, CHUNK // 4, chosen.states, chosen.tile),
        batch=batch, dim=dim, seqlen=seqlen, channels=dim // scan.groups, tiles=chosen.tiles,
        reverse=int(first.reverse), **strides("seq", seq_idx, "bt", (0, 1)),
        DIRECTIONS=len(directions), NEED_Y=need_y, SOFTPLUS=options.delta_softplus, DSTATE=dstate,
    )  # fmt: skip
    if y_partial is not None or pointers["du_partial"] is not None or pointers["ddelta_partial"] is not None:
        views = {
            "partial": u.new_empty_strided((2, *u.shape), (plane, *lines), device="meta"),
            "z": z,
            "dout": scan.dout,
        }
        merge(
            u, **common, y=y_partial, du=pointers["du0"], ddelta=pointers["ddelta0"], WIDE=is_wide({**views, **SMALL})
        )
    for owner, room in rooms.items():
        grads[owner] = summed(room, flat[owner], dim)
    found = [g.to(t.dtype) if w is not None else None for g, t, w in zip(grads, flat, wanted, strict=True)]  # type: ignore[union-attr]
    if dz_asked is not None and dz is not None and dz_asked is not dz:
        dz = dz_asked.copy_(dz)
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


def aot_cases() -> list[Case]:
    """Every Plan that `plan` can return, with every option on; forms and dtypes at the paper's dstate."""
    t4_rows = 512  # batch rows that fill a T4 at any tile
    sizes = [(t4_rows, 32, dstate) for dstate in (1, 2, 4, 8, 16, 32, 64, 128, 256)]
    sizes += [(batch, 32, dstate) for batch in (160, 40) for dstate in (8, 16)]
    cases = [case(*size, seq_idx=seq_idx) for size in sizes for seq_idx in (False, True)]
    forms: list[dict[str, Any]] = [
        {"directions": 1}, {"own": True}, {"constant": True}, {"channels_last": False}, {"dtype": torch.float16},
        {"dtype": torch.float16, "directions": 1, "seq_idx": True}, {"dstate": 13}, {"dstate": 13, "seq_idx": True}, {"initial": True},
        {"initial": True, "directions": 1},
    ]  # fmt: skip
    for changed in forms:
        form: dict[str, Any] = {"batch": t4_rows, "dim": 32, "dstate": 16, **changed}
        cases.append(case(**form))
    return cases


def case(
    batch: int,
    dim: int,
    dstate: int,
    *,
    directions: int = 2,
    own: bool = False,
    constant: bool = False,
    channels_last: bool = True,
    seq_idx: bool = False,
    initial: bool = False,
    dtype: torch.dtype = torch.float32,
    seqlen: int = 16,
) -> Case:
    """Forward and backward of one form on memory that is never read."""

    def line() -> Tensor:
        t = torch.empty(batch, seqlen, dim, dtype=dtype)
        return t.transpose(1, 2) if channels_last else t.view(batch, dim, seqlen)

    def direction(reverse: bool) -> Direction:
        B, C = (
            torch.empty(dim, dstate)
            if constant
            else torch.empty(batch, seqlen, 1, dstate, dtype=dtype).permute(0, 2, 3, 1)
            for _ in range(2)
        )
        state = torch.empty(batch, dim, dstate) if initial and not reverse else None
        return Direction(
            line(), line(), torch.empty(dim, dstate), B, C, torch.empty(dim), torch.empty(dim), state, reverse
        )

    second = direction(True) if own else Direction(*(None,) * 7, reverse=True)
    both = (direction(False), second)[:directions]
    ids = torch.empty(batch, seqlen, dtype=torch.int32) if seq_idx else None
    options = Options(True, 1.0, dtype)

    def run_both() -> None:
        z = line()
        _, last, states = forward(both, z, ids, options, True)
        backward(both, z, ids, options, states, line(), last, [t is not None for t in tensors_of(both)], True)

    words = (
        ["", "own "][own]
        + ["", "constant "][constant]
        + ["time-contiguous ", ""][channels_last]
        + ["", "resets "][seq_idx]
    )
    return Case(f"dstate {dstate}, {directions} direction(s), {words}{str(dtype)[6:]}, batch {batch}", run_both)
