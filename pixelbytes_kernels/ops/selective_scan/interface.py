"""The public function `selective_scan`: checks, chooses a backend, calls."""

from __future__ import annotations

import torch
from torch import Tensor

from ..._backend import resolve
from ..._check import fit, require_device, require_floats, require_ints, require_shape
from .reference import selective_scan_ref

IMPLEMENTED = ("reference", "torch", "cpu", "cuda", "triton")
MAX_DSTATE = 256


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    *,
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
    reverse: bool = False,
    out_dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """The selective scan of Mamba, with gradients for every floating-point argument.

        h_t = exp(delta_t A) h_{t-1} + delta_t B_t u_t
        out_t = (C_t . h_t + D u_t) silu(z_t)

    Args:
        u, delta, z: (batch, dim, seqlen), float32, float64, float16 or bfloat16, any strides: a channels-last tensor seen through
            `transpose(1, 2)` is read in place.
        A: (dim, dstate), real, dstate from 1 to 256.
        B, C: (batch, dstate, seqlen), or (batch, groups, dstate, seqlen) where each group serves dim / groups
            neighbouring channels, or (dim, dstate) constant in time.
        D, delta_bias: (dim).
        delta_softplus: delta becomes softplus(delta + delta_bias), the identity above 20.
        return_last_state: also return the state after the last step.
        initial_state: (batch, dim, dstate), state before the first step; zeros if None.
        seq_idx: (batch, seqlen), integers: the state restarts from zero wherever the value changes (packed rows).
        reverse: time runs downwards, from seqlen - 1 to 0. Nothing is flipped or copied.
        out_dtype: dtype of `out`; default u.dtype. States and sums are float32, or float64 where u is.
        backend: "auto", "cpu", "torch", "reference", ...; see `available_backends`.

    Returns:
        out (batch, dim, seqlen), and with `return_last_state` the state (batch, dim, dstate), float32 or float64, differentiable.

    Raises:
        ValueError: a wrong shape or device. TypeError: a wrong dtype, complex A. RuntimeError: `backend` cannot run here.

    Source: Gu and Dao, "Mamba" (arXiv 2312.00752), section 3; argument names of mamba_ssm's selective_scan_fn. Beyond it: `initial_state`
    and gradients of both states, `seq_idx`, `reverse`, `out_dtype`, any strides, no padding, results that do not depend on the
    number of threads. Values are not checked: NaN and infinity pass through.
    """
    op = "selective_scan"
    check_scan(op, u, delta, A, B, C, D, z, delta_bias, initial_state, seq_idx)
    name = resolve(op, backend, u, IMPLEMENTED)
    if name == "reference":
        return selective_scan_ref(
            u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state,
            initial_state=initial_state, seq_idx=seq_idx, reverse=reverse, out_dtype=out_dtype,
        )  # fmt: skip
    from .autograd import scan

    out, last_state = scan(
        name,
        (u, delta, A, B, C, D, delta_bias, initial_state),
        None,
        z,
        seq_idx,
        delta_softplus,
        1.0,
        reverse,
        out_dtype,
    )
    return (out, last_state) if return_last_state else out


def check_scan(
    op: str,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
    suffix: str = "",
) -> None:
    """Raises unless shapes, dtypes and devices of one direction fit together; `suffix` goes on the names in messages."""
    # The usual call first; what does not fit it is looked at name by name below.
    if u.ndim == 3 and A.ndim == 2 and 1 <= A.shape[1] <= MAX_DSTATE and seq_idx is None:
        batch, dim, seqlen = u.shape
        dstate = A.shape[1]
        row, state, per_channel = (batch, dim, seqlen), (batch, dstate, seqlen), (dim,)
        rows = (u, row), (delta, row), (z, row), (B, state), (C, state), (initial_state, (batch, dim, dstate))
        if fit(u, *rows, (A, (dim, dstate)), (D, per_channel), (delta_bias, per_channel)):
            return

    def named(**tensors: Tensor | None) -> dict[str, Tensor | None]:
        return {name + suffix: tensor for name, tensor in tensors.items()}

    floats = named(u=u, delta=delta, A=A, B=B, C=C, D=D, delta_bias=delta_bias)
    require_floats(op, z=z, initial_state=initial_state, **floats)
    require_ints(op, seq_idx=seq_idx)
    require_device(op, u, z=z, initial_state=initial_state, seq_idx=seq_idx, **floats)
    require_shape(op, "u" + suffix, u, batch=-1, dim=-1, seqlen=-1)
    batch, dim, seqlen = u.shape
    require_shape(op, "delta" + suffix, delta, batch=batch, dim=dim, seqlen=seqlen)
    require_shape(op, "z", z, batch=batch, dim=dim, seqlen=seqlen)
    require_shape(op, "A" + suffix, A, dim=dim, dstate=-1)
    dstate = A.shape[1]
    if not 1 <= dstate <= MAX_DSTATE:
        raise ValueError(f"{op}: A{suffix} must have a dstate from 1 to {MAX_DSTATE}, got {dstate}")
    groups = []
    for name, coefficient in named(B=B, C=C).items():
        assert coefficient is not None
        if coefficient.ndim == 2:
            require_shape(op, name, coefficient, dim=dim, dstate=dstate)
        elif coefficient.ndim == 3:
            require_shape(op, name, coefficient, batch=batch, dstate=dstate, seqlen=seqlen)
            groups.append(1)
        else:
            require_shape(op, name, coefficient, batch=batch, groups=-1, dstate=dstate, seqlen=seqlen)
            groups.append(coefficient.shape[1])
            if groups[-1] < 1 or dim % groups[-1]:
                raise ValueError(f"{op}: {name} has {groups[-1]} groups, which do not divide dim={dim}")
    if len(set(groups)) > 1:
        raise ValueError(
            f"{op}: B{suffix} and C{suffix} must have the same number of groups, got {groups[0]} and {groups[1]}"
        )
    for name, channel in named(D=D, delta_bias=delta_bias).items():
        require_shape(op, name, channel, dim=dim)
    require_shape(op, "initial_state", initial_state, batch=batch, dim=dim, dstate=dstate)
    require_shape(op, "seq_idx", seq_idx, batch=batch, seqlen=seqlen)
