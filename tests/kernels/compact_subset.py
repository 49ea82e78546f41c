"""A program: every kernel of `_cpu` once over the risky shapes against the oracle; prints a digest of each result.

Run by the tests in processes of their own: under each instruction set, under sanitizers, with memory filled.
"""

from __future__ import annotations

import hashlib
import sys

import torch

import pixelbytes_kernels as pk
from pixelbytes_kernels import testing as t


def digest(name, results):
    assert not any(v.isnan().any() for v in results.values()), name
    found = hashlib.sha256(b"".join(v.contiguous().view(torch.uint8).numpy().tobytes() for v in results.values()))
    print(name, found.hexdigest())


def check(name, inputs, **shared):
    op, reference = getattr(pk, name), getattr(pk, f"{name}_ref")
    t.assert_matches(op, reference, inputs, options={"backend": "cpu"}, **shared)
    digest(name, t.run(op, inputs, backend="cpu", **shared))


def scans():
    other = t.scan_inputs(2, 17, 33, 5, seed=7)
    own = {f"{n}_rev": other[n] for n in ("u", "delta", "A", "B", "C", "D", "delta_bias")}
    for reverse in (False, True):
        shared = {"return_last_state": True, "reverse": reverse}
        for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
            check("selective_scan", t.scan_inputs(2, 17, 65, 5, dtype=dtype, channels_last=reverse), **shared)
        states = {"initial_state": True, "seq_idx": True}
        check("selective_scan", t.scan_inputs(2, 51, 33, 6, groups=3, **states), **shared)
        check("selective_scan", t.scan_inputs(2, 17, 34, 5, constant="BC", z=False, D=False, **states), **shared)
        check("selective_scan", t.scan_inputs(1, 33, 1, 1, delta_softplus=False, delta_bias=False), **shared)
    check("bidirectional_selective_scan", t.scan_inputs(2, 17, 65, 5), scale=0.5)
    subnormal, one = torch.arange(1, 1024, dtype=torch.int16).view(torch.float16).reshape(1, 1, -1), torch.ones(1, 1, 1)
    rows = one.expand(1, 1, 1023), -10 * one[0], one.expand(1, 1, 1023), one.expand(1, 1, 1023)
    out = pk.selective_scan(subnormal, *rows, backend="cpu")
    torch.testing.assert_close(out, pk.selective_scan_ref(subnormal, *rows), rtol=2e-3, atol=6e-8)
    check("bidirectional_selective_scan", {**t.scan_inputs(2, 17, 33, 5), **own})


def convolutions():
    for reverse in (False, True):
        shared = {"activation": "silu", "return_final_states": True, "reverse": reverse}
        for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
            inputs = t.conv_inputs(2, 17, 65, 4, dtype=dtype, channels_last=reverse, seq_idx=True, initial_states=True)
            check("causal_conv1d", inputs, **shared)
        check("causal_conv1d", t.conv_inputs(1, 33, 2, 3, channels_last=True), **shared)


def decoding():
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        inputs = t.update_inputs(2, 17, 5, dtype=dtype)
        state = inputs["state"].clone()
        out = pk.selective_state_update(**{**inputs, "state": state}, backend="cpu")
        expected = pk.selective_state_update_ref(**inputs)
        close = 1e-5 if dtype != torch.bfloat16 else 2e-2
        torch.testing.assert_close(out, expected, rtol=close, atol=close)
        digest("selective_state_update", {"out": out, "state": state})
    gen = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(*shape, generator=gen) * 0.3  # noqa: E731
    dim, inner, dstate, rank = 20, 41, 5, 3
    weights = (
        *(normal(dim), normal(2 * inner, dim), None, normal(inner, 4), normal(inner), normal(rank + 2 * dstate, inner)),
        *(normal(inner, rank), normal(inner), -normal(inner, dstate).exp(), normal(inner), normal(dim, inner), None),
    )
    outputs = []
    for backend in ("torch", "cpu"):
        layers = [pk.MambaLayer(*weights, torch.zeros(2, 3, inner), torch.zeros(2, inner, dstate)) for _ in range(2)]
        step = pk.MambaStep(layers, backend=backend)
        outputs.append({"out": torch.cat([step(torch.ones(2, dim)) for _ in range(3)])})
    torch.testing.assert_close(outputs[1]["out"], outputs[0]["out"], rtol=1e-4, atol=1e-5)
    digest("mamba_step", outputs[1])


def mixers():
    check("mamba_inner", t.inner_inputs(2, 17, 33, 5))
    check("bimamba_inner", t.inner_inputs(2, 17, 33, 5, second=True))


def embedding():
    check("pxby_embed", t.embed_inputs(2, 300, 40, 20))
    check("pxby_embed", t.embed_inputs(1, 3, 40, 20))


if __name__ == "__main__":
    usable, reason = pk.available_backends()["cpu"]
    assert usable, reason
    print("running on:", reason, "from", pk.__file__, file=sys.stderr)
    for part in (scans, convolutions, decoding, mixers, embedding):
        part()
