"""A link between two stages of one rank: a queue."""

from __future__ import annotations

from collections import deque
from typing import TypeVar

from ds_decoupled.errors import LinkError
from ds_decoupled.links.message import Message
from ds_decoupled.links.packed import Packed
from ds_decoupled.links.writer import Writer

M = TypeVar("M", Message, Packed, Message | Packed)


class LocalLink:
    """First in, first out; a micro-batch other than the one that is due is an error at once.

    Args:
        writer: where messages are written and read as if they travelled; None where they are handed over as they are.
    """

    def __init__(self, writer: Writer | None = None) -> None:
        self.writer = writer
        self.queue: deque[Message | Packed] = deque()

    def send(self, message: Message | Packed) -> None:
        self.queue.append(self.written(message))

    def recv(self, micro_batch: int, what: str) -> Message:
        """The message of ``micro_batch``; ``what`` says in an error who waited for what."""
        if not self.queue:
            raise LinkError(f"{what}: nothing was sent")
        return check(self.queue.popleft(), micro_batch, what).opened()

    def written(self, message: Message | Packed) -> Message | Packed:
        """What is kept of ``message``: what came from another rank is written already."""
        return message if self.writer is None or isinstance(message, Packed) else self.writer(message)


def check(message: M, micro_batch: int, what: str) -> M:
    """``message``, if it is the one that is due."""
    if message.micro_batch != micro_batch:
        raise LinkError(f"{what}: micro-batch {message.micro_batch} came instead of {micro_batch}")
    return message
