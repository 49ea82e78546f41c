"""causal_conv1d's functions: layouts, states, packed rows, ring buffers and indexed states."""

from __future__ import annotations

import pytest
import torch

from pixelbytes_kernels import causal_conv1d_ref
from pixelbytes_kernels.compat import causal_conv1d_interface as conv
from pixelbytes_kernels.compat import causal_conv1d_varlen as varlen
from pixelbytes_kernels.testing import error

BOUND = 16 * torch.finfo(torch.float32).eps


def inputs(batch=3, dim=6, seqlen=13, width=4, seed=0, channels_last=False):
    gen = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, dim, seqlen, generator=gen)
    if channels_last:
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    return x, torch.randn(dim, width, generator=gen), torch.randn(dim, generator=gen)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("activation", [None, "silu", "swish"])
@pytest.mark.parametrize("width", [2, 4])
def test_fn_in_both_layouts(channels_last, activation, width):
    x, weight, bias = inputs(width=width, channels_last=channels_last)
    out = conv.causal_conv1d_fn(x, weight, bias, activation=activation)
    assert out.stride() == x.stride() and out.dtype == x.dtype
    assert error(out, causal_conv1d_ref(x.double(), weight.double(), bias.double(), activation)) <= BOUND


def test_fn_half_x_with_float32_weights():
    x, weight, bias = inputs()
    out = conv.causal_conv1d_fn(x.bfloat16(), weight, bias)
    assert out.dtype == torch.bfloat16
    wanted = causal_conv1d_ref(x.bfloat16().double(), weight.double(), bias.double())
    assert error(out, wanted) <= torch.finfo(torch.bfloat16).eps


def test_fn_states_carry_a_sequence_over_a_cut():
    x, weight, bias = inputs()
    whole = conv.causal_conv1d_fn(x, weight, bias, activation="silu")
    first, states = conv.causal_conv1d_fn(x[..., :5], weight, bias, return_final_states=True, activation="silu")
    room = torch.full((3, 6, 3), float("nan"))
    second, last = conv.causal_conv1d_fn(
        x[..., 5:],
        weight,
        bias,
        initial_states=states,
        return_final_states=True,
        final_states_out=room,
        activation="silu",
    )
    assert error(torch.cat([first, second], dim=-1), whole) <= BOUND
    assert last is room and torch.equal(room, x[..., -3:])


def test_fn_seq_idx_equals_each_sequence_alone():
    x, weight, bias = inputs(batch=1)
    seq_idx = torch.tensor([[0] * 4 + [1] * 1 + [2] * 8], dtype=torch.int32)
    out = conv.causal_conv1d_fn(x, weight, bias, seq_idx=seq_idx)
    alone = [conv.causal_conv1d_fn(x[..., a:b], weight, bias) for a, b in ((0, 4), (4, 5), (5, 13))]
    assert error(out, torch.cat(alone, dim=-1)) <= BOUND


def test_ref_is_the_fn():
    x, weight, bias = inputs()
    states = torch.randn(3, 6, 3, generator=torch.Generator().manual_seed(3))
    options = {"initial_states": states, "return_final_states": True, "activation": "silu"}
    for found, wanted in zip(
        conv.causal_conv1d_fn(x, weight, bias, **options),
        conv.causal_conv1d_ref(x, weight, bias, **options),
        strict=True,
    ):
        assert error(found, wanted) <= BOUND


@pytest.mark.parametrize(
    "name", ["causal_conv1d_fn", "causal_conv1d_ref", "causal_conv1d_update", "causal_conv1d_update_ref"]
)
def test_other_activations_are_not_served(name):
    x, weight, bias = inputs()
    state = (torch.zeros(3, 6, 3),) if "update" in name else ()
    with pytest.raises(NotImplementedError, match="activation='gelu'"):
        getattr(conv, name)(x, *state, weight, bias, activation="gelu")


