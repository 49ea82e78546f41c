"""What the kernels are measured against: the same mathematics in plain PyTorch, written as well as it can be without a
kernel.

`parallel_scan` is the formulation that pure PyTorch packages of Mamba use (a work-efficient parallel prefix: Blelloch,
"Prefix sums and their applications", 1990), with its gradient by hand, which is a prefix in the other direction.
`chunked_scan` is the formulation that suits torch.compile: a short loop over time, unrolled and fused, called chunk by
chunk. Both take the arguments of `selective_scan` and are held to its numeric contract before they are timed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pixelbytes.models import BysMamba
from pixelbytes.modules import BiMamba, Mamba, PxByEmbed
from pixelbytes_kernels import MambaLayer, pxby_embed_ref

LONGEST_CHUNK = 32


# ---- the parallel scan -----------------------------------------------------------------------------------------------


def sweep(decay: Tensor, state: Tensor, reverse: bool = False) -> None:
    """In place: state_t += decay_t state_{t-1} along dim 2 of (batch, dim, seqlen, dstate); seqlen a power of two.

    Up: at each stride, the right element of a pair takes in the left one, and its decay becomes the pair's. Down: what
    lies between takes in the finished prefix on its left. `reverse`: the prefix runs from the last step to the first.
    """
    seqlen = decay.shape[2]
    stride = 1
    while stride < seqlen:
        left, right = (stride, 0) if reverse else (stride - 1, 2 * stride - 1)
        left_at, right_at = (slice(start, None, 2 * stride) for start in (left, right))
        state[:, :, right_at] += decay[:, :, right_at] * state[:, :, left_at]
        decay[:, :, right_at] *= decay[:, :, left_at]
        stride *= 2
    stride = seqlen // 4
    while stride >= 1:
        if reverse:
            done, open_ = slice(2 * stride, None, 2 * stride), slice(stride, seqlen - stride, 2 * stride)
        else:
            done, open_ = (
                slice(2 * stride - 1, seqlen - 2 * stride, 2 * stride),
                slice(3 * stride - 1, None, 2 * stride),
            )
        state[:, :, open_] += decay[:, :, open_] * state[:, :, done]
        decay[:, :, open_] *= decay[:, :, done]
        stride //= 2


def _padded(x: Tensor) -> Tensor:
    """A copy, with zeros behind it up to a power of two in dim 2, in the same order of memory."""
    seqlen = x.shape[2]
    whole = 1 << (seqlen - 1).bit_length()
    return x.clone() if whole == seqlen else F.pad(x.transpose(1, 2), (0, 0, 0, 0, 0, whole - seqlen)).transpose(1, 2)


class ParallelScan(torch.autograd.Function):
    """decay, increment (batch, dim, seqlen, dstate) -> every state. Keeps the decay and the states."""

    @staticmethod
    def forward(ctx: Any, decay: Tensor, increment: Tensor) -> Tensor:
        states = _padded(increment)
        sweep(_padded(decay), states)
        states = states[:, :, : decay.shape[2]]
        ctx.save_for_backward(decay, states)
        return states

    @staticmethod
    def backward(ctx: Any, dstates: Tensor) -> tuple[Tensor, Tensor]:
        decay, states = ctx.saved_tensors
        grad = _padded(dstates)
        sweep(_padded(F.pad(decay[:, :, 1:].transpose(1, 2), (0, 0, 0, 0, 0, 1)).transpose(1, 2)), grad, reverse=True)
        grad = grad[:, :, : decay.shape[2]]
        ddecay = torch.zeros_like(decay)
        torch.mul(states[:, :, :-1], grad[:, :, 1:], out=ddecay[:, :, 1:])
        return ddecay, grad


Scan = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def parallel_scan(decay: Tensor, increment: Tensor) -> Tensor:
    """decay, increment (batch, seqlen, dim, dstate) -> every state."""
    return ParallelScan.apply(decay.transpose(1, 2), increment.transpose(1, 2)).transpose(1, 2)


def parallel_states(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    scan: Callable[[Tensor, Tensor], Tensor] = parallel_scan,
) -> Tensor:
    """u, delta (batch, seqlen, dim), B, C (batch, seqlen, dstate) -> y (batch, seqlen, dim); `scan` as `parallel_scan`."""
    decay = torch.exp(delta[..., None] * A)  # (batch, seqlen, dim, dstate)
    increment = (delta[..., None] * B[:, :, None]) * u[..., None]
    states = scan(decay, increment)
    return (states @ C[..., None]).squeeze(-1)


# ---- the chunked scan ------------------------------------------------------------------------------------------------


def chunk_steps(rows: int) -> int:
    """Steps of one compiled chunk for `rows` = batch x dim: with few rows the calls count, with many the cache."""
    return LONGEST_CHUNK if rows <= 1024 else 16


def _chunk(state: Tensor, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    """A few steps: state (batch, dim, dstate), the rest as `parallel_states`."""
    x = delta * u
    y = []
    for t in range(u.shape[1]):
        state = torch.exp(delta[:, t, :, None] * A) * state + x[:, t, :, None] * B[:, t, None]
        y.append((state * C[:, t, None]).sum(-1))
    return state, torch.stack(y, dim=1)


def chunked_states(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, chunk: Callable[..., tuple[Tensor, Tensor]] = _chunk
) -> Tensor:
    seqlen = u.shape[1]
    steps = chunk_steps(u.shape[0] * u.shape[2])
    rest = -seqlen % steps  # a delta of zero leaves the state as it is
    u, delta, B, C = (F.pad(t, (0, 0, 0, rest)) if rest else t for t in (u, delta, B, C))
    state = u.new_zeros(u.shape[0], u.shape[2], A.shape[1])
    y = []
    for pieces in zip(*(t.split(steps, dim=1) for t in (u, delta, B, C)), strict=True):
        state, part = chunk(state, pieces[0], pieces[1], A, pieces[2], pieces[3])
        y.append(part)
    return torch.cat(y, dim=1)[:, :seqlen]


def compiled_states() -> Scan:
    """`chunked_states` whose chunk went through torch.compile; a new one each time, so that sizes stay constants in
    it.
    """
    chunk = compiled(_chunk)
    return lambda u, delta, A, B, C: chunked_states(u, delta, A, B, C, chunk)


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` through torch.compile, once it is called: sizes are constants in it, and no size goes back to eager."""
    made: list[Callable[..., Any]] = []

    def call(*args: Any, **kwargs: Any) -> Any:
        if not made:
            import torch._dynamo  # takes a second or two: only for those who compile

            torch._dynamo.config.cache_size_limit = 256  # the default of 8 sizes would turn the ninth into eager code
            made.append(torch.compile(function, dynamic=False))
        return made[0](*args, **kwargs)

    return call


