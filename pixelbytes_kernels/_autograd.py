"""What the autograd functions of the ops share; and gradients inside of registered ops."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd import function


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """As torch's decorator of this name, whose cost a backward without `create_graph` does not pay: nothing is recorded there anyway."""
    guarded = function.once_differentiable(backward)

    @functools.wraps(backward)
    def chosen(ctx: Any, *grads: Any) -> Any:
        return (guarded if torch.is_grad_enabled() else backward)(ctx, *grads)

    return chosen


def without_autocast(device: str) -> contextlib.AbstractContextManager[Any]:
    """As `torch.autocast(device, enabled=False)`, which takes its time also where autocast is off."""
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else contextlib.nullcontext()


def in_dtype_of(tensor: Tensor | None, grad: Tensor | None) -> Tensor | None:
    """`grad` in the dtype of its tensor. `Tensor.to` takes its time also where there is nothing to do."""
    return grad if grad is None or tensor is None or grad.dtype == tensor.dtype else grad.to(tensor.dtype)


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
