"""A message that is kept as it travels: in as few bytes, until somebody needs its numbers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ds_decoupled.links import message as wire
from ds_decoupled.links.codec import Reader
from ds_decoupled.links.message import Layout, Message
from ds_decoupled.links.places import Codecs


class Packed:
    """One message in its wire form, which can be opened as often as one likes.

    It refers to what reads it: the codebooks that a tensor was written with live as long as a message that needs them. It can
    be pickled; messages that are saved together share their codebooks in the file too.

    Args:
        buffer: header and payload, uint8; it must not change any more.
        layout: what the header says.
        readers: of its tensors, in order.
        device: where :meth:`opened` puts them.
    """

    def __init__(self, buffer: Tensor, layout: Layout, readers: Sequence[Reader], device: torch.device) -> None:
        self.buffer, self.layout, self.readers, self.device = buffer, layout, tuple(readers), device

    @classmethod
    def arrived(cls, buffer: Tensor, codecs: Codecs, device: torch.device) -> Packed:
        """The message in a buffer that has come; to be called for each, in the order in which they come.

        Args:
            codecs: the receiver's.
            device: where its tensors are wanted.
        """
        layout = wire.layout_of(buffer)
        return cls(buffer, layout, wire.readers(buffer, layout, codecs, device), device)

    def placed(self, memory: torch.device, device: torch.device) -> Packed:
        """The same with its buffer in ``memory``, to be opened on ``device``."""
        return Packed(self.buffer.to(memory), self.layout, self.readers, device)

    @property
    def micro_batch(self) -> int:
        """Its number over the whole run."""
        return self.layout.micro_batch

    @property
    def nbytes(self) -> int:
        """Bytes that it keeps; codebooks, which it shares with others, are not counted."""
        return self.buffer.numel()

    def opened(self) -> Message:
        """The message. Its tensors are its own: what is done to them does not change this one."""
        return wire.read(self.buffer.clone(), self.layout, self.readers, self.device)

    def unwrapped(self) -> Message:
        """The message, for the last time: its tensors may be views of the buffer."""
        return wire.read(self.buffer, self.layout, self.readers, self.device)


def bytes_of(messages: Iterable[Message | Packed]) -> int:
    """Bytes of messages, and of the codebooks that read them: these once each."""
    kept = list(messages)
    readers = {id(reader): reader for message in kept if isinstance(message, Packed) for reader in message.readers}
    return sum(message.nbytes for message in kept) + sum(reader.held for reader in readers.values())


def pack(message: Message, codecs: Codecs, seed: tuple[int, ...] = (), device: torch.device | None = None) -> Packed:
    """``message`` in its wire form.

    Args:
        codecs: the sender's, which may learn from it.
        seed: of what they draw by chance.
        device: where the buffer is; by default where the message's tensors are.
    """
    header, coded = wire.encode(message, codecs, seed)
    of_message = message.device
    buffer = torch.empty(header[0], dtype=torch.uint8, device=of_message if device is None else device)
    wire.write(header, coded, buffer)
    if buffer.device.type == "cpu" and of_message.type == "cuda":
        torch.cuda.current_stream(of_message).synchronize()  # the copy to host memory must be complete
    return Packed(buffer, wire.layout_of(buffer), [tensor.reader for tensor in coded], of_message)
