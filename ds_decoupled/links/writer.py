"""What writes the messages of one link: its codecs, and what they draw from."""

from __future__ import annotations

from collections.abc import Callable

from ds_decoupled.links.message import Message
from ds_decoupled.links.packed import Packed, pack
from ds_decoupled.links.places import Codecs


class Writer:
    """Makes of a link's messages, one after the other, what would travel.

    Args:
        codecs: the sender's.
        seed: of what they draw by chance, asked at every message.
    """

    def __init__(self, codecs: Codecs, seed: Callable[[], tuple[int, ...]]) -> None:
        self.codecs, self.seed = codecs, seed

    def __call__(self, message: Message) -> Packed:
        return pack(message, self.codecs, self.seed())