# ---- the ops made of either ------------------------------------------------------------------------------------------


def scan_op(states: Scan, bidirectional: bool = False) -> Callable[..., Tensor]:
    """`selective_scan`, or `bidirectional_selective_scan` with everything shared (two scans and flips), by `states`.

    16-bit tensors are scanned in float32, as a state has to be.
    """

    def op(
        u: Tensor,
        delta: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None = None,
        z: Tensor | None = None,
        delta_bias: Tensor | None = None,
        delta_softplus: bool = False,
    ) -> Tensor:
        dtype = u.dtype
        if dtype.itemsize < 4:
            u, delta, B, C = (t.float() for t in (u, delta, B, C))
        delta = delta if delta_bias is None else delta + delta_bias[:, None]
        delta = F.softplus(delta) if delta_softplus else delta
        rows = [t.transpose(1, 2).contiguous() for t in (u, delta, B, C)]

        def one_way(u: Tensor, delta: Tensor, B: Tensor, C: Tensor) -> Tensor:
            y = states(u, delta, A, B, C)
            return y if D is None else y + D * u

        y = one_way(*rows)
        if bidirectional:
            y = y + one_way(*(t.flip(1) for t in rows)).flip(1)
        y = y.transpose(1, 2)
        return (y if z is None else y * F.silu(z.to(y.dtype))).to(dtype)

    return op


