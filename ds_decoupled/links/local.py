"""A link between two stages of one rank: a queue."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from ds_decoupled.errors import LinkError
from ds_decoupled.links.message import Message
from ds_decoupled.links.packed import Packed, pack
from ds_decoupled.links.places import Codecs


class LocalLink:
    """First in, first out; a micro-batch other than the one that is due is an error at once."""

    def __init__(self) -> None:
        self.queue: deque[Message | Packed] = deque()

    def send(self, message: Message) -> None:
        self.queue.append(message)

    def recv(self, micro_batch: int, what: str) -> Message:
        """The message of ``micro_batch``; ``what`` says in an error who waited for what."""
        if not self.queue:
            raise LinkError(f"{what}: nothing was sent")
        return check(self.queue.popleft(), micro_batch, what).opened()


class CodedLink(LocalLink):
    """A queue whose messages are written and read as if they travelled.

    Args:
        codecs: how their values are written.
        seed: of what codecs draw by chance, asked at every message.
    """

    def __init__(self, codecs: Codecs, seed: Callable[[], tuple[int, ...]]) -> None:
        super().__init__()
        self.codecs, self.seed = codecs, seed

    def send(self, message: Message) -> None:
        self.queue.append(pack(message, self.codecs, self.seed()))


def check(message: Message | Packed, micro_batch: int, what: str) -> Message | Packed:
    """``message``, if it is the one that is due."""
    if message.micro_batch != micro_batch:
        raise LinkError(f"{what}: micro-batch {message.micro_batch} came instead of {micro_batch}")
    return message
