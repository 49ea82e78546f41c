"""Seeded inputs for every op, the error metric, and the comparison with the float64 oracle, for tests and benchmarks.

The numeric contract: the oracle is `<op>_ref` in float64 on inputs already rounded to the tested dtype; the error of a
tensor is max|x - oracle| / max|oracle|, for the output and every gradient; the bound is twice the error of the plain
loop in that dtype plus 4 eps(float32), plus half an eps of the tensor's own dtype: its last rounding, which no kernel
can avoid and the plain loop may miss by luck. NaN fails.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

Inputs = dict[str, Any]


def scan_inputs(
    batch: int = 2,
    dim: int = 20,
    seqlen: int = 37,
    dstate: int = 5,
    *,
    dtype: torch.dtype = torch.float32,
    groups: int | None = None,
    constant: str = "",
    D: bool = True,
    z: bool = True,
    delta_bias: bool = True,
    delta_softplus: bool = True,
    channels_last: bool = False,
    initial_state: bool = False,
    seq_idx: bool = False,
    seed: int = 0,
) -> Inputs:
    """Arguments of `selective_scan`. `constant`: those of B and C constant in time; `groups=None`: 3-D B and C."""
    gen = torch.Generator().manual_seed(seed)
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def normal(*shape: int, like: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, generator=gen, dtype=torch.float64).to(like)

    def sequence(*shape: int) -> Tensor:  # (batch, dim, seqlen) in either layout
        x = normal(*shape)
        return x.transpose(1, 2).contiguous().transpose(1, 2) if channels_last else x

    def coefficient(name: str) -> Tensor:
        if name in constant:
            return normal(dim, dstate, like=wide)
        shape = (batch, dstate, seqlen) if groups is None else (batch, groups, dstate, seqlen)
        return normal(*shape)

    inputs: Inputs = {
        "u": sequence(batch, dim, seqlen),
        "delta": sequence(batch, dim, seqlen) * 0.5,
        "A": -torch.exp(normal(dim, dstate, like=wide) * 0.7),
        "B": coefficient("B"),
        "C": coefficient("C"),
        "D": normal(dim, like=wide) if D else None,
        "z": sequence(batch, dim, seqlen) if z else None,
        "delta_bias": normal(dim, like=wide) * 0.3 if delta_bias else None,
        "delta_softplus": delta_softplus,
    }
    if not delta_softplus:  # steps are positive: a state that grew would make rounding errors grow with it
        for name in ("delta", "delta_bias"):
            inputs[name] = None if inputs[name] is None else inputs[name].abs() + 0.1
    if initial_state:
        inputs["initial_state"] = normal(batch, dim, dstate, like=wide)
    if seq_idx:
        cuts = torch.rand(batch, seqlen, generator=gen) < 0.15
        inputs["seq_idx"] = cuts.cumsum(1).to(torch.int32)
    return inputs


def conv_inputs(
    batch: int = 2,
    dim: int = 20,
    seqlen: int = 37,
    width: int = 4,
    *,
    dtype: torch.dtype = torch.float32,
    bias: bool = True,
    channels_last: bool = False,
    initial_states: bool = False,
    seq_idx: bool = False,
    seed: int = 0,
) -> Inputs:
    """Arguments of `causal_conv1d`; weights are float32, or float64 where x is."""
    gen = torch.Generator().manual_seed(seed)
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def normal(*shape: int, like: torch.dtype = wide) -> Tensor:
        return torch.randn(*shape, generator=gen, dtype=torch.float64).to(like)

    x = normal(batch, dim, seqlen, like=dtype)
    inputs: Inputs = {
        "x": x.transpose(1, 2).contiguous().transpose(1, 2) if channels_last else x,
        "weight": normal(dim, width),
        "bias": normal(dim) if bias else None,
    }
    if initial_states:
        inputs["initial_states"] = normal(batch, dim, width - 1, like=dtype)
    if seq_idx:
        inputs["seq_idx"] = (torch.rand(batch, seqlen, generator=gen) < 0.2).cumsum(1)
    return inputs


def inner_inputs(
    batch: int = 2,
    dim: int = 20,
    seqlen: int = 37,
    dstate: int = 5,
    rank: int = 2,
    d_model: int = 10,
    *,
    dtype: torch.dtype = torch.float32,
    second: bool = False,
    seed: int = 0,
) -> Inputs:
    """Arguments of `mamba_inner`, channels last; `second`: of `bimamba_inner`, with weights of its own downwards."""
    gen = torch.Generator().manual_seed(seed)
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def normal(*shape: int, like: torch.dtype = wide, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=gen, dtype=torch.float64) * scale).to(like)

    def side() -> Inputs:
        return {
            "conv1d_weight": normal(dim, 1, 4),
            "conv1d_bias": normal(dim),
            "x_proj_weight": normal(rank + 2 * dstate, dim, scale=dim**-0.5),
            "delta_proj_weight": normal(dim, rank, scale=rank**-0.5),
            "A": -torch.exp(normal(dim, dstate, scale=0.7)),
            "D": normal(dim),
            "delta_bias": normal(dim) - 1,
        }

    inputs: Inputs = {
        "xz": normal(batch, seqlen, 2 * dim, like=dtype).transpose(1, 2),
        **side(),
        "out_proj_weight": normal(d_model, dim, scale=dim**-0.5),
        "out_proj_bias": normal(d_model),
        "B_proj_bias": normal(dstate),
        "C_proj_bias": normal(dstate),
    }
    if second:
        inputs |= {f"{name}_rev": t for name, t in side().items()}
    return inputs


def update_inputs(
    batch: int = 2,
    dim: int = 20,
    dstate: int = 5,
    *,
    dtype: torch.dtype = torch.float32,
    groups: int | None = None,
    D: bool = True,
    z: bool = True,
    dt_bias: bool = True,
    seed: int = 0,
) -> Inputs:
    """Arguments of `selective_state_update`: the last step of `scan_inputs`, and a state."""
    scan = scan_inputs(
        batch, dim, 1, dstate, dtype=dtype, groups=groups, D=D, z=z, delta_bias=dt_bias, initial_state=True, seed=seed
    )
    names = {"state": "initial_state", "x": "u", "dt": "delta", "A": "A", "B": "B", "C": "C", "D": "D", "z": "z"}
    inputs = {name: scan[source] for name, source in names.items()}
    for name in ("x", "dt", "B", "C", "z"):
        inputs[name] = None if inputs[name] is None else inputs[name][..., 0]
    return {**inputs, "dt_bias": scan["delta_bias"], "dt_softplus": True}


def embed_inputs(
    batch: int = 2,
    seqlen: int = 37,
    vocab: int = 113,
    dim: int = 64,
    *,
    dtype: torch.dtype = torch.float32,
    ids: torch.dtype = torch.int64,
    conv: bool = True,
    gate: bool = True,
    bias: bool = True,
    constant_cells: bool = True,
    seed: int = 0,
) -> Inputs:
    """Arguments of `pxby_embed`. `constant_cells`: the four cells that are always id 0 in a raster's windows are 0."""
    gen = torch.Generator().manual_seed(seed)
    width = max(9, dim // 9)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=gen, dtype=torch.float64) * scale).to(dtype)

    scale = (9 * width) ** -0.5
    tokens = torch.randint(0, vocab, (batch, seqlen, 3, 3), generator=gen)
    if constant_cells:
        tokens[:, :, 1, 2] = 0
        tokens[:, :, 2] = 0
    return {
        "tokens": tokens.to(ids),
        "emb": normal(vocab, width),
        "conv_weight": normal(width, width, 3, 3, scale=scale) if conv else None,
        "conv_bias": normal(width, scale=scale) if conv and bias else None,
        "alpha": torch.rand(1, 1, 3, 3, generator=gen, dtype=torch.float64).to(dtype) if gate else None,
        "proj_weight": normal(dim, 9 * width, scale=scale),
        "proj_bias": normal(dim, scale=scale) if bias else None,
        "norm_weight": normal(dim, scale=0.2) + 1,
        "norm_bias": normal(dim, scale=0.2),
    }


def rounded(inputs: Mapping[str, Any], dtype: torch.dtype) -> Inputs:
    """The same values in another dtype: what an oracle is given."""
    return {
        k: v.detach().to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in inputs.items()
    }


def run(op: Callable[..., Any], inputs: Mapping[str, Any], *, seed: int = 1, **options: Any) -> dict[str, Tensor]:
    """Outputs and all gradients of `op(**inputs)` for one fixed random output gradient, by name."""
    leaves = {
        k: v.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        if isinstance(v, Tensor) and v.is_floating_point()
        else v
        for k, v in inputs.items()
    }
    outputs = op(**leaves, **options)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    gen = torch.Generator().manual_seed(seed)
    # Through bfloat16: the same output gradient in every dtype.
    grads = [
        torch.randn(o.shape, generator=gen, dtype=torch.float64).to(torch.bfloat16).to(o.device, o.dtype)
        for o in outputs
    ]
    wanted = {k: v for k, v in leaves.items() if isinstance(v, Tensor) and v.requires_grad}
    found = torch.autograd.grad(outputs, list(wanted.values()), grads, allow_unused=True)
    result = {f"out{i}": o.detach() for i, o in enumerate(outputs)}
    result |= {
        f"d{k}": torch.zeros_like(v) if g is None else g for (k, v), g in zip(wanted.items(), found, strict=True)
    }
    return result


def error(x: Tensor, oracle: Tensor) -> float:
    """max|x - oracle| / max|oracle|; NaN where either is NaN."""
    if oracle.numel() == 0:
        return 0.0 if x.shape == oracle.shape else float("nan")
    x, oracle = x.double(), oracle.double()
    top = oracle.abs().max()
    return float((x - oracle).abs().max() / (top if top > 0 else torch.ones_like(top)))


def assert_matches(
    op: Callable[..., Any],
    reference: Callable[..., Any],
    inputs: Inputs | Sequence[Inputs],
    *,
    options: Mapping[str, Any] | None = None,
    **shared: Any,
) -> None:
    """Holds `op` to the numeric contract. `options` go to `op` only, `shared` to both.

    Several inputs count as one, with the largest error over all: in tensors of a few elements the plain loop's error is
    a matter of luck, and so would be a bound made from one draw.
    """
    found: dict[str, float] = {}
    bounds: dict[str, float] = {}
    for draw in [inputs] if isinstance(inputs, dict) else inputs:
        oracle = run(reference, rounded(draw, torch.float64), **shared)
        plain = run(reference, draw, **shared)
        got = run(op, draw, **shared, **(options or {}))
        assert got.keys() == oracle.keys()
        for name, value in oracle.items():
            kind = torch.finfo(torch.float64 if got["out0"].dtype == torch.float64 else torch.float32)
            slack = 64 if kind.bits == 64 else 4  # in float64 the oracle is only as good as another order of additions
            bound = 2 * error(plain[name], value) + slack * kind.eps + torch.finfo(got[name].dtype).eps / 2
            for largest, this in ((bounds, bound), (found, error(got[name], value))):
                both = torch.tensor([largest.get(name, 0.0), this], dtype=torch.float64)
                largest[name] = both.max().item()  # torch's maximum keeps NaN
    failures = [f"{n}: error {found[n]:.3g} exceeds {bounds[n]:.3g}" for n in found if not found[n] <= bounds[n]]
    assert not failures, "; ".join(failures)
