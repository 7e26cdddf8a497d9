"""``"fp8"``, ``"int8"``, ``"int4"``: every number by itself, in one scale with the others of its channel.

::

    scales: float32, one a channel          codes: one number a byte, or two
    s_c = max |x| of the channel / L        q = x / s_c rounded,  x' = q s_c          L = 448, 127, 7

A channel is dimension 1 of a tensor of four dimensions (N, C, H, W), and the last one of two or three (N, features),
(N, T, features); a tensor of another shape has one scale. Symmetric: 0 arrives as 0.

A tensor travels as it is where it has fewer than :data:`SMALL` numbers, or would not get shorter.

A channel that holds a NaN or an infinity has no finite scale: all of it arrives as NaN or infinite. Values that float32 cannot
hold count as infinite. Channels of subnormal scale arrive as 0.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from math import prod
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

from ds_decoupled.links import packing
from ds_decoupled.links.codec import FLOATS, SMALL, Codec, generator_of
from ds_decoupled.tensors import channel_dim

_FLOAT32 = torch.finfo(torch.float32)
_SCALE_BYTES = 4

Self = TypeVar("Self", bound="Scaled")


def draws(shape: Sequence[int], key: Sequence[int], device: torch.device) -> Tensor:
    """Uniform numbers of [0, 1), float32: the same for the same ``key``, unrelated for any other."""
    return torch.rand(tuple(shape), generator=generator_of(key, device), device=device)


class Scaled(Codec, ABC):
    """What the codecs with scales share. To nearest by default, see :meth:`by_chance`.

    Attributes:
        levels: L, the largest code.
    """

    levels: ClassVar[float]
    stochastic = False

    def by_chance(self: Self) -> Self:
        """For gradients: ``E[x'] = x``, where rounding to the nearest would lose every small one for good."""
        twin = copy.copy(self)
        twin.stochastic = True
        return twin

    def nbytes(self, shape: Sequence[int], dtype: torch.dtype) -> int:
        return self._coded_bytes(shape) if self._is_coded(shape, dtype) else super().nbytes(shape, dtype)

    def write(self, tensor: Tensor, buffer: Tensor, key: Sequence[int] = ()) -> None:
        shape = tensor.shape
        if not self._is_coded(shape, tensor.dtype):
            super().write(tensor, buffer, key)
            return
        x = self.prepare(tensor.detach().to(torch.float32))
        scales = self._scales(x)
        # A channel of zeros has the scale 0.
        x = x / scales.where(scales != 0, 1.0)
        codes = self.quantize(x, draws(shape, key, x.device) if self.stochastic else None)
        ends = _SCALE_BYTES * scales.numel()
        buffer[:ends].view(torch.float32).copy_(scales.view(-1), non_blocking=True)
        buffer[ends:].copy_(self.pack(codes.view(torch.uint8).reshape(-1)), non_blocking=True)

    def read(self, buffer: Tensor, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        if not self._is_coded(shape, dtype):
            return super().read(buffer, shape, dtype, device)
        raw = buffer.to(device, non_blocking=True)
        ends = self._coded_bytes(shape) - self.packed_bytes(prod(shape))
        scales = raw[:ends].view(torch.float32).view(_shape_of_scales(shape))
        codes = self.unpack(raw[ends:], prod(shape)).view(tuple(shape))
        return self.undo(self.dequantize(codes).mul_(scales)).to(dtype)

    def _is_coded(self, shape: Sequence[int], dtype: torch.dtype) -> bool:
        count = prod(shape)
        return dtype in FLOATS and count >= SMALL and self._coded_bytes(shape) < count * dtype.itemsize

    def _coded_bytes(self, shape: Sequence[int]) -> int:
        return _SCALE_BYTES * prod(_shape_of_scales(shape)) + self.packed_bytes(prod(shape))

    def _scales(self, x: Tensor) -> Tensor:
        dim = channel_dim(x.shape)
        others = [d for d in range(x.dim()) if d != dim]
        # Two passes over the numbers: several times faster than one over their absolute values.
        largest = torch.maximum(x.amax(others, keepdim=True), -x.amin(others, keepdim=True))
        scales = largest / self.levels
        # levels * scale must not be infinite where the largest number is not.
        most = _FLOAT32.max / self.levels * (1 - _FLOAT32.eps)
        scales = torch.where(largest.isfinite(), scales.clamp(max=most), scales)
        return torch.where(scales < _FLOAT32.tiny, 0.0, scales)

    # -- a codec's own ----------------------------------------------------------------------------------------------------

    def prepare(self, x: Tensor) -> Tensor:
        """What is quantized in place of ``x``, of the same shape."""
        return x

    def undo(self, x: Tensor) -> Tensor:
        """The inverse of :meth:`prepare`."""
        return x

    @abstractmethod
    def quantize(self, x: Tensor, uniform: Tensor | None) -> Tensor:
        """Codes, one byte each, of numbers in ``[-levels, levels]``; ``uniform`` is in ``[0, 1)`` of the same shape, where
        chance rounds. ``x`` may be overwritten."""

    @abstractmethod
    def dequantize(self, codes: Tensor) -> Tensor:
        """The numbers (float32, new) that codes (uint8) stand for."""

    def packed_bytes(self, count: int) -> int:
        """The bytes of so many codes."""
        return count

    def pack(self, codes: Tensor) -> Tensor:
        """``codes`` (count,) uint8 as :meth:`packed_bytes` bytes."""
        return codes

    def unpack(self, packed: Tensor, count: int) -> Tensor:
        """The inverse of :meth:`pack`."""
        return packed


def _shape_of_scales(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(size if d == channel_dim(shape) else 1 for d, size in enumerate(shape))


class Int8(Scaled):
    """``"int8"``: a number a byte, codes -127 … 127."""

    name, levels = "int8", 127.0

    def quantize(self, x: Tensor, uniform: Tensor | None) -> Tensor:
        whole = x.round_() if uniform is None else x.add_(uniform).floor_()
        return whole.clamp_(-self.levels, self.levels).to(torch.int8)

    def dequantize(self, codes: Tensor) -> Tensor:
        return codes.view(torch.int8).to(torch.float32)


class Int4(Int8):
    """``"int4"``: codes -7 … 7, two a byte (:mod:`ds_decoupled.links.packing`)."""

    name, levels = "int4", 7.0

    def packed_bytes(self, count: int) -> int:
        return packing.packed_bytes(count, 4)

    def pack(self, codes: Tensor) -> Tensor:
        return packing.pack(codes, 4)

    def unpack(self, packed: Tensor, count: int) -> Tensor:
        # Up and down again: the arithmetic shift brings the sign back.
        return (packing.unpack(packed, count, 4) << 4).view(torch.int8) >> 4


class Float8(Scaled):
    """``"fp8"``: torch.float8_e4m3fn, four bits of exponent and three of mantissa: small numbers of a channel keep their
    digits, large ones have fewer than in ``"int8"``."""

    name, levels = "fp8", 448.0

    def quantize(self, x: Tensor, uniform: Tensor | None) -> Tensor:
        if uniform is not None:
            # The step at x: an eighth of the power of two below it, and never less than that of the smallest normal number.
            step = (x.view(torch.int32) & 0x7F800000).view(torch.float32).clamp_(min=2.0**-6).mul_(2.0**-3)
            x = x.div_(step).add_(uniform).floor_().mul_(step)
        return x.clamp_(-self.levels, self.levels).to(torch.float8_e4m3fn)

    def dequantize(self, codes: Tensor) -> Tensor:
        return codes.view(torch.float8_e4m3fn).to(torch.float32)
