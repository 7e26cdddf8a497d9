"""What travels on a link: one flat buffer, a small header in front.

::

    header (int64, a multiple of 1 KiB)                           payload, every tensor 64-byte aligned
    size of this buffer | micro-batch | numbers in the header | the parts: types, shapes, bytes | ...

The header carries the layout, so shapes may change from message to message; it grows with what it has to say. A receive must
be posted before the size of its message is known; it is posted with the size of the last one. A message of another size is
announced by a buffer of the old size whose header says so; the receiver then posts a receive of the new size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ds_decoupled.errors import LinkError
from ds_decoupled.links.codec import Coded, Reader
from ds_decoupled.links.places import Codecs

HEADER_INTS = 128  # of the smallest header; a longer one is a multiple
HEADER_BYTES = HEADER_INTS * 8
_ALIGN = 64
_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.uint8, torch.int8, torch.int16, torch.int32,
           torch.int64, torch.bool, torch.complex64, torch.complex128, torch.complex32, torch.uint16, torch.uint32,
           torch.uint64, torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz)
_DTYPE_ID = {dtype: i for i, dtype in enumerate(_DTYPES)}
_ABSENT = -1


@dataclass
class Message:
    """One message.

    Attributes:
        micro_batch: its number over the whole run.
        parts: a tensor, a tuple of tensors (None for an absent one), or None. Activations travel as ``(output, labels)``,
            gradients as ``(gradients, reconstruction or None, loss)``: the loss rides down with its gradient.
    """

    micro_batch: int
    parts: tuple[Any, ...]

    def opened(self) -> Message:
        """Itself: what a message that is kept in its wire form gives (:class:`~ds_decoupled.links.packed.Packed`)."""
        return self

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return sum(tensor.nbytes for _, _, tensor in _tensors(self) if tensor is not None)

    @property
    def device(self) -> torch.device:
        """Where its tensors are: the first of them."""
        return next((tensor.device for _, _, tensor in _tensors(self) if tensor is not None), torch.device("cpu"))


@dataclass(frozen=True)
class Place:
    """One tensor of a buffer.

    Attributes:
        dtype, shape: its type and shape.
        start, stop: where its bytes are.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class Layout:
    """What a header says.

    Attributes:
        micro_batch: the message's.
        parts: the message's, with a :class:`Place` where it has a tensor.
    """

    micro_batch: int
    parts: tuple[Any, ...]

    def places(self) -> list[tuple[int, int, Place]]:
        """The tensors that are there: part, position in it, place."""
        return [(part, position, place) for part, position, place in _tensors(self) if place is not None]


def _tensors(message: Message | Layout) -> list[tuple[int, int, Any]]:
    """All places for a tensor, those of None too: part, position in it, and what is there."""
    return [(part, position, value) for part, values in enumerate(message.parts)
            for position, value in enumerate(values if isinstance(values, tuple) else (values,))]


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGN) * _ALIGN


def encode(message: Message, codecs: Codecs, seed: tuple[int, ...] = ()) -> tuple[list[int], list[Coded]]:
    """The header of ``message``, whose first number is the size of its buffer in bytes, and its tensors, ready to be written.

    Args:
        codecs: the sender's, which may learn from it.
        seed: of what codecs draw by chance, with the micro-batch and the tensor's place in the message behind it: no state is
            kept, so that a run that is resumed draws the same.
    """
    header = [0, message.micro_batch, 0, len(message.parts)]
    coded: list[Coded] = []
    size = 0
    for part, values in enumerate(message.parts):
        header.append(-1 if values is None else 0 if isinstance(values, Tensor) else len(values) + 1)
        for position, tensor in enumerate(() if values is None else (values,) if isinstance(values, Tensor) else values):
            if tensor is None:
                header.append(_ABSENT)
                continue
            if tensor.dtype not in _DTYPE_ID or tensor.layout is not torch.strided:
                kind = tensor.dtype if tensor.layout is torch.strided else f"{tensor.layout} layout"
                raise LinkError(f"tensors of {kind} cannot travel between ranks; pass dense ones of a plain type from layer to "
                                "layer")
            coded.append(codecs.at(part, position).encode(tensor, (*seed, message.micro_batch, len(coded))))
            header += [_DTYPE_ID[tensor.dtype], tensor.dim(), *tensor.shape, coded[-1].nbytes]
            size += _aligned(coded[-1].nbytes)
    # Padded, so that messages of one shape keep one size even if a number in the header needs more room.
    header += [0] * (-len(header) % HEADER_INTS)
    header[0], header[2] = size + 8 * len(header), len(header)
    return header, coded


def write(header: list[int], coded: Sequence[Coded], buffer: Tensor) -> None:
    """Fill ``buffer`` (uint8) with what :func:`encode` gave."""
    offset = 8 * len(header)
    buffer[:offset].view(torch.int64).copy_(torch.tensor(header))
    for tensor in coded:
        tensor.write(buffer[offset:offset + tensor.nbytes])
        offset += _aligned(tensor.nbytes)


def announce(size: int, buffer: Tensor) -> None:
    """Make ``buffer`` say that the next one has ``size`` bytes."""
    buffer[:HEADER_BYTES].view(torch.int64).copy_(torch.tensor([size] + [0] * (HEADER_INTS - 1)))


def read_size(buffer: Tensor) -> int:
    """The size that the header states: of this buffer, or of the next one if it was announced."""
    return int(buffer[:8].view(torch.int64).item())


def layout_of(buffer: Tensor) -> Layout:
    """What the header of ``buffer`` says."""
    offset = 8 * int(buffer[16:24].view(torch.int64).item())
    header: list[int] = buffer[:offset].view(torch.int64).tolist()
    position = 4

    def place() -> Place | None:
        nonlocal position, offset
        if header[position] == _ABSENT:
            position += 1
            return None
        dtype, dims = _DTYPES[header[position]], header[position + 1]
        shape, nbytes = header[position + 2:position + 2 + dims], header[position + 2 + dims]
        position += 3 + dims
        start, offset = offset, offset + _aligned(nbytes)
        return Place(dtype, tuple(shape), start, start + nbytes)

    parts: list[Any] = []
    for _ in range(header[3]):
        count = header[position]
        position += 1
        parts.append(None if count < 0 else place() if count == 0 else tuple(place() for _ in range(count - 1)))
    return Layout(header[1], tuple(parts))


def readers(buffer: Tensor, layout: Layout, codecs: Codecs, device: torch.device) -> tuple[Reader, ...]:
    """What reads the tensors of a buffer that has come. To be asked for every buffer, in the order in which they come."""
    return tuple(codecs.at(part, position).reader(buffer[place.start:place.stop], place.shape, place.dtype, device)
                 for part, position, place in layout.places())


def read(buffer: Tensor, layout: Layout, by: Sequence[Reader], device: torch.device) -> Message:
    """The message in ``buffer``; its tensors are views where nothing has to be converted."""
    each = iter(by)

    def tensor(place: Place | None) -> Tensor | None:
        if place is None:
            return None
        return next(each).read(buffer[place.start:place.stop], place.shape, place.dtype, device)

    return Message(layout.micro_batch, tuple(tuple(map(tensor, part)) if isinstance(part, tuple) else tensor(part)
                                             for part in layout.parts))
