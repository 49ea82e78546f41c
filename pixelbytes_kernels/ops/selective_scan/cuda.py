"""selective_scan on NVIDIA GPUs: memory for the CUDA C++ kernels of csrc/cuda/selective_scan_*.cu, and the calls."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..._cuda_launch import extension, fp32, multiprocessors, where
from .autograd import Direction, Options, states_size, tensors_of, with_own_delta
from .stretches import carried, shares_left, stretch_steps


def states_shape(batch: int, groups: int, dim: int, seqlen: int, dstate: int, dtype: torch.dtype) -> tuple[int, ...]:
    """One state a chunk. Of every kernel that may serve `dstate`, the widest: which one it is depends on B and C too."""
    cuda = extension()
    padded = max(cuda.scan_shape(dstate, direct)[0] for direct in (False, True))
    return ((seqlen + cuda.chunk - 1) // cuda.chunk, batch, dim, padded)


def is_direct(directions: Sequence[Direction]) -> bool:
    """Whether the kernel reads B and C from global memory, see csrc/cuda/selective_scan.h."""
    A = directions[0].A
    assert A is not None
    coefficients = [t for d in directions for t in (d.B, d.C) if t is not None]
    return A.shape[1] > extension().direct_dstate or any(t.ndim == 2 for t in coefficients)


def within_reach(t: Tensor | None) -> Tensor | None:
    """The kernels keep strides in 32 bits, that of time for a chunk in bytes; memory that is spread wider is gathered."""
    return t.contiguous() if t is not None and (t.stride(-1) >= 2**24 or max(t.stride()[1:]) >= 2**31) else t


def states_together(t: Tensor | None) -> Tensor | None:
    """B or C (batch, groups, dstate, seqlen) as the kernels read it: the states of a step lie next to each other, four to a packet.

    Where steps lie next to each other, as other packages keep them, this small tensor is copied.
    """
    if t is None:
        return None
    batch, groups, dstate, seqlen = t.shape
    apart = t.stride(0), t.stride(1), t.stride(3)
    in_packets = all(stride % 4 == 0 for stride in apart) and t.data_ptr() % (4 * t.element_size()) == 0
    if (t.stride(2) == 1 or dstate == 1) and (in_packets or dstate % 4 != 0):
        return within_reach(t)
    return t.new_empty(batch, groups, seqlen, dstate).transpose(2, 3).copy_(t)


def as_read(directions: Sequence[Direction], direct: bool, padded: int) -> list[Direction]:
    """The tensors as the kernels take them: u and delta as they are, the small ones in float32."""

    def coefficient(t: Tensor | None) -> Tensor | None:
        if t is None or not direct:
            return states_together(t)
        t = t.detach().float()
        if t.ndim == 4:
            t = t.transpose(2, 3)
        t = torch.nn.functional.pad(t, (0, padded - t.shape[-1])).contiguous()
        return t.transpose(2, 3) if t.ndim == 4 else t

    return [
        d._replace(
            u=within_reach(d.u),
            delta=within_reach(d.delta),
            A=fp32(d.A),
            B=coefficient(d.B),
            C=coefficient(d.C),
            D=fp32(d.D),
            delta_bias=fp32(d.delta_bias),
            initial_state=fp32(d.initial_state),
        )
        for d in with_own_delta(tuple(directions))
    ]


def stretch(directions: Sequence[Direction], seq_idx: Tensor | None, tile: int) -> int:
    """Steps of the stretches that rows are cut into; 0: they are not, nor where states restart, since shares are not seen there."""
    first = directions[0]
    assert first.u is not None
    batch, dim, seqlen = first.u.shape
    groups = max((t.shape[1] for d in directions for t in (d.B, d.C) if t is not None and t.ndim == 4), default=1)
    blocks = batch * groups * -(-(dim // groups) // tile)
    return 0 if seq_idx is not None else stretch_steps(blocks, seqlen, multiprocessors(first.u), extension().chunk)


def forward(
    directions: tuple[Direction, ...], z: Tensor | None, seq_idx: Tensor | None, options: Options, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns out, the first direction's last state (batch, dim, dstate), and (direction, *states_shape), empty unless `keep`."""
    first = directions[0]
    assert first.u is not None and first.A is not None
    u = first.u
    out = torch.empty_like(u, dtype=options.out_dtype)
    last_state = u.new_empty(u.shape[0], u.shape[1], first.A.shape[1], dtype=torch.float32)
    states = u.new_empty(states_size("cuda", directions) if keep else (0,), dtype=torch.float32)
    if u.numel() == 0:
        last_state = last_state.zero_() if first.initial_state is None else last_state.copy_(first.initial_state)
        return out.zero_(), last_state, states
    cuda, direct = extension(), is_direct(directions)
    padded, tile, _ = cuda.scan_shape(first.A.shape[1], direct)
    read = as_read(directions, direct, padded)
    # The direction that comes first to a chunk leaves its share in `out`, unless that would round it more than once.
    rounds = len(directions) == 2 and out.dtype.itemsize < u.dtype.itemsize
    partial = torch.empty_like(out, dtype=torch.float32) if rounds else None
    steps = stretch(directions, seq_idx, tile)

    def scan(starts: Sequence[Tensor | None], ends: Sequence[Tensor | None], keep: bool) -> None:
        packed = [
            (d.reverse, *d.tensors[:7], start, end, states[i] if keep else None)
            for i, (d, start, end) in enumerate(zip(read, starts, ends, strict=True))
        ]
        more = (within_reach(z), as_int32(seq_idx), options.scale, options.delta_softplus, steps, out, partial)
        cuda.scan_forward(*where(u), packed, *more)

    initial = [d.initial_state for d in read]
    if steps == 0:
        scan(initial, [last_state, None][: len(read)], keep)
        return out, last_state, states
    ends = [last_state.new_empty(-(-u.shape[2] // steps), *last_state.shape) for _ in read]
    starts = [torch.zeros_like(end) for end in ends]
    for d, start, own in zip(read, starts, initial, strict=True):
        if own is not None:
            start[-1 if d.reverse else 0] = own
    scan(starts, ends, False)
    shares = shares_left(read, options.delta_softplus, steps)
    found = [carried(*of) for of in zip(ends, shares, (d.reverse for d in read), initial, strict=True)]
    scan(found, ends, keep)
    return out, ends[0][0 if first.reverse else -1].contiguous(), states


def as_int32(seq_idx: Tensor | None) -> Tensor | None:
    return None if seq_idx is None else seq_idx.to(torch.int32).contiguous()


def in_layout_of(u: Tensor, dout: Tensor) -> Tensor:
    """`dout` with the fast axis of u: the kernels read all tensors along one axis, and another one's elements one by one."""
    if (u.stride(2) == 1) == (dout.stride(2) == 1) or u.shape[1] == 1 or u.shape[2] == 1:
        return dout
    return torch.empty_like(u, dtype=dout.dtype).copy_(dout)


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
    u, dstate = first.u, first.A.shape[1]
    batch, dim, seqlen = u.shape
    flat = tensors_of(directions)
    if dz is None and needs_z and z is not None:
        dz = torch.empty_like(z)
    if u.numel() == 0:
        empty = [torch.zeros_like(t) if t is not None and need else None for t, need in zip(flat, needs, strict=True)]
        if empty[7] is not None and dlast_state is not None:
            empty[7].copy_(dlast_state)
        return empty, dz, out

    cuda, direct = extension(), is_direct(directions)
    padded, tile_forward, tile = cuda.scan_shape(dstate, direct)
    read = as_read(directions, direct, padded)
    own_delta = read[-1].delta is not None  # also where a lent delta got a bias of its own
    steps = stretch(directions, seq_idx, tile_forward)
    stretches = -(-seqlen // steps) if steps else 1

    def shared(i: int, k: int) -> bool:
        return i == 1 and flat[8 + k] is None

    def addends(t: Tensor) -> Tensor:
        """Room for a gradient in parts, which are summed over the first axis."""
        if t.ndim == 4:
            groups = t.shape[1]
            tiles = -(-(dim // groups) // tile)
            return u.new_empty((tiles, batch, groups, seqlen, padded), dtype=torch.float32)
        if k in (3, 4):  # B or C, constant in time: the kernel adds to it
            return u.new_zeros((stretches * batch, dim, padded), dtype=torch.float32)
        return u.new_empty((stretches * batch, *t.shape), dtype=torch.float32)

    grads: list[Tensor | None] = [None] * len(flat)
    parts: dict[int, list[Tensor]] = {}  # by the index of the tensor in `flat`
    packed = []
    for i, d in enumerate(read):
        results: list[Tensor | None] = []
        for k in range(7):
            owner = k if shared(i, k) else 8 * i + k
            t = flat[owner]
            if t is None or not needs[owner]:
                results.append(None)
            elif k < 2:  # u, delta
                if shared(i, k) and not (k == 1 and own_delta):
                    results.append(None)  # the kernel adds it to the first direction's
                else:
                    results.append(torch.empty_like(t))
                    parts.setdefault(owner, []).append(results[-1])  # type: ignore[arg-type]
            else:
                results.append(addends(t))
                parts.setdefault(owner, []).append(results[-1])  # type: ignore[arg-type]
        dinitial = None
        if i == 0 and flat[7] is not None and needs[7]:
            dinitial = u.new_empty((stretches, *flat[7].shape), dtype=torch.float32)
            grads[7] = dinitial[-1 if d.reverse else 0]
        dlast = fp32(dlast_state) if i == 0 else None
        packed.append(((d.reverse, *d.tensors, None, states[i]), dlast, (*results, dinitial)))
    dout = within_reach(in_layout_of(u, dout))  # type: ignore[assignment]

    def scan(directions: Sequence[tuple[object, ...]], dz: Tensor | None, out: Tensor | None) -> None:
        rest = (options.scale, options.delta_softplus, steps, dout, dz, out)
        cuda.scan_backward(*where(u), directions, within_reach(z), as_int32(seq_idx), *rest)

    ends = [dlast for _, dlast, _ in packed]
    if steps:
        # The gradient of the state is carried from stretch to stretch against the walk.
        reached = [u.new_empty((stretches, batch, dim, dstate), dtype=torch.float32) for _ in packed]
        zeros = [torch.zeros_like(t) for t in reached]
        for d, zero, dlast in zip(read, zeros, ends, strict=True):
            if dlast is not None:
                zero[0 if d.reverse else -1] = dlast
        alone = [(*of, z0, *[None] * 7, to) for (of, _, _), z0, to in zip(packed, zeros, reached, strict=True)]
        scan(alone, None, None)
        shares = shares_left(read, options.delta_softplus, steps)
        backwards = [not d.reverse for d in read]
        ends = [carried(*of) for of in zip(reached, shares, backwards, ends, strict=True)]
    scan([(*of, end, *results) for (of, _, results), end in zip(packed, ends, strict=True)], dz, out)

    for owner, rooms in parts.items():
        t = flat[owner]
        assert t is not None
        if owner % 8 < 2:
            grads[owner] = rooms[0] if len(rooms) == 1 else rooms[0] + rooms[1]
            continue
        total = rooms[0].sum(0) if len(rooms) == 1 else rooms[0].sum(0) + rooms[1].sum(0)
        if owner % 8 in (3, 4):
            total = total[..., :dstate]
        grads[owner] = total.transpose(-1, -2) if t.ndim == 4 else total
    return [g if g is None or t is None else g.to(t.dtype) for g, t in zip(grads, flat, strict=True)], dz, out
