"""causal_conv1d in CUDA C++, run by the emulator: the oracle in both arrangements, every option, thread orders, bytes moved."""

from __future__ import annotations

import pytest
import torch
from emulated import emulated, run_in_every_order

from pixelbytes_kernels import causal_conv1d, causal_conv1d_ref
from pixelbytes_kernels.testing import assert_matches, conv_inputs, run

both_directions = pytest.mark.parametrize("reverse", [False, True], ids=["up", "down"])


def check(inputs, **shared):
    shared = {"activation": "silu", "return_final_states": True, **shared}
    with emulated():
        assert_matches(causal_conv1d, causal_conv1d_ref, inputs, options={"backend": "cuda"}, **shared)


# Rows shorter than the taps; dims and lengths that fit the 16-byte packets and that do not; runs with a halo; a warp's end.
@both_directions
@pytest.mark.parametrize("channels_last", [False, True], ids=["time", "channels"])
@pytest.mark.parametrize(
    ("batch", "dim", "seqlen", "width"),
    [(2, 3, 1, 2), (1, 4, 2, 4), (2, 8, 16, 3), (1, 5, 37, 4), (1, 8, 136, 4), (1, 2, 268, 4), (2, 16, 33, 2)],
)
def test_matches_the_oracle(batch, dim, seqlen, width, channels_last, reverse):
    options = {"channels_last": channels_last, "initial_states": True, "seed": 3}
    check(conv_inputs(batch, dim, seqlen, width, **options), reverse=reverse)


@both_directions
@pytest.mark.parametrize("channels_last", [False, True], ids=["time", "channels"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("seqlen", [21, 80])
def test_16_bits(seqlen, dtype, channels_last, reverse):
    draws = [
        conv_inputs(2, 8, seqlen, 4, dtype=dtype, channels_last=channels_last, initial_states=True, seed=s)
        for s in range(3)
    ]
    check(draws, reverse=reverse)


@both_directions
@pytest.mark.parametrize("channels_last", [False, True], ids=["time", "channels"])
@pytest.mark.parametrize(("dim", "seqlen"), [(5, 2), (4, 19), (8, 32)])
def test_packed_rows(dim, seqlen, channels_last, reverse):
    check(
        conv_inputs(2, dim, seqlen, 4, channels_last=channels_last, initial_states=True, seq_idx=True, seed=5),
        reverse=reverse,
    )


@pytest.mark.parametrize("channels_last", [False, True], ids=["time", "channels"])
def test_without_bias_activation_or_states(channels_last):
    inputs = conv_inputs(2, 4, 20, 3, bias=False, channels_last=channels_last)
    check(inputs, activation=None, return_final_states=False)


# Half of a projection, every second channel, every second step, rows at odd addresses: read in place whatever the strides are.
@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[:, :8],
        lambda x: x[:, 8:],
        lambda x: x[:, ::2],
        lambda x: x[:, :, ::2],
        lambda x: x[:, 1:9, 1:],
        lambda x: x[:, :, 3:].flip(0)[:1].expand(3, -1, -1),
    ],
    ids=["first half", "second half", "even channels", "even steps", "odd address", "expanded"],
)
@pytest.mark.parametrize("channels_last", [False, True], ids=["time", "channels"])
def test_strided_views(view, channels_last):
    whole = conv_inputs(2, 16, 24, 4, channels_last=channels_last)["x"]
    x = view(whole)
    rest = conv_inputs(x.shape[0], x.shape[1], x.shape[2], 4, seed=2)
    found = {}
    for backend in ("cuda", "reference"):
        leaf = whole.clone(memory_format=torch.preserve_format).requires_grad_()
        with emulated():
            out = causal_conv1d(view(leaf), rest["weight"], rest["bias"], "silu", backend=backend)
            out.square().sum().backward()
        found[backend] = out.detach(), leaf.grad
    for got, wanted in zip(found["cuda"], found["reference"], strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


@both_directions
@pytest.mark.parametrize("channels_last", [False, True], ids=["time", "channels"])
@pytest.mark.parametrize(("dim", "seqlen"), [(8, 36), (3, 21)])
def test_every_thread_order_gives_the_same_bits(dim, seqlen, channels_last, reverse):
    inputs = conv_inputs(2, dim, seqlen, 4, channels_last=channels_last, initial_states=True, seq_idx=True)
    run_in_every_order(causal_conv1d, inputs, activation="silu", return_final_states=True, reverse=reverse)


@pytest.mark.parametrize("channels_last", [False, True], ids=["time", "channels"])
def test_nan_passes_through(channels_last):
    inputs = conv_inputs(1, 8, 32, 3, channels_last=channels_last)
    inputs["x"][0, 5, 17] = torch.nan
    with emulated():
        got = run(causal_conv1d, inputs, activation="silu", backend="cuda")
    wanted = run(causal_conv1d_ref, inputs, activation="silu")
    for name, tensor in wanted.items():
        assert torch.equal(got[name].isnan(), tensor.isnan()), name


# (dim, seqlen) tensors: x read once and out written once, x and dout read once and dx written once, but for the halo of 3 steps
# at each end of a run.
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("channels_last", [False, True], ids=["time", "channels"])
def test_bytes_moved(channels_last, dtype):
    shape = (1, 8, 512)
    inputs = conv_inputs(*shape, 4, dtype=dtype, channels_last=channels_last)
    with emulated() as module:
        module.emulator_reset_counts()
        run(causal_conv1d, inputs, activation="silu", backend="cuda")
        rows = [row for row in module.emulator_counts() if row[1] == shape]
    size, item = inputs["x"].numel(), dtype.itemsize
    found = {name: (read / size / item, written / size / item) for name, _, _, read, written in rows}
    kind = "channels" if channels_last else "time"
    forward, backward = found[f"conv_forward_{kind}"], found[f"conv_backward_{kind}"]
    assert forward[1] == 1 and backward[1] == 1
    assert 1 <= forward[0] <= 1 + 3 / 16 and 2 <= backward[0] <= 2 + 9 / 16


def test_empty_tensors():
    for shape in ((0, 4, 5), (2, 0, 5), (2, 4, 0)):
        inputs = conv_inputs(*shape, 4, initial_states=True)
        with emulated():
            got = run(causal_conv1d, inputs, return_final_states=True, backend="cuda")
        for name, tensor in run(causal_conv1d_ref, inputs, return_final_states=True).items():
            assert torch.equal(got[name], tensor), name
