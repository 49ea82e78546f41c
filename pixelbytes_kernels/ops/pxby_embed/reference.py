"""pxby_embed, the definition: lookup, 3x3 convolution, gate, projection, LayerNorm. Never tuned.

    X = emb[tokens]                         one embedding per cell of the 3x3 window
    Y = s X + (1 - s) Conv(X)               s = sigmoid(alpha), one number per cell
    out = LayerNorm(proj(flatten(Y)))       flatten is channel-major: (E, 3, 3)

Letters: V ids, E channels of an embedding, D width of the output.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def pxby_embed_ref(
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
) -> Tensor:
    """Arguments, shapes and result as `pxby_embed`; plain torch, any device, differentiable any number of times."""
    batch, seqlen = tokens.shape[:2]
    windows = tokens.reshape(batch * seqlen, 3, 3).long()
    x = F.embedding(windows, emb).permute(0, 3, 1, 2)  # (batch * seqlen, E, 3, 3)
    keep, mix = path_weights(alpha, conv_weight is not None)
    y = x if keep is None else keep * x
    if conv_weight is not None:
        y = y + mix * F.conv2d(x, conv_weight, conv_bias, padding=1)
    pre = F.linear(y.flatten(1), proj_weight, proj_bias)  # (batch * seqlen, D)
    return F.layer_norm(pre, pre.shape[-1:], norm_weight, norm_bias, eps).view(batch, seqlen, pre.shape[-1])


def path_weights(alpha: Tensor | None, conv: bool) -> tuple[Tensor | float | None, Tensor | float]:
    """What multiplies X (None: nothing does) and Conv(X): numbers, or (1, 1, 3, 3)."""
    if alpha is not None:
        keep = torch.sigmoid(alpha)
        return keep, 1 - keep
    return (0.5, 0.5) if conv else (None, 0.0)
