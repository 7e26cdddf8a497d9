"""How the values of a tensor are written on the wire between ranks, and what every codec promises.

A message's header says each tensor's shape and type and nothing of its values, so a codec's bytes follow from these two alone.
Integers, booleans, complex numbers and the 8-bit floats travel as they are under every codec.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import TypeVar

import torch
from torch import Tensor

#: What a codec may shorten.
FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)

Self = TypeVar("Self", bound="Codec")


class Codec:
    """``"none"``: values travel as they are. Others override what is not so of them.

    Attributes:
        name: the setting's value.
    """

    name = "none"

    def by_chance(self: Self) -> Self:
        """The codec that rounds up or down by chance, so that the mean is kept; itself where it only ever rounds to the
        nearest."""
        return self

    def nbytes(self, shape: Sequence[int], dtype: torch.dtype) -> int:
        """The bytes of a tensor of ``shape`` and ``dtype``."""
        return prod(shape) * dtype.itemsize

    def write(self, tensor: Tensor, buffer: Tensor, key: Sequence[int] = ()) -> None:
        """Fill ``buffer``, ``nbytes`` bytes (uint8) that begin on a multiple of 8, with ``tensor``.

        Args:
            key: what names this tensor in the whole run; a codec that rounds by chance draws from it and nothing else.
        """
        if tensor.numel():
            buffer.view(tensor.dtype).view(tensor.shape).copy_(tensor, non_blocking=True)

    def read(self, buffer: Tensor, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """The tensor in ``buffer``, on ``device``; a view where nothing has to be converted."""
        return buffer.view(dtype).view(tuple(shape)).to(device=device, non_blocking=True)


class Cast(Codec):
    """``"bf16"``: float32 and float64 values of any number travel as bfloat16, rounded to the nearest."""

    name = "bf16"

    def _wire(self, dtype: torch.dtype) -> torch.dtype:
        return torch.bfloat16 if dtype in (torch.float32, torch.float64) else dtype

    def nbytes(self, shape: Sequence[int], dtype: torch.dtype) -> int:
        return super().nbytes(shape, self._wire(dtype))

    def write(self, tensor: Tensor, buffer: Tensor, key: Sequence[int] = ()) -> None:
        if tensor.numel():
            buffer.view(self._wire(tensor.dtype)).view(tensor.shape).copy_(tensor, non_blocking=True)

    def read(self, buffer: Tensor, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        return super().read(buffer, shape, self._wire(dtype), device).to(dtype)
