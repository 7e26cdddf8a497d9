"""A link between two ranks that keep no step with each other: what comes is taken in at once, whatever this rank is doing.

A thread takes in message after message, so that the sender's buffers are let go and it never has to wait; what is too much
falls out of the ring. Beside messages three things are said on such a link: that the data ended (as on every link), a *mark*
behind all that was sent before it, and that the sender has left and will say no more.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch

from ds_decoupled.errors import LinkError
from ds_decoupled.links.message import Message
from ds_decoupled.links.remote import RemoteReceiver, RemoteSender
from ds_decoupled.links.ring import ReplayRing
from ds_decoupled.links.table import Codecs
from ds_decoupled.schedules.replay import Replay

#: In place of a micro-batch's number, where other links have the end of the data.
_MARK, _LEFT = -2, -3

#: A neighbour may be silent for as long as it likes.
_FOREVER = 365 * 86_400.0


class SharedRing(ReplayRing):
    """A replay ring that one thread fills and another uses.

    Args:
        changed: is told of whatever happens to the ring.
    """

    def __init__(self, replay: Replay, memory: torch.device, device: torch.device, changed: threading.Condition) -> None:
        super().__init__(replay, memory, device)
        self.changed = changed

    def send(self, message: Message) -> None:
        with self.changed:
            super().send(message)
            self.changed.notify_all()

    def recv(self, micro_batch: int, what: str) -> Message:
        with self.changed:
            return super().recv(micro_batch, what)

    def report(self, k: int) -> dict[str, Any]:
        with self.changed:
            return super().report(k)

    def state_dict(self) -> dict[str, Any]:
        with self.changed:
            return super().state_dict()

    def load_state_dict(self, state: Any) -> None:
        with self.changed:
            super().load_state_dict(state)


class FreeSender(RemoteSender):
    """Sends without ever waiting.

    Args:
        room: messages that may be under way; beyond them :meth:`offer` drops.

    Attributes:
        dropped: messages that were not sent, because so many were under way.
    """

    def __init__(self, peer: int, group: Any, device: torch.device, codecs: Codecs, timeout: float, room: int,
                 seed: Callable[[], tuple[int, ...]] = tuple) -> None:
        super().__init__(peer, group, device, codecs, timeout, None, seed)
        self.room = room
        self.dropped = 0

    def offer(self, message: Message) -> None:
        """Send ``message``, if there is room."""
        if len(self.under_way) >= self.room:
            self.dropped += 1
        else:
            self.send(message)

    def send_mark(self) -> None:
        """Say that all that was sent before is before this."""
        self._send(Message(_MARK, ()))

    def send_left(self) -> None:
        """Say that nothing more will be said."""
        self._send(Message(_LEFT, ()))


class FreeReceiver(RemoteReceiver):
    """Takes in what comes, by a thread of its own.

    Args:
        deliver: is given every message, in the thread.
        changed: guards what is known of the sender, and is told of every change.

    Attributes:
        data_end: the first micro-batch that will not come, once the sender has said so; until :meth:`restart`.
        data_failed: why, if the data failed.
        marks: that have come.
        left: whether the sender has left.
        failure: what the thread ended with, if it did: an error of the sender, or of the link.
    """

    def __init__(self, peer: int, group: Any, device: torch.device, codecs: Codecs, deliver: Callable[[Message], None],
                 changed: threading.Condition) -> None:
        super().__init__(peer, group, device, codecs, _FOREVER)
        self.deliver, self.changed = deliver, changed
        self.data_end: int | None = None
        self.data_failed: str | None = None
        self.marks = 0
        self.left = False
        self.failure: LinkError | None = None
        # A daemon: a process that leaves does not wait for what its neighbours may still have to say.
        self._thread = threading.Thread(target=self._take_all, name=f"messages of rank {peer}", daemon=True)

    def begin(self) -> None:
        """From now on messages are taken in."""
        self._thread.start()

    def restart(self) -> None:
        """New data follow: no end is known."""
        with self.changed:
            self.data_end = self.data_failed = None

    def _take_all(self) -> None:
        try:
            while not self.left:
                # Whatever number it has: a receive is posted always, and the last one is answered when the sender leaves.
                self.expect([0])
                self._take_in(f"a message of rank {self.peer}")
                while self.arrived:
                    self.deliver(self.arrived.popleft())
                if self.end is not None:
                    self._said(self.end, self.end_reason)
                    self.start()
        except LinkError as error:
            with self.changed:
                self.failure = error
                self.changed.notify_all()

    def _said(self, end: int, reason: str | None) -> None:
        with self.changed:
            if end == _MARK:
                self.marks += 1
            elif end == _LEFT:
                self.left = True
            else:
                self.data_end, self.data_failed = end, reason
            self.changed.notify_all()
