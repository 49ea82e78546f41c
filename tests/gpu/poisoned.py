"""Buffers with poisoned margins: nothing outside a tensor may be read into a result, nor be written."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from unittest import mock

import torch
from torch import Tensor

MARGIN = 4096  # elements on each side


class Margins:
    """Makes tensors in the middle of larger buffers and looks after the buffers."""

    def __init__(self) -> None:
        self.buffers: list[tuple[str, Tensor, int, Tensor]] = []

    def new(
        self, name: str, size: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype, device="cpu"
    ) -> Tensor:
        """An uninitialised tensor: NaN, or the smallest integer, inside and around."""
        extent = 1 + sum((n - 1) * s for n, s in zip(size, stride, strict=True)) if 0 not in size else 0
        poison = torch.nan if dtype.is_floating_point else (0 if dtype == torch.bool else torch.iinfo(dtype).min)
        buffer = torch.full((extent + 2 * MARGIN,), poison, dtype=dtype, device=device)
        self.buffers.append((name, buffer, extent, buffer.clone()))
        return buffer.as_strided(size, stride, MARGIN)

    def around(self, name: str, tensor: Tensor) -> Tensor:
        """The same values and strides inside of poison."""
        if any(s == 0 and n > 1 for n, s in zip(tensor.shape, tensor.stride(), strict=True)):
            raise ValueError(f"{name} is expanded")
        new = self.new(name, tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device)
        return new.copy_(tensor.detach())

    def check(self) -> None:
        """Raises unless every margin is as it was."""
        for name, buffer, extent, before in self.buffers:
            for side, part in (("before", slice(0, MARGIN)), ("after", slice(MARGIN + extent, None))):
                got, was = buffer[part], before[part]
                same = (got == was) | (got.isnan() & was.isnan() if got.is_floating_point() else got == was)
                assert same.all(), f"{int((~same).sum())} elements {side} {name} were written"


@contextlib.contextmanager
def poisoned_allocations() -> Iterator[Margins]:
    """`torch.empty_like`, `Tensor.new_empty` and `new_empty_strided` give poisoned buffers: outputs, scratch memory. Checks at the end."""
    margins = Margins()
    real_empty_like, real_empty_strided = torch.empty_like, Tensor.new_empty_strided

    def strides_of(shape: tuple[int, ...]) -> tuple[int, ...]:
        return torch.empty(shape, device="meta").stride()

    def as_shape(shape) -> tuple[int, ...]:
        return tuple(shape[0]) if len(shape) == 1 and not isinstance(shape[0], int) else tuple(shape)

    def empty_like(like: Tensor, dtype=None, device=None, **kwargs) -> Tensor:
        if device == "meta":  # asked for its strides
            return real_empty_like(like, device=device, **kwargs)
        stride = real_empty_like(like, device="meta", **kwargs).stride()
        return margins.new("empty_like", tuple(like.shape), stride, dtype or like.dtype, device or like.device)

    def new_empty(self: Tensor, *shape, dtype=None, device=None) -> Tensor:
        shape = as_shape(shape)
        return margins.new("new_empty", shape, strides_of(shape), dtype or self.dtype, device or self.device)

    def new_empty_strided(self: Tensor, shape, stride, dtype=None, device=None) -> Tensor:
        if device == "meta":
            return real_empty_strided(self, shape, stride, dtype=dtype, device=device)
        return margins.new("new_empty_strided", tuple(shape), tuple(stride), dtype or self.dtype, device or self.device)

    with (
        mock.patch.object(torch, "empty_like", empty_like),
        mock.patch.object(Tensor, "new_empty", new_empty),
        mock.patch.object(Tensor, "new_empty_strided", new_empty_strided),
    ):
        yield margins
    margins.check()
