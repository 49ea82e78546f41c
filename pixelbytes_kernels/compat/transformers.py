"""The Mamba and FalconMamba models of transformers on these kernels, training and generation, on the CPU too.

    from pixelbytes_kernels.compat.transformers import use_kernels
    use_kernels()

transformers calls five functions that its modelling modules look up by name at each call; these are put in their
place. Models that exist already change with them. Needs a release whose modules have those functions (5.x; written
against 5.23).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

from torch import Tensor

from ..ops.mamba_inner import mamba_inner
from . import causal_conv1d_interface, selective_scan_interface, selective_state_update

_originals: dict[str, dict[str, Callable[..., Any]]] = {}


def use_kernels() -> None:
    """Runs Mamba and FalconMamba on these kernels from now on. Twice is the same as once.

    Raises:
        ImportError: no transformers. RuntimeError: a release that picks its kernels in another way; nothing has changed
        then.
    """
    import transformers

    modules = {name: importlib.import_module(name) for name in FUNCTIONS}
    for name, module in modules.items():
        missing = [function for function in FUNCTIONS[name] if not hasattr(module, function)]
        if missing:
            raise RuntimeError(
                f"use_kernels: {name} of transformers {transformers.__version__} has no {', '.join(missing)}; this "
                "release picks its kernels in another way, which is not served"
            )
    for name, module in modules.items():
        if name not in _originals:
            _originals[name] = {function: getattr(module, function) for function in FUNCTIONS[name]}
            _set(module, FUNCTIONS[name])


def restore() -> None:
    """Puts transformers' own functions back. Nothing to do: no error."""
    for name, functions in _originals.items():
        _set(importlib.import_module(name), functions)
    _originals.clear()


def _set(module: ModuleType, functions: dict[str, Callable[..., Any]]) -> None:
    for name, function in functions.items():
        setattr(module, name, function)


def _scan(
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
    **other_paths: bool,  # use_mambapy, use_associative_scan: choices among transformers' own paths
) -> Any:
    return selective_scan_interface.selective_scan_fn(
        u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state
    )


def _conv(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None, **others: Any) -> Any:
    seq_idx = others.get("seq_idx")  # of the rest, meant for attention, a convolution takes nothing
    return causal_conv1d_interface.causal_conv1d_fn(x, weight, bias, seq_idx, activation=activation)


def _falcon_inner(*arguments: Any, **options: Any) -> Tensor:
    """FalconMamba's mixer in training, with the norms where its own code has them, which also scores and generates: on delta before
    dt_proj. mamba_ssm's fused function takes that one behind dt_proj. The weights that come with the norms are ones.
    """
    rms_eps = options.pop("b_c_dt_rms_eps")
    for name in ("b_rms_weight", "c_rms_weight", "dt_rms_weight"):
        options.pop(name)
    return mamba_inner(*arguments, **options, rms_eps=rms_eps)


_MAMBA: dict[str, Callable[..., Any]] = {
    "mamba_inner_fn": selective_scan_interface.mamba_inner_fn,
    "mamba_selective_scan": _scan,
    "mamba_selective_state_update": selective_state_update.selective_state_update,
    "causal_conv1d_fn": _conv,
    "causal_conv1d_update": causal_conv1d_interface.causal_conv1d_update,
}
FUNCTIONS = {  # by module
    "transformers.models.mamba.modeling_mamba": _MAMBA,
    "transformers.models.falcon_mamba.modeling_falcon_mamba": {**_MAMBA, "mamba_inner_fn": _falcon_inner},
}
