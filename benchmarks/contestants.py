"""Who takes part: the backends that are usable on a device, and the field's packages where they can be imported.

The packages are called through their public functions, with our arguments put into their order and layout.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor

from benchmarks import plain
from benchmarks.harness import OURS, Setup
from pixelbytes_kernels import available_backends
from pixelbytes_kernels._backend import choose_backend

# name: distributions that bring it, modules that hold what is called, in the order in which they are tried
PEERS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "mamba-ssm": (("mamba-ssm",), ("mamba_ssm.ops.selective_scan_interface",)),
    "mambapy": (("mambapy",), ("mambapy.pscan",)),
    "causal-conv1d": (("causal-conv1d",), ("causal_conv1d",)),
    "flash-linear-attention": (
        ("flash-linear-attention", "fla-core"),
        ("fla.modules.causal_conv1d", "fla.modules.convolution"),  # since 0.6, and before
    ),
}


def peer_version(name: str) -> str:
    """ "" where no distribution of it is installed."""
    for distribution in PEERS[name][0]:
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return ""


@functools.cache
def peer(name: str) -> tuple[Any, str]:
    """The module of a package and "", or None and why it cannot be imported. Stand-ins of ours do not count."""
    if not peer_version(name):
        return None, "not installed"
    why = ""
    for module in PEERS[name][1]:
        try:
            return importlib.import_module(module), ""
        except Exception as failed:  # a wheel for another torch raises anything from ImportError to OSError
            why = why or f"{type(failed).__name__}: {' '.join(str(failed).split())[:160]}"
    return None, f"installed, but not importable: {why}"


def peer_versions() -> str:
    """ "name version" of those that can be imported, or "none"."""
    found = [f"{name} {peer_version(name)}" for name in PEERS if peer(name)[0] is not None]
    return ", ".join(found) or "none"


def auto(setup: Setup, op: str) -> str:
    """The backend that "auto" takes for `op`."""
    return choose_backend("auto", setup.kind, available_backends(), implemented(op), op)


def implemented(op: str) -> tuple[str, ...]:
    return tuple(importlib.import_module(f"pixelbytes_kernels.ops.{op}.interface").IMPLEMENTED)


def backends(setup: Setup, op: str, call: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
    """`call` as ours, and on every other backend that is usable for `op` on this device, the reference apart."""
    usable = available_backends()
    homes = {"cpu": ("cpu",), "cuda": ("cuda",), "triton": ("cuda",), "torch": ("cpu", "cuda")}
    others = [
        name
        for name in implemented(op)
        if setup.kind in homes.get(name, ())
        and usable[name][0]
        and name != auto(setup, op)
        and name not in setup.without
    ]
    return {OURS: call, **{name: functools.partial(call, backend=name) for name in others}}


def peer_scans(bidirectional: bool) -> dict[str, Callable[..., Tensor]]:
    """mamba_ssm's scan, and mamba.py's parallel scan in PyTorch; both directions are two scans with flips, as their users do it."""
    found: dict[str, Callable[..., Tensor]] = {}
    mamba_py, _ = peer("mambapy")
    if mamba_py is not None:
        states = functools.partial(plain.parallel_states, scan=mamba_py.pscan)
        found["mambapy"] = plain.scan_op(states, bidirectional)
    mamba_ssm, _ = peer("mamba-ssm")
    if mamba_ssm is None:
        return found
    scan = mamba_ssm.selective_scan_fn

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
        def one_way(u: Tensor, delta: Tensor, B: Tensor, C: Tensor, z: Tensor | None) -> Tensor:
            return scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus)

        out = one_way(u, delta, B, C, z)
        if bidirectional:
            flipped = [None if t is None else t.flip(-1) for t in (u, delta, B, C, z)]
            out = out + one_way(*flipped).flip(-1)  # type: ignore[arg-type]
        return out

    return {**found, "mamba-ssm": op}


def peer_convolutions() -> dict[str, Callable[..., Tensor]]:
    """x (batch, dim, seqlen), weight (dim, width), bias (dim) -> the same shape, with SiLU."""
    found: dict[str, Callable[..., Tensor]] = {}
    causal, _ = peer("causal-conv1d")
    if causal is not None:
        found["causal-conv1d"] = lambda x, weight, bias=None: causal.causal_conv1d_fn(
            x, weight, bias, activation="silu"
        )
    fla, _ = peer("flash-linear-attention")
    if fla is not None:

        def rows_first(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
            out = fla.causal_conv1d(x=x.transpose(1, 2), weight=weight, bias=bias, activation="silu")
            return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

        found["flash-linear-attention"] = rows_first
    return found


def absent() -> Iterable[str]:
    """A line for each package that takes no part, with the reason."""
    return [f"{name}: {why}" for name in PEERS if (why := peer(name)[1])]
