"""How the values of a tensor are written, and what every codec promises.

::

    sender                                                    receiver
    coded = codec.encode(tensor, key)                         reader = codec.reader(bytes, ...)    in the order of arrival
    coded.write(bytes)   coded.nbytes of them      ~~~~~~>    reader.read(bytes, ...)              now, or later

A message's header says each tensor's shape, type and bytes. Most codecs keep nothing from one message to the next: their bytes
follow from shape and type, and they are their own readers. One that learns keeps a state for every tensor of a message
(:meth:`Codec.own`), at the sender and at the receiver, and its reader is what a tensor was written with.

Integers, booleans, complex numbers and the 8-bit floats travel as they are under every codec.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

#: What a codec may shorten.
FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)

#: Fewer numbers than this travel as they are under the codecs that need more than a number's own bits: losses, scalars, a few
#: statistics.
SMALL = 64

Self = TypeVar("Self", bound="Codec")


def generator_of(key: Sequence[int], device: torch.device | str = "cpu") -> torch.Generator:
    """A generator on ``device`` whose draws are the same for the same ``key``, and unrelated for any other."""
    [seed] = np.random.SeedSequence([number & (2**64 - 1) for number in key]).generate_state(1, np.uint64)
    return torch.Generator(device).manual_seed(int(seed))


class Reader(Protocol):
    """What turns a tensor's bytes into the tensor, as often as it is asked; nothing that comes later changes it."""

    @property
    def held(self) -> int:
        """Bytes of what it needs beside the tensor's own."""

    def read(self, buffer: Tensor, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """The tensor in ``buffer`` (uint8), on ``device``; a view where nothing has to be converted."""


@dataclass(frozen=True)
class Coded:
    """A tensor, ready to be written.

    Attributes:
        nbytes: that it takes.
        write: fills a buffer of so many bytes (uint8) that begins on a multiple of 8.
        reader: reads them again.
    """

    nbytes: int
    write: Callable[[Tensor], None]
    reader: Reader


class Codec:
    """``"none"``: values travel as they are. Others override what is not so of them.

    Attributes:
        name: the setting's value.
        held: see :attr:`Reader.held`.
    """

    name = "none"
    held = 0

    def by_chance(self: Self) -> Self:
        """The codec that rounds up or down by chance, so that the mean is kept; itself where it only ever rounds to the
        nearest."""
        return self

    def own(self: Self) -> Self:
        """The codec of one tensor's place on a channel; itself where it keeps nothing."""
        return self

    def encode(self, tensor: Tensor, key: Sequence[int] = ()) -> Coded:
        """``tensor``, ready to be written; a codec with a state learns from it here.

        Args:
            key: what names this tensor in the whole run; what is drawn by chance follows from it and nothing else.
        """
        return Coded(self.nbytes(tensor.shape, tensor.dtype), partial(self.write, tensor, key=key), self)

    def reader(self, buffer: Tensor, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Reader:
        """What reads a tensor that has come; to be asked for every tensor, in the order in which they were encoded."""
        return self

    def state_dict(self) -> dict[str, Any]:
        """What the sender's side keeps, for a checkpoint; empty where it keeps nothing. The receiver's follows from it."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""

    # -- where the bytes follow from shape and type -----------------------------------------------------------------------

    def nbytes(self, shape: Sequence[int], dtype: torch.dtype) -> int:
        """The bytes of a tensor of ``shape`` and ``dtype``."""
        return prod(shape) * dtype.itemsize

    def write(self, tensor: Tensor, buffer: Tensor, key: Sequence[int] = ()) -> None:
        """Fill ``buffer`` of :meth:`nbytes` bytes with ``tensor``."""
        if tensor.numel():
            buffer.view(tensor.dtype).view(tensor.shape).copy_(tensor, non_blocking=True)

    def read(self, buffer: Tensor, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """See :meth:`Reader.read`."""
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