def conv_silu(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`causal_conv1d` with SiLU: x (batch, dim, seqlen), weight (dim, width)."""
    dim, width = weight.shape
    return F.silu(F.conv1d(x, weight[:, None], bias, padding=width - 1, groups=dim)[..., : x.shape[-1]])


# ---- the model -------------------------------------------------------------------------------------------------------


def mamba(block: Mamba, x: Tensor) -> Tensor:
    """The mixer with `block`'s weights, x (batch, seqlen, d_model), on the parallel scan."""
    u, z = block.in_proj(x).transpose(1, 2).chunk(2, dim=1)
    u = conv_silu(u, block.conv1d.weight.squeeze(1), block.conv1d.bias)
    rows = block.x_proj(u.transpose(1, 2))
    dt, B, C = rows.split([block.dt_rank, block.d_state, block.d_state], dim=-1)
    delta = F.linear(dt, block.dt_proj.weight).transpose(1, 2)
    A = -torch.exp(block.A_log)
    scan = scan_op(parallel_states)
    y = scan(u, delta, A, B.transpose(1, 2), C.transpose(1, 2), block.D, z, block.dt_proj.bias, True)
    return block.out_proj(y.transpose(1, 2))


class PlainBysMamba(nn.Module):
    """`model`'s own weights through plain PyTorch: reference embedding, F.conv1d, parallel scans, flips."""

    def __init__(self, model: BysMamba) -> None:
        super().__init__()
        self.model = model

    def loss(self, x: Tensor, target: Tensor) -> tuple[Tensor, int]:
        """x (batch, seqlen, 3, 3), target (batch): mean cross-entropy of the last position, and their number."""
        model, embed = self.model, self.model.pxby_embedding
        assert isinstance(embed, PxByEmbed)
        conv = embed.patch_embedding
        e = pxby_embed_ref(
            x,
            embed.linear_embedding.weight,
            None if conv is None else conv.weight,
            None if conv is None else conv.bias,
            embed.alpha,
            embed.projection.weight,
            embed.projection.bias,
            embed.norm.weight,
            embed.norm.bias,
            eps=embed.norm.eps,
        )
        for stage in model.modules():
            if not isinstance(stage, Mamba):
                continue
            y = mamba(stage, e)
            if isinstance(stage, BiMamba):
                y = (y + mamba(stage, e.flip(1)).flip(1)) * stage.scale
            e = e + y
        return F.cross_entropy(model.lm_head(e[:, -1]), target), target.numel()


def decode_step(x: Tensor, layers: list[MambaLayer], eps: float = 1e-5) -> Tensor:
    """One token through every layer, eagerly: x (batch, dim); the layers' states are updated in place."""
    for w in layers:
        e = x if w.norm is None else x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * w.norm
        u, z = F.linear(e, w.in_proj, w.in_proj_bias).chunk(2, dim=-1)
        window = torch.cat([w.conv_state.transpose(1, 2), u[..., None]], dim=-1)  # (batch, inner, width)
        w.conv_state.copy_(window[..., 1:].transpose(1, 2))
        u = (window * w.conv_weight).sum(-1)
        u = F.silu(u if w.conv_bias is None else u + w.conv_bias)
        rank, dstate = w.dt_proj.shape[1], w.A.shape[1]
        dt, B, C = F.linear(u, w.x_proj).split([rank, dstate, dstate], dim=-1)
        delta = F.softplus(F.linear(dt, w.dt_proj, w.dt_bias))[..., None]  # (batch, inner, 1)
        w.state.mul_(torch.exp(delta * w.A)).add_(delta * u[..., None] * B[:, None])
        y = (w.state @ C[..., None]).squeeze(-1)
        y = (y if w.D is None else y + w.D * u) * F.silu(z)
        x = x + F.linear(y, w.out_proj, w.out_proj_bias)
    return x
