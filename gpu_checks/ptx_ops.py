"""`python -m gpu_checks.ptx_ops`: the Triton kernels of convolution, updates and embedding, compiled for sm_75 and run on the CPU.

A second opinion beside the interpreter: threads in random order, so a race shows as a wrong number, and every access is checked. Prints
dynamic thread instructions and bytes per element of the output, as every lane asks for them: lanes that repeat an address count each time.
Needs the ptx_on_cpu runner, see `gpu_checks.ptx_counts`.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from gpu_checks.ptx_counts import Runner, triton_launches
from pixelbytes_kernels import (
    causal_conv1d_ref,
    causal_conv1d_update_ref,
    pxby_embed_ref,
    selective_state_update_ref,
)
from pixelbytes_kernels.ops.causal_conv1d.autograd import Convolution
from pixelbytes_kernels.ops.causal_conv1d_update.triton import update as conv_update
from pixelbytes_kernels.ops.pxby_embed import gpu as embed
from pixelbytes_kernels.ops.pxby_embed.autograd import WEIGHTS, Embed
from pixelbytes_kernels.ops.selective_state_update.triton import update as state_update
from pixelbytes_kernels.testing import Inputs, assert_matches, conv_inputs, embed_inputs, error, update_inputs


def convolution(**kw: Any) -> Any:
    tensors = [kw.get(name) for name in ("x", "weight", "bias", "seq_idx", "initial_states")]
    out, final_states = Convolution.apply("triton", True, kw["reverse"], kw["return_final_states"], *tensors)
    return (out, final_states) if kw["return_final_states"] else out


def embedding(**kw: Any) -> Any:
    return Embed.apply("triton", 1e-5, kw["tokens"], *(kw[name] for name in WEIGHTS))


def matches(op: Callable[..., Any], reference: Callable[..., Any], inputs: Inputs, **shared: Any) -> int:
    """Elements of the output; raises where a number is wrong."""
    assert_matches(op, reference, inputs, **shared)
    return inputs["x"].numel() if "x" in inputs else inputs["tokens"].numel() // 9 * len(inputs["norm_weight"])


def states_match() -> int:
    inputs = update_inputs(2, 40, 16, groups=2)
    state = inputs.pop("state")
    states = [state.clone(), state.double()]
    got = state_update(states[0], **inputs)
    wide = {k: v.double() if isinstance(v, Tensor) else v for k, v in inputs.items()}
    close(got, selective_state_update_ref(states[1], **wide))
    close(*states)
    return got.numel()


def steps_match() -> int:
    inputs = conv_inputs(2, 40, 2)
    states = [torch.linspace(-1, 1, 2 * 40 * 3).view(2, 3, 40).transpose(1, 2).clone() for _ in range(2)]
    got = conv_update(inputs["x"], states[0], inputs["weight"], inputs["bias"], True)
    close(got, causal_conv1d_update_ref(inputs["x"], states[1], inputs["weight"], inputs["bias"], "silu"))
    close(*states)
    return got.numel()


def close(got: Tensor, expected: Tensor) -> None:
    found = error(got, expected)
    assert found <= 8 * torch.finfo(torch.float32).eps, f"error {found:.3g}"


def cases(seqlen: int) -> dict[str, Callable[[], int]]:
    """What is run; each gives the number of elements that its counts are divided by."""
    found: dict[str, Callable[[], int]] = {}
    for arrangement, last in (("walk", True), ("tiles", False)):
        for plain in (True, False):
            options = {} if plain else {"seq_idx": True, "initial_states": last}
            inputs = conv_inputs(1, 64, seqlen, 4, channels_last=last, **options)
            shared = {"activation": "silu", "reverse": not plain, "return_final_states": not plain and last}
            name = f"causal_conv1d, {arrangement}{'' if plain else ', all options'}"
            found[name] = lambda i=inputs, s=shared: matches(convolution, causal_conv1d_ref, i, **s)
    inputs = embed_inputs(1, seqlen, 4, 64, ids=torch.uint8)
    found["pxby_embed"] = lambda: matches(embedding, pxby_embed_ref, inputs)
    return {**found, "selective_state_update": states_match, "causal_conv1d_update": steps_match}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m gpu_checks.ptx_ops", description=__doc__)
    parser.add_argument("--runner", type=Path, help="folder of run_ptx.py (default: the environment's PTX_ON_CPU)")
    parser.add_argument("--seqlen", type=int, default=64)
    args = parser.parse_args(arguments)
    folder = args.runner or os.environ.get("PTX_ON_CPU")
    if not folder:
        parser.error("no runner: name its folder with --runner or PTX_ON_CPU")
    runner = Runner(Path(folder), "random")
    for name, run in cases(args.seqlen).items():
        runner.counts.clear()
        with triton_launches(runner), mock.patch.object(embed, "folded_is_cheaper", lambda *sizes: True):
            elements = run()
        print(f"{name}: the numbers are right")
        for c in runner.counts:
            per = [n / elements for n in (c.instructions, c.read, c.written)]
            assert math.isfinite(sum(per)) and c.atomics == 0, f"{c.kernel} has atomics"
            print(f"  {c.kernel}: {per[0]:.0f} instructions, {per[1]:.1f} bytes read, {per[2]:.1f} written")
    return 0


if __name__ == "__main__":
    sys.exit(main())
