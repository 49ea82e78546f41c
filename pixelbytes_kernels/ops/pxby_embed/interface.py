"""The public function `pxby_embed`: checks, chooses a backend, calls."""

from __future__ import annotations

from torch import Tensor

from ..._backend import resolve
from ..._check import INTS, fit, require_device, require_floats, require_ints, require_shape
from .reference import pxby_embed_ref

IMPLEMENTED = ("reference", "torch", "cpu", "cuda", "triton")
OP = "pxby_embed"


def pxby_embed(
    tokens: Tensor,
    emb: Tensor,
    conv_weight: Tensor | None,
    conv_bias: Tensor | None,
    alpha: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor,
    *,
    eps: float = 1e-5,
    backend: str = "auto",
) -> Tensor:
    """Embeds tokens with their 3x3 neighbourhood, with gradients for every weight.

        X = emb[tokens];  Y = s X + (1 - s) Conv(X), s = sigmoid(alpha);  out = LayerNorm(proj(flatten(Y)))

    Args:
        tokens: (batch, seqlen, 3, 3), uint8, int8, int16, int32 or int64, any strides, read as they are; ids in [0, V).
        emb: (V, E), float32, float64, float16 or bfloat16; every other weight has its dtype.
        conv_weight: (E, E, 3, 3), padding 1 within the window; None leaves the convolution out: Y = s X.
        conv_bias: (E) or None.
        alpha: (1, 1, 3, 3), one gate per cell; None weighs both paths alike, as alpha = 0 does (with no convolution:
            Y = X).
        proj_weight: (D, 9 E), its columns channel-major: channel * 9 + cell.
        proj_bias: (D) or None.
        norm_weight, norm_bias: (D).
        eps: added to the variance.
        backend: "auto", "cpu", "torch", "reference", ...; see `available_backends`.

    Returns:
        (batch, seqlen, D) in the dtype of the weights. Sums are float32, or float64 where the weights are, also under
        autocast.

    Raises:
        ValueError: a wrong shape or device. TypeError: a wrong dtype. IndexError: an id outside [0, V), named with
        its place; on a GPU, where the check waits for the device, only if the environment variable
        PIXELBYTES_CHECK_IDS is 1. RuntimeError: `backend` cannot run here; second derivatives, which only
        backend="reference" has.

    Source: the PixelBytes paper, Algorithm 1, with the biases and the LayerNorm of the published code. The result is
    the same for any number of threads. Values are not checked: NaN and infinity pass through, and in the row of an id
    that does not occur they may still reach the gradients of the shared weights. An unchecked id outside [0, V) reads
    nothing with the backends "cuda" and "triton": its row of the result is NaN, and so are the gradients of what the
    tokens share.
    """
    weights = (emb, conv_weight, conv_bias, alpha, proj_weight, proj_bias, norm_weight, norm_bias)
    check_embed(tokens, *weights)
    name = resolve(OP, backend, emb, IMPLEMENTED)
    if name == "reference":
        return pxby_embed_ref(tokens, *weights, eps=eps)
    if name == "torch":
        from .torch_path import embed as embed_torch

        return embed_torch(tokens, *weights, eps=eps)
    from .autograd import embed

    return embed(name, tokens, weights, eps)


def check_embed(
    tokens: Tensor,
    emb: Tensor,
    conv_weight: Tensor | None,
    conv_bias: Tensor | None,
    alpha: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor,
) -> None:
    """Raises unless shapes, dtypes and devices fit together."""
    # The usual call first; what does not fit it is looked at name by name below.
    windows = tokens.dtype in INTS and tokens.shape[2:] == (3, 3)
    if windows and emb.ndim == proj_weight.ndim == 2 and conv_weight is not None:
        (vocab, width), dim = emb.shape, proj_weight.shape[0]
        shapes = (vocab, width), (width, width, 3, 3), (width,), (1, 1, 3, 3), (dim, 9 * width), (dim,), (dim,), (dim,)
        ordered = (emb, conv_weight, conv_bias, alpha, proj_weight, proj_bias, norm_weight, norm_bias)
        alike = all(w is None or w.dtype == emb.dtype for w in ordered)
        if alike and vocab > 0 and width > 0 and dim > 0 and fit(tokens, *zip(ordered, shapes, strict=True)):
            return
    weights = {
        "emb": emb,
        "conv_weight": conv_weight,
        "conv_bias": conv_bias,
        "alpha": alpha,
        "proj_weight": proj_weight,
        "proj_bias": proj_bias,
        "norm_weight": norm_weight,
        "norm_bias": norm_bias,
    }
    require_ints(OP, tokens=tokens)
    require_floats(OP, **weights)
    require_device(OP, tokens, **weights)
    for name, weight in weights.items():
        if weight is not None and weight.dtype != emb.dtype:
            raise TypeError(f"{OP}: {name} must be {emb.dtype} like emb, got {weight.dtype}")
    require_shape(OP, "tokens", tokens, batch=-1, seqlen=-1, rows=3, columns=3)
    require_shape(OP, "emb", emb, vocab=-1, width=-1)
    vocab, width = emb.shape
    if vocab < 1 or width < 1:
        raise ValueError(f"{OP}: emb must have at least one row and one column, got {tuple(emb.shape)}")
    require_shape(OP, "conv_weight", conv_weight, width_out=width, width=width, rows=3, columns=3)
    require_shape(OP, "conv_bias", conv_bias, width=width)
    if conv_weight is None and conv_bias is not None:
        raise ValueError(f"{OP}: conv_bias must be None where conv_weight is None, got shape {tuple(conv_bias.shape)}")
    require_shape(OP, "alpha", alpha, one=1, one_=1, rows=3, columns=3)
    require_shape(OP, "proj_weight", proj_weight, dim=-1, inputs=9 * width)
    dim = proj_weight.shape[0]
    if dim < 1:
        raise ValueError(f"{OP}: proj_weight must have at least one row, got {tuple(proj_weight.shape)}")
    require_shape(OP, "proj_bias", proj_bias, dim=dim)
    require_shape(OP, "norm_weight", norm_weight, dim=dim)
    require_shape(OP, "norm_bias", norm_bias, dim=dim)
