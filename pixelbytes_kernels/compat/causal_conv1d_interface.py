"""Stand-in for causal_conv1d.causal_conv1d_interface. Signatures as published by Dao-AILab/causal-conv1d (1.5)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops.causal_conv1d import causal_conv1d
from ..ops.causal_conv1d import causal_conv1d_ref as plain_conv
from ..ops.causal_conv1d_update import causal_conv1d_update as step
from ..ops.causal_conv1d_update import causal_conv1d_update_ref as plain_step
from ._not_served import NotServed


def causal_conv1d_fn(
    x,
    weight,
    bias=None,
    seq_idx=None,
    initial_states=None,
    return_final_states=False,
    final_states_out=None,
    activation=None,
):
    """`causal_conv1d`: x (batch, dim, seqlen) in either layout -> out in x's dtype and layout, or (out, final states).

    Args:
        weight: (dim, width), width 2 to 4. bias: (dim).
        seq_idx: (batch, seqlen), integers: no tap reaches over a change. Allowed together with states, unlike there.
        initial_states: (batch, dim, width - 1).
        return_final_states: also return the last width - 1 inputs, for any layout of x.
        final_states_out: (batch, dim, width - 1), written to and returned in place of a new tensor.
        activation: None, "silu" or "swish".
    """
    check_activation("causal_conv1d_fn", activation)
    options = {"seq_idx": seq_idx, "initial_states": initial_states, "return_final_states": return_final_states}
    found = causal_conv1d(x, weight, bias, activation, **options)
    return _with_states_out(found, final_states_out)


def causal_conv1d_ref(
    x,
    weight,
    bias=None,
    initial_states=None,
    return_final_states=False,
    final_states_out=None,
    activation=None,
):
    """The definition in plain torch, computed in weight's dtype, out in x's."""
    check_activation("causal_conv1d_ref", activation)
    options = {"initial_states": initial_states, "return_final_states": return_final_states}
    found = plain_conv(x.to(weight.dtype), weight, bias, activation, **options)
    found = (found[0].to(x.dtype), found[1].to(x.dtype)) if isinstance(found, tuple) else found.to(x.dtype)
    return _with_states_out(found, final_states_out)


def causal_conv1d_update(
    x,
    conv_state,
    weight,
    bias=None,
    activation=None,
    cache_seqlens=None,
    conv_state_indices=None,
):
    """One decoding step or a few; `conv_state` is updated in place. No gradients.

    Args:
        x: (batch, dim) or (batch, dim, seqlen).
        conv_state: (batch, dim, state_len), state_len >= width - 1, the newest inputs, oldest first.
        cache_seqlens: (batch), integers: how many inputs came before. conv_state is then a ring: input i of a row is
            kept at i % state_len. At most state_len steps at once.
        conv_state_indices: (batch), integers: the row of conv_state, which may then have any number of rows, of each
            row of x. They must differ from each other; a negative one marks a padding row: its out is 0 and no state
            changes.
    """
    check_activation("causal_conv1d_update", activation)
    return _update(step, x, conv_state, weight, bias, activation, cache_seqlens, conv_state_indices)


def causal_conv1d_update_ref(x, conv_state, weight, bias=None, activation=None, cache_seqlens=None):
    """The definition in plain torch; arguments as `causal_conv1d_update`."""
    check_activation("causal_conv1d_update_ref", activation)
    return _update(plain_step, x, conv_state, weight, bias, activation, cache_seqlens, None)


def check_activation(op: str, activation: str | None) -> None:
    if activation not in (None, "silu", "swish"):
        raise NotServed(f"{op}: activation={activation!r} is not served; there are None, 'silu' and 'swish'")


def _with_states_out(found, final_states_out: Tensor | None):
    if final_states_out is None or not isinstance(found, tuple):
        return found
    final_states_out.copy_(found[1])
    return found[0], final_states_out


@torch.no_grad()
def _update(step, x: Tensor, conv_state: Tensor, weight, bias, activation, cache_seqlens, conv_state_indices) -> Tensor:
    if conv_state_indices is not None:
        rows = conv_state_indices.long()
        real = rows >= 0
        out = torch.zeros_like(x)
        if bool(real.any()):
            taken = conv_state[rows[real]]
            lengths = None if cache_seqlens is None else cache_seqlens[real]
            out[real] = _update(step, x[real], taken, weight, bias, activation, lengths, None)
            conv_state[rows[real]] = taken
        return out
    if cache_seqlens is None:
        return step(x, conv_state, weight, bias, activation)
    op = "causal_conv1d_update"
    seqlen, (batch, dim, state_len), width = x.shape[2] if x.ndim == 3 else 1, conv_state.shape, weight.shape[1]
    if seqlen > state_len:
        raise NotServed(f"{op}: cache_seqlens with more steps ({seqlen}) than state_len ({state_len}) is not served")
    if state_len < width - 1:
        raise ValueError(f"{op}: conv_state must hold at least width - 1 = {width - 1} inputs, got {state_len}")

    def ring(first: int, last: int) -> Tensor:  # places of the inputs first .. last - 1, counted from now
        steps = torch.arange(first, last, device=x.device) + cache_seqlens.long()[:, None]
        return (steps % state_len)[:, None].expand(batch, dim, last - first)

    past = conv_state.gather(2, ring(1 - width, 0))
    conv_state.scatter_(2, ring(0, seqlen), (x if x.ndim == 3 else x[..., None]).to(conv_state.dtype))
    return step(x, past, weight, bias, activation)
