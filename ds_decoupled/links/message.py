"""What travels on a link: one flat buffer, a small header in front.

::

    header (int64, a multiple of 1 KiB)                           payload, every tensor 64-byte aligned
    size of this buffer | micro-batch | numbers in the header | structure of the parts: types and shapes | ...

The header carries the layout, so shapes may change from message to message; it grows with what it has to say. A receive must
be posted before the size of its message is known; it is posted with the size of the last one. A message of another size is
announced by a buffer of the old size whose header says so; the receiver then posts a receive of the new size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ds_decoupled.errors import LinkError
from ds_decoupled.links.codec import Codec
from ds_decoupled.links.table import Codecs

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

    @property
    def nbytes(self) -> int:
        """Bytes of its values."""
        tensors = (t for part in self.parts for t in (part if isinstance(part, tuple) else (part,)) if t is not None)
        return sum(t.numel() * t.element_size() for t in tensors)


_AS_IT_IS = Codec()


def _codec(codecs: Codecs, part: int) -> Codec:
    return codecs[part] if part < len(codecs) else _AS_IT_IS


def _entries(message: Message, codecs: Codecs) -> Iterator[tuple[Tensor, Codec]]:
    """The tensors that are there, and by which codec each travels."""
    for place, part in enumerate(message.parts):
        for tensor in part if isinstance(part, tuple) else (part,):
            if tensor is not None:
                yield tensor, _codec(codecs, place)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGN) * _ALIGN


def encode_header(message: Message, codecs: Codecs) -> tuple[list[int], int]:
    """The header of ``message`` and the size in bytes of its buffer."""
    header = [0, message.micro_batch, 0, len(message.parts)]
    size = 0
    for place, part in enumerate(message.parts):
        header.append(-1 if part is None else 0 if isinstance(part, Tensor) else len(part) + 1)
        for tensor in () if part is None else (part,) if isinstance(part, Tensor) else part:
            if tensor is None:
                header.append(_ABSENT)
                continue
            if tensor.dtype not in _DTYPE_ID or tensor.layout is not torch.strided:
                kind = tensor.dtype if tensor.layout is torch.strided else f"{tensor.layout} layout"
                raise LinkError(f"tensors of {kind} cannot travel between ranks; pass dense ones of a plain type from layer to "
                                "layer")
            header += [_DTYPE_ID[tensor.dtype], tensor.dim(), *tensor.shape]
            size += _aligned(_codec(codecs, place).nbytes(tensor.shape, tensor.dtype))
    # Padded, so that messages of one shape keep one size even if a number in the header needs more room.
    header += [0] * (-len(header) % HEADER_INTS)
    size += 8 * len(header)
    header[0], header[2] = size, len(header)
    return header, size


def write(message: Message, header: list[int], buffer: Tensor, codecs: Codecs, seed: tuple[int, ...] = ()) -> None:
    """Fill ``buffer`` (uint8).

    Args:
        seed: of what codecs draw by chance, with the micro-batch and the tensor's place in the message behind it: no state is
            kept, so that a run that is resumed draws the same.
    """
    offset = 8 * len(header)
    buffer[:offset].view(torch.int64).copy_(torch.tensor(header))
    for place, (tensor, codec) in enumerate(_entries(message, codecs)):
        nbytes = codec.nbytes(tensor.shape, tensor.dtype)
        codec.write(tensor, buffer[offset:offset + nbytes], (*seed, message.micro_batch, place))
        offset += _aligned(nbytes)


def announce(size: int, buffer: Tensor) -> None:
    """Make ``buffer`` say that the next one has ``size`` bytes."""
    buffer[:HEADER_BYTES].view(torch.int64).copy_(torch.tensor([size] + [0] * (HEADER_INTS - 1)))


def read_size(buffer: Tensor) -> int:
    """The size that the header states: of this buffer, or of the next one if it was announced."""
    return int(buffer[:8].view(torch.int64).item())


def read(buffer: Tensor, codecs: Codecs, device: torch.device) -> Message:
    """The message in ``buffer``; its tensors are views where nothing has to be converted."""
    offset = 8 * int(buffer[16:24].view(torch.int64).item())
    header: list[int] = buffer[:offset].view(torch.int64).tolist()
    position = 4

    def tensor(codec: Codec) -> Tensor | None:
        nonlocal position, offset
        if header[position] == _ABSENT:
            position += 1
            return None
        dtype, dims = _DTYPES[header[position]], header[position + 1]
        shape = header[position + 2:position + 2 + dims]
        position += 2 + dims
        nbytes = codec.nbytes(shape, dtype)
        start, offset = offset, offset + _aligned(nbytes)
        return codec.read(buffer[start:start + nbytes], shape, dtype, device)

    parts: list[Any] = []
    for place in range(header[3]):
        count, codec = header[position], _codec(codecs, place)
        position += 1
        parts.append(None if count < 0 else tensor(codec) if count == 0 else tuple(tensor(codec) for _ in range(count - 1)))
    return Message(header[1], tuple(parts))
