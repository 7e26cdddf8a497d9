"""``"int4-rotated"``: the features of a channel dimension are rotated before they are quantized, and back by the receiver.

Where numbers share a scale, a few large ones make the steps of all others coarse. A Hadamard matrix spreads each over a block
of ``b`` consecutive channels: ``y = H x / sqrt(b)``, with H's entries 1 and -1. It is orthonormal and symmetric, so that it is
its own inverse, and an error of y is one of x of the same length. QuaRot (arXiv 2404.00456) rotates weights and activations so.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from ds_decoupled.links.scalar import Int4
from ds_decoupled.tensors import channel_dim

#: The largest block. A larger one spreads further and costs more: 2 b operations a number.
BLOCK = 64


@lru_cache(maxsize=32)
def hadamard(size: int, device: torch.device) -> Tensor:
    """The orthonormal Hadamard matrix (size, size) of a power of two, by Sylvester's doubling."""
    pair = torch.tensor([[1.0, 1.0], [1.0, -1.0]])
    matrix = torch.ones(1, 1)
    for _ in range(size.bit_length() - 1):
        matrix = torch.kron(pair, matrix)
    return (matrix / math.sqrt(size)).to(device)


def rotate(x: Tensor) -> Tensor:
    """``x`` (float32) with its channels rotated in blocks of the largest power of two, up to :data:`BLOCK`, that divides
    their number: itself where that is 1, or where there are no channels."""
    dim = channel_dim(x.shape)
    block = 1 if dim is None else math.gcd(x.shape[dim], BLOCK)
    if block == 1:
        return x
    matrix = hadamard(block, x.device)
    if x.dim() == 4:
        count, channels, *rest = x.shape
        return (matrix @ x.reshape(count, channels // block, block, math.prod(rest))).view(x.shape)
    return (x.reshape(-1, block) @ matrix).view(x.shape)


class RotatedInt4(Int4):
    """``"int4-rotated"``: ``"int4"`` of rotated features. A NaN or an infinity spreads over its block of channels."""

    name = "int4-rotated"

    def prepare(self, x: Tensor) -> Tensor:
        return rotate(x)

    def undo(self, x: Tensor) -> Tensor:
        return rotate(x)
