"""Autograd inside of registered ops, for the backends in pure PyTorch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def autograd_inside_op() -> Iterator[None]:
    """Lets the kernel of a registered op take gradients with autograd, which the dispatcher switches off inside ops.

    There is no public way; torch's own control-flow operators do it like this.
    """
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.ADInplaceOrView)
    for device in ("CPU", "CUDA", "XPU"):
        keys = keys | torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, f"Autograd{device}"))
    include, exclude = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()
    with torch._C._ForceDispatchKeyGuard(include, exclude - keys), torch.enable_grad():
        yield
