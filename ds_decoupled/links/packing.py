"""Numbers of a few bits, packed without a gap.

A number of b bits is cut into pieces of 8, 4, 2 and 1 bits, the largest first: what b is in binary says which (12 is 8 and 4).
The pieces of one width w lie together, 8/w a byte: byte i of ``h = ceil(n w / 8)`` holds in its lowest w bits the piece of
number i, in the next those of number i + h, and so on. Slices, not neighbours, because they lie in one piece each.

>>> widths(12), packed_bytes(100, 12), packed_bytes(5, 4)
([8, 4], 150, 3)
"""

from __future__ import annotations

import torch
from torch import Tensor

#: The most bits of a number.
MOST = 16


def bits_of(count: int) -> int:
    """The bits of an index that is one of ``count``: log2, rounded up.

    >>> [bits_of(count) for count in (2, 3, 16, 256, 257, 65536)]
    [1, 2, 4, 8, 9, 16]
    """
    return (count - 1).bit_length()


def widths(bits: int) -> list[int]:
    """The widths of a number's pieces, the highest bits first."""
    return [8] * (bits // 8) + [width for width in (4, 2, 1) if bits & width]


def packed_bytes(count: int, bits: int) -> int:
    """The bytes of ``count`` numbers of so many bits."""
    return sum(_bytes(count, width) for width in widths(bits))


def _bytes(count: int, width: int) -> int:
    return -(-count * width // 8)


def pack(numbers: Tensor, bits: int) -> Tensor:
    """``numbers`` (n,), whole and of which the lowest ``bits`` count, as :func:`packed_bytes` bytes (uint8)."""
    parts, below = [], bits
    for width in widths(bits):
        below -= width
        pieces = (numbers >> below if below else numbers).to(torch.uint8)
        parts.append(_pack_pieces(pieces, width))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def unpack(packed: Tensor, count: int, bits: int) -> Tensor:
    """The inverse of :func:`pack`: ``count`` numbers from 0 to 2**bits - 1; uint8 up to 8 bits, int32 above."""
    numbers: Tensor | None = None
    start = 0
    for width in widths(bits):
        end = start + _bytes(count, width)
        pieces = _unpack_pieces(packed[start:end], count, width)
        if bits > 8:
            pieces = pieces.to(torch.int32)
        numbers = pieces if numbers is None else (numbers << width) | pieces
        start = end
    assert numbers is not None
    return numbers


def _pack_pieces(pieces: Tensor, width: int) -> Tensor:
    """``pieces`` (n,) uint8, of which the lowest ``width`` bits count."""
    if width == 8:
        return pieces
    each, mask = _bytes(pieces.numel(), width), (1 << width) - 1
    packed = pieces[:each] & mask
    for place in range(1, 8 // width):
        part = pieces[place * each:(place + 1) * each] & mask
        packed[:part.numel()] |= part << (place * width)
    return packed


def _unpack_pieces(packed: Tensor, count: int, width: int) -> Tensor:
    if width == 8:
        return packed
    each, mask = packed.numel(), (1 << width) - 1
    pieces = packed.new_empty(count)
    for place in range(8 // width):
        part = pieces[place * each:(place + 1) * each]
        torch.bitwise_and(packed[:part.numel()] >> (place * width), mask, out=part)
    return pieces