@pytest.mark.parametrize("name", ["causal_conv1d_update", "causal_conv1d_update_ref"])
@pytest.mark.parametrize("state_len", [3, 4, 7])
@pytest.mark.parametrize("ring", [False, True])
def test_updates_equal_the_whole_convolution(name, state_len, ring):
    """Steps of 1, 2 and 3 inputs, around the ring more than once."""
    x, weight, bias = inputs()
    state = torch.zeros(3, 6, state_len)
    done, outs = 0, []
    for count in (1, 3, 2, 1, 3, 3):
        steps = x[..., done : done + count]
        lengths = torch.full((3,), done, dtype=torch.int32) if ring else None
        out = getattr(conv, name)(
            steps[..., 0] if count == 1 else steps, state, weight, bias, "silu", cache_seqlens=lengths
        )
        outs.append(out[..., None] if count == 1 else out)
        done += count
    assert (
        error(torch.cat(outs, dim=-1), causal_conv1d_ref(x.double(), weight.double(), bias.double(), "silu")) <= BOUND
    )
    places = [t % state_len for t in range(13 - state_len, 13)] if ring else list(range(state_len))
    assert torch.equal(state[..., places], x[..., 13 - state_len :])


def test_rows_at_different_places_of_the_ring():
    x, weight, bias = inputs()
    lengths = torch.tensor([2, 5, 9], dtype=torch.int32)
    state = torch.zeros(3, 6, 4)
    for row, length in enumerate(lengths.tolist()):
        for t in range(length):
            state[row, :, t % 4] = x[row, :, t]
    now = torch.stack([x[row, :, length] for row, length in enumerate(lengths.tolist())])
    out = conv.causal_conv1d_update(now, state, weight, bias, cache_seqlens=lengths)
    whole = causal_conv1d_ref(x.double(), weight.double(), bias.double())
    wanted = torch.stack([whole[row, :, length] for row, length in enumerate(lengths.tolist())])
    assert error(out, wanted) <= BOUND


@pytest.mark.parametrize("ring", [False, True])
def test_conv_state_indices(ring):
    """Rows of a larger pool are picked, the others and padding rows left alone."""
    x, weight, bias = inputs()
    pool = torch.randn(6, 6, 4, generator=torch.Generator().manual_seed(5))
    before, rows = pool.clone(), torch.tensor([4, -1, 1], dtype=torch.int32)
    lengths = torch.tensor([6, 0, 3], dtype=torch.int32) if ring else None
    picked = before[[4, 1]].clone()
    wanted = conv.causal_conv1d_update(
        x[[0, 2], :, 0], picked, weight, bias, cache_seqlens=None if lengths is None else lengths[[0, 2]]
    )
    out = conv.causal_conv1d_update(x[..., 0], pool, weight, bias, cache_seqlens=lengths, conv_state_indices=rows)
    assert torch.equal(out[[0, 2]], wanted) and torch.equal(pool[[4, 1]], picked)
    assert not out[1].any() and torch.equal(pool[[0, 2, 3, 5]], before[[0, 2, 3, 5]])


def test_more_steps_than_the_ring_holds_are_not_served():
    x, weight, bias = inputs()
    with pytest.raises(NotImplementedError, match="cache_seqlens"):
        conv.causal_conv1d_update(
            x, torch.zeros(3, 6, 4), weight, bias, cache_seqlens=torch.zeros(3, dtype=torch.int32)
        )


def test_varlen_states():
    """A sequence longer than the state, one shorter, an empty one."""
    x = torch.randn(12, 5, generator=torch.Generator().manual_seed(0))
    cu_seqlens = torch.tensor([0, 7, 7, 9, 12], dtype=torch.int32)
    states = varlen.causal_conv1d_varlen_states(x, cu_seqlens, 3)
    assert states.shape == (4, 5, 3) and states.stride(1) == 1
    assert torch.equal(states[0], x[4:7].T) and not states[1].any()
    assert torch.equal(states[2], torch.cat([torch.zeros(1, 5), x[7:9]]).T) and torch.equal(states[3], x[9:12].T)
    assert torch.equal(states, varlen.causal_conv1d_varlen_states_ref(x, cu_seqlens, 3))
