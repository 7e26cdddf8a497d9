"""What travels on a link: one flat buffer, a small header in front.

::

    header (int64, a multiple of 1 KiB)                           payload, every tensor 64-byte aligned
    size of this buffer | micro-batch | numbers in the header | structure of the parts: types and shapes | ...

The header carries the layout, so shapes may change from message to message; it grows with what it has to say. A receive must
be posted before the size of its message is known; it is posted with the size of the last one. A message of another size is
announced by a buffer of the old size whose header says so; the receiver then posts a receive of the new size.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from ds_decoupled.errors import LinkError
from ds_decoupled.links.codec import Codec

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


def _entries(message: Message) -> list[Tensor | None]:
    return [t for part in message.parts if part is not None for t in (part if isinstance(part, tuple) else (part,))]


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGN) * _ALIGN


def encode_header(message: Message, codec: Codec) -> tuple[list[int], int]:
    """The header of ``message`` and the size in bytes of its buffer."""
    header = [0, message.micro_batch, 0, len(message.parts)]
    size = 0
    for part in message.parts:
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
            size += _aligned(tensor.numel() * codec.wire_dtype(tensor.dtype).itemsize)
    # Padded, so that messages of one shape keep one size even if a number in the header needs more room.
    header += [0] * (-len(header) % HEADER_INTS)
    size += 8 * len(header)
    header[0], header[2] = size, len(header)
    return header, size


def write(message: Message, header: list[int], buffer: Tensor, codec: Codec) -> None:
    """Fill ``buffer`` (uint8)."""
    offset = 8 * len(header)
    buffer[:offset].view(torch.int64).copy_(torch.tensor(header))
    for tensor in _entries(message):
        if tensor is None:
            continue
        wire = codec.wire_dtype(tensor.dtype)
        nbytes = tensor.numel() * wire.itemsize
        if nbytes:
            buffer[offset:offset + nbytes].view(wire).view(tensor.shape).copy_(tensor, non_blocking=True)
        offset += _aligned(nbytes)


def announce(size: int, buffer: Tensor) -> None:
    """Make ``buffer`` say that the next one has ``size`` bytes."""
    buffer[:HEADER_BYTES].view(torch.int64).copy_(torch.tensor([size] + [0] * (HEADER_INTS - 1)))


def read_size(buffer: Tensor) -> int:
    """The size that the header states: of this buffer, or of the next one if it was announced."""
    return int(buffer[:8].view(torch.int64).item())


def read(buffer: Tensor, codec: Codec, device: torch.device) -> Message:
    """The message in ``buffer``; its tensors are views where nothing has to be converted."""
    offset = 8 * int(buffer[16:24].view(torch.int64).item())
    header: list[int] = buffer[:offset].view(torch.int64).tolist()
    position = 4

    def tensor() -> Tensor | None:
        nonlocal position, offset
        if header[position] == _ABSENT:
            position += 1
            return None
        dtype, dims = _DTYPES[header[position]], header[position + 1]
        shape = header[position + 2:position + 2 + dims]
        position += 2 + dims
        wire = codec.wire_dtype(dtype)
        nbytes = prod(shape) * wire.itemsize
        values = buffer[offset:offset + nbytes].view(wire).view(shape)
        offset += _aligned(nbytes)
        return values.to(device=device, dtype=dtype, non_blocking=True)

    parts: list[Any] = []
    for _ in range(header[3]):
        count = header[position]
        position += 1
        parts.append(None if count < 0 else tensor() if count == 0 else tuple(tensor() for _ in range(count - 1)))
    return Message(header[1], tuple(parts))
