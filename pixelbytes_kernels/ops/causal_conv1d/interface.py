"""The public function `causal_conv1d`: checks, chooses a backend, calls."""

from __future__ import annotations

from torch import Tensor

from ..._backend import resolve
from ..._check import fit, require_device, require_floats, require_ints, require_shape
from .reference import causal_conv1d_ref

IMPLEMENTED = ("reference", "torch", "cpu", "cuda", "triton")


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    *,
    seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    reverse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Depthwise causal convolution of 2 to 4 taps with optional SiLU, with gradients for every floating-point argument.

        out_t = act(bias + sum_j weight[width - 1 - j] x_{t - j})

    Args:
        x: (batch, dim, seqlen), float32, float64, float16 or bfloat16, any strides.
        weight: (dim, width), width 2 to 4.
        bias: (dim).
        activation: None, "silu" or "swish" (the same).
        seq_idx: (batch, seqlen), integers: a tap that reaches over a change of value counts as zero (packed rows).
        initial_states: (batch, dim, width - 1), inputs before the first step; they belong to the row's first sequence.
        return_final_states: also return the last width - 1 inputs.
        reverse: the anti-causal form, `flip(conv(flip(x)))` without the flips; states then lie behind the last step.
        backend: see `available_backends`.

    Returns:
        out like x, and with `return_final_states` the states (batch, dim, width - 1) in x's dtype.

    Raises:
        ValueError: a wrong shape, width, activation or device. TypeError: a wrong dtype. RuntimeError: `backend` cannot run here.

    Source: names of the causal-conv1d package; the convolution of Gu and Dao, "Mamba" (arXiv 2312.00752), section 3.4.
    """
    op = "causal_conv1d"
    silu = check_conv(op, x, weight, bias, activation)
    if x.ndim != 3 or seq_idx is not None or initial_states is not None:
        require_floats(op, initial_states=initial_states)
        require_ints(op, seq_idx=seq_idx)
        require_device(op, x, seq_idx=seq_idx, initial_states=initial_states)
        require_shape(op, "x", x, batch=-1, dim=-1, seqlen=-1)
        batch, dim, seqlen = x.shape
        require_shape(op, "seq_idx", seq_idx, batch=batch, seqlen=seqlen)
        require_shape(op, "initial_states", initial_states, batch=batch, dim=dim, states=weight.shape[1] - 1)
    name = resolve(op, backend, x, IMPLEMENTED)
    if name == "reference":
        return causal_conv1d_ref(
            x, weight, bias, "silu" if silu else None, seq_idx=seq_idx, initial_states=initial_states,
            return_final_states=return_final_states, reverse=reverse,
        )  # fmt: skip
    from .autograd import convolve

    out, final_states = convolve(name, x, weight, bias, seq_idx, initial_states, silu, reverse, return_final_states)
    return (out, final_states) if return_final_states else out


def check_conv(op: str, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> bool:
    """Raises unless weight and bias fit x; returns whether there is a SiLU."""
    if x.ndim > 1 and weight.ndim == 2 and 2 <= weight.shape[1] <= 4 and activation in (None, "silu", "swish"):
        dim = x.shape[1]  # the usual call; what does not fit it is looked at name by name below
        if fit(x, (x, tuple(x.shape)), (weight, (dim, weight.shape[1])), (bias, (dim,))):
            return activation is not None
    require_floats(op, x=x, weight=weight, bias=bias)
    require_device(op, x, weight=weight, bias=bias)
    if activation not in (None, "silu", "swish"):
        raise ValueError(f"{op}: activation must be None, 'silu' or 'swish', got {activation!r}")
    require_shape(op, "weight", weight, dim=x.shape[1] if x.ndim > 1 else -1, width=-1)
    if not 2 <= weight.shape[1] <= 4:
        raise ValueError(f"{op}: weight must have a width of 2, 3 or 4, got {weight.shape[1]}")
    require_shape(op, "bias", bias, dim=weight.shape[0])
    return activation is not None
