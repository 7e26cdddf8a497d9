"""``"vq"``: vectors of a few channels travel as their places in a codebook that the sender learns.

::

    int64: version | a byte a group of channels: is it finite? | indices, log2 K bits each | float32: codebooks, now and then
                     (padded to 8 bytes)                         (padded to 8 bytes)

The sender learns from every tensor (:class:`~ds_decoupled.nn.quantize.VectorQuantizer`), and both sides use a frozen copy: the
one that was last sent. A new one is sent with the first tensor, ``every`` tensors after the last, and whenever what is learned
has moved from it by more than ``moved`` of its length. Copies have versions; what a tensor was written with reads it
(:class:`Codebooks`), whatever has come since.

A tensor that holds a NaN or an infinity teaches nothing, and the group of channels that has it arrives as NaN throughout.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from ds_decoupled.errors import ConfigError, LinkError
from ds_decoupled.links import packing
from ds_decoupled.links.codec import FLOATS, SMALL, Codec, Coded, Reader, generator_of
from ds_decoupled.nn.quantize import VectorQuantizer, decode, encode, from_vectors, to_vectors
from ds_decoupled.tensors import channel_dim

_SETTING = "decoupled.vq"
_NONE = -1  # the version of no codebook


def _padded(nbytes: int) -> int:
    return -(-nbytes // 8) * 8


def check_vectors(shape: Sequence[int], group: int, codebook: int) -> None:
    """A tensor of ``shape``, which has channels, can be quantized.

    Raises:
        ConfigError: if ``group`` does not divide its channels, or it has fewer vectors than a codebook.
    """
    dim = channel_dim(shape)
    assert dim is not None
    channels = shape[dim]
    if channels % group:
        raise ConfigError(f"{_SETTING}.group", group, f"it must divide the channels of what is sent, and a tensor "
                          f"{tuple(shape)} has {channels}", "Take a divisor of them, or another codec.")
    vectors = prod(shape) // channels
    if vectors < codebook:
        raise ConfigError(f"{_SETTING}.codebook", codebook, "a codebook begins as vectors of a micro-batch, and a tensor "
                          f"{tuple(shape)} has {vectors} of each group of channels", "Take a smaller codebook, or larger "
                          "micro-batches.")


@dataclass(frozen=True)
class Layout:
    """Where things lie in the bytes of a tensor.

    Attributes:
        groups: G.
        indices: where they begin.
        ends: where they end, and a codebook may follow.
    """

    groups: int
    indices: int
    ends: int

    @classmethod
    def of(cls, shape: Sequence[int], group: int, levels: int, bits: int) -> Layout:
        """Of a tensor of ``shape``."""
        dim = channel_dim(shape)
        assert dim is not None
        groups = shape[dim] // group
        start = 8 + _padded(groups)
        return cls(groups, start, start + _padded(packing.packed_bytes(levels * prod(shape) // group, bits)))


@dataclass(frozen=True, eq=False)
class Codebooks:
    """One version of a tensor's codebooks, and how what was written with them is read. It stays as it is.

    Attributes:
        version: counts from 0.
        vectors: (L, G, K, D) float32.
    """

    version: int
    vectors: Tensor

    @property
    def held(self) -> int:
        """Bytes of the vectors."""
        return self.vectors.nbytes

    def read(self, buffer: Tensor, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """See :meth:`ds_decoupled.links.codec.Reader.read`."""
        levels, groups, codebook, group = self.vectors.shape
        bits = packing.bits_of(codebook)
        layout = Layout.of(shape, group, levels, bits)
        raw = buffer[:layout.ends].to(device, non_blocking=True)
        indices = packing.unpack(raw[layout.indices:], levels * prod(shape) // group, bits)
        vectors = decode(indices.view(levels, groups, -1), self.vectors.to(device))
        if not bool(raw[8:8 + groups].all()):
            vectors[raw[8:8 + groups] == 0] = torch.nan
        return from_vectors(vectors, shape).to(dtype)


class VectorCodec(Codec):
    """``"vq"``; what the settings mean is said at :class:`ds_decoupled.config.VectorSettings`.

    One of these is the sender's or the receiver's side of one tensor's place, see :meth:`own`.
    """

    name = "vq"

    def __init__(self, group: int = 8, codebook: int = 256, levels: int = 1, decay: float = 0.99, every: int = 50,
                 moved: float = 0.1, revive: bool = True) -> None:
        self.group, self.codebook, self.levels, self.decay = group, codebook, levels, decay
        self.every, self.moved, self.revive = every, moved, revive
        self.bits = packing.bits_of(codebook)
        #: The sender's: what it learns, what it last sent, tensors since, and whether the receiver has that.
        self._quantizer: VectorQuantizer | None = None
        self._sent: Codebooks | None = None
        self._since = 0
        self._is_there = False
        #: The receiver's: what came last.
        self._came: Codebooks | None = None

    def own(self) -> VectorCodec:
        return VectorCodec(self.group, self.codebook, self.levels, self.decay, self.every, self.moved, self.revive)

    def is_coded(self, shape: Sequence[int], dtype: torch.dtype) -> bool:
        """Whether such a tensor is quantized: floats, with channels, not few, and if that makes them shorter."""
        count = prod(shape)
        return (dtype in FLOATS and channel_dim(shape) is not None and count >= SMALL
                and self.levels * count // self.group * self.bits < 8 * count * dtype.itemsize)

    def nbytes(self, shape: Sequence[int], dtype: torch.dtype) -> int:
        """The bytes of a tensor with which no codebook travels."""
        if not self.is_coded(shape, dtype):
            return super().nbytes(shape, dtype)
        return Layout.of(shape, self.group, self.levels, self.bits).ends

    # -- the sender -------------------------------------------------------------------------------------------------------

    def encode(self, tensor: Tensor, key: Sequence[int] = ()) -> Coded:
        """See :meth:`Codec.encode`.

        Raises:
            ConfigError: if the tensor cannot be quantized (:func:`check_vectors`).
        """
        shape = tensor.shape
        if not self.is_coded(shape, tensor.dtype):
            return super().encode(tensor, key)
        if self._quantizer is None or not self._quantizer.started:
            check_vectors(shape, self.group, self.codebook)
        layout = Layout.of(shape, self.group, self.levels, self.bits)
        self._check_groups(shape, layout.groups, None if self._quantizer is None else self._quantizer.codebooks)
        vectors = to_vectors(tensor.detach(), self.group)
        if self._quantizer is None:
            self._quantizer = VectorQuantizer(layout.groups, self.group, self.codebook, self.levels, self.decay, self.revive,
                                              tensor.device)
        quantizer = self._quantizer
        finite = vectors.amax((1, 2)).isfinite() & vectors.amin((1, 2)).isfinite()
        if bool(finite.all()):
            quantizer.learn(vectors, generator_of(key))
        if not quantizer.started:
            books, finite, rides = Codebooks(_NONE, quantizer.codebooks.clone()), torch.zeros_like(finite), False
        else:
            books, rides = self._books(quantizer)
        packed = packing.pack(encode(vectors, books.vectors).view(-1), self.bits)

        def write(buffer: Tensor) -> None:
            buffer[:8].view(torch.int64).fill_(books.version)
            buffer[8:8 + layout.groups].copy_(finite, non_blocking=True)
            buffer[8 + layout.groups:layout.indices].zero_()
            buffer[layout.indices:layout.indices + packed.numel()].copy_(packed, non_blocking=True)
            buffer[layout.indices + packed.numel():layout.ends].zero_()
            if rides:
                buffer[layout.ends:].view(torch.float32).copy_(books.vectors.view(-1), non_blocking=True)

        return Coded(layout.ends + rides * books.vectors.nbytes, write, books)

    def _books(self, quantizer: VectorQuantizer) -> tuple[Codebooks, bool]:
        """What this tensor is written with, and whether it travels along."""
        sent = self._sent
        if sent is None or self._since >= self.every or quantizer.moved_from(sent.vectors) > self.moved:
            sent = self._sent = Codebooks(0 if sent is None else sent.version + 1, quantizer.codebooks.clone())
            self._since, self._is_there = 0, False
        rides, self._is_there = not self._is_there, True
        self._since += 1
        return sent, rides

    def _check_groups(self, shape: Sequence[int], groups: int, books: Tensor | None) -> None:
        if books is not None and books.shape[1] != groups:
            raise LinkError(f"a tensor {tuple(shape)} came to a place that had {books.shape[1] * self.group} channels before, "
                            "and its codebooks are for these: \"vq\" needs the same channels in every micro-batch")

    # -- the receiver -----------------------------------------------------------------------------------------------------

    def reader(self, buffer: Tensor, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Reader:
        if not self.is_coded(shape, dtype):
            return super().reader(buffer, shape, dtype, device)
        layout = Layout.of(shape, self.group, self.levels, self.bits)
        version = int(buffer[:8].view(torch.int64))
        of_books = (self.levels, layout.groups, self.codebook, self.group)
        if version == _NONE:
            return Codebooks(_NONE, torch.zeros(of_books, device=device))
        if buffer.numel() > layout.ends:
            # Copied: a view would keep the whole message as long as the codebooks live.
            vectors = buffer[layout.ends:].view(torch.float32).view(of_books).to(device, copy=True)
            self._came = Codebooks(version, vectors)
        if self._came is None or self._came.version != version:
            here = "none" if self._came is None else f"version {self._came.version}"
            raise LinkError(f"a tensor came that was written with version {version} of its codebooks, and here is {here}")
        return self._came

    # -- checkpoints ------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        if self._quantizer is None:
            return {}
        return {"quantizer": self._quantizer.state_dict(), "since": self._since,
                "sent": None if self._sent is None else (self._sent.version, self._sent.vectors)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The copy that was last sent travels once more with the next tensor, because the receiver may be another one."""
        levels, groups, codebook, group = state["quantizer"]["codebooks"].shape
        if (levels, codebook, group) != (self.levels, self.codebook, self.group):
            raise ValueError(f"the checkpoint's codebooks have levels {levels}, codebook {codebook} and group {group}, and "
                             f"\"{_SETTING}\" says {self.levels}, {self.codebook} and {self.group}")
        device = state["quantizer"]["codebooks"].device
        self._quantizer = VectorQuantizer(groups, group, codebook, levels, self.decay, self.revive, device)
        self._quantizer.load_state_dict(state["quantizer"])
        self._sent = None if state["sent"] is None else Codebooks(*state["sent"])
        self._since, self._is_there = state["since"], False
