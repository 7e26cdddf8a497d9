"""A link between two ranks that keep no step with each other: what comes is taken in at once, whatever this rank is doing.

A thread takes in message after message, so that the sender's buffers are let go and it never has to wait; what is too much
falls out of the ring. Beside messages four things are said on such a link: that the data ended (as on every link), a *mark*
behind all that was sent before it, a *farewell* behind which nothing comes, and the number of a *call*: upwards, how many the
sender has ended; downwards, which one it would like to hear of.

Between two ranks there is a link each way. Each side says farewell once, when it leaves or in answer to the other's, and takes
in until it hears the other's: so no receive is left unanswered, and no message untaken. A thread that Python ends while it
waits in the backend would take the process down with it
(https://docs.python.org/3.11/c-api/init.html#c.PyEval_RestoreThread).
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ds_decoupled.errors import LinkError, PeerError
from ds_decoupled.links.message import Message
from ds_decoupled.links.packed import Packed
from ds_decoupled.links.places import Codecs
from ds_decoupled.links.remote import RemoteReceiver, RemoteSender
from ds_decoupled.links.ring import ReplayRing
from ds_decoupled.schedules.replay import Replay

#: In place of a micro-batch's number, where other links have the end of the data.
_MARK, _FAREWELL = -2, -3
#: And the number of a call, n as this less n.
_CALL = -4

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

    def send(self, message: Message | Packed) -> None:
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
    """Sends without ever waiting, from any thread.

    Args:
        room: messages that may be under way; beyond them :meth:`offer` drops.

    Attributes:
        dropped: messages that were not sent, because so many were under way or farewell was said.
        closed: whether it was.
    """

    def __init__(self, peer: int, group: Any, device: torch.device, codecs: Codecs, timeout: float, room: int,
                 seed: Callable[[], tuple[int, ...]] = tuple) -> None:
        super().__init__(peer, group, device, codecs, timeout, None, seed)
        self.room = room
        self.dropped = 0
        self.closed = False
        self._one_at_a_time = threading.RLock()
        self._place = dist.get_group_rank(group, peer)

    def offer(self, message: Message) -> None:
        """Send ``message``, if there is room."""
        with self._one_at_a_time:
            if self.closed or len(self.under_way) >= self.room:
                self.dropped += 1
            else:
                self.send(message)

    def send_mark(self) -> None:
        """Say that all that was sent before is before this."""
        self._send(Message(_MARK, ()))

    def send_call(self, call: int) -> None:
        """Tell the number of a call."""
        self._send(Message(_CALL - call, ()))

    @contextmanager
    def staying(self) -> Iterator[bool]:
        """Within, farewell is not said; gives whether it was not yet."""
        with self._one_at_a_time:
            yield not self.closed

    def close(self) -> None:
        """Say farewell; whatever is sent behind it is dropped."""
        with self._one_at_a_time:
            self._send(Message(_FAREWELL, ()))
            self.closed = True

    def _send(self, message: Message) -> None:
        with self._one_at_a_time:
            if not self.closed:
                super()._send(message)

    def _start(self, buffer: Tensor) -> Any:
        # dist.isend looks the group up by name, which is gone where a script has called destroy_process_group().
        return self.group.send([buffer], self._place, 0)


class FreeReceiver(RemoteReceiver):
    """Takes in what comes, by a thread of its own.

    Args:
        deliver: is given every message, in the thread.
        changed: guards what is known of the sender, and is told of every change.
        packed: whether messages are delivered in their wire form.
        heard: is given the number of a call that was told, in the thread.

    Attributes:
        data_end: the first micro-batch that will not come, once the sender has said so; until :meth:`restart`.
        data_failed: why, if the data failed.
        marks: that have come.
        left: whether the sender has said farewell.
        failure: of the sender, as it told, or of the link.
    """

    def __init__(self, peer: int, group: Any, device: torch.device, codecs: Codecs, deliver: Callable[[Message | Packed], None],
                 changed: threading.Condition, packed: bool = False, heard: Callable[[int], None] = lambda call: None) -> None:
        super().__init__(peer, group, device, codecs, _FOREVER, packed)
        self.deliver, self.changed, self.heard = deliver, changed, heard
        self._place = dist.get_group_rank(group, peer)
        self._answer: Callable[[], None] = lambda: None
        self.data_end: int | None = None
        self.data_failed: str | None = None
        self.marks = 0
        self.left = False
        self.failure: LinkError | None = None
        # A daemon: a process that leaves does not wait for what its neighbours may still have to say.
        self._thread = threading.Thread(target=self._take_all, name=f"messages of rank {peer}", daemon=True)

    def begin(self, answer: Callable[[], None]) -> None:
        """From now on messages are taken in, until a farewell, which ``answer`` answers."""
        self._answer = answer
        self._thread.start()

    def wait_for_farewell(self, timeout: float) -> None:
        """Wait until nothing more comes, for ``timeout`` seconds at most."""
        self._thread.join(timeout)

    def restart(self) -> None:
        """New data follow: no end is known."""
        with self.changed:
            self.data_end = self.data_failed = None

    def _take_all(self) -> None:
        while not self.left:
            try:
                # Whatever number it has.
                self.expect([0])
                self._take_in(f"this rank was listening to rank {self.peer}")
            except PeerError as error:
                self._failed(error)
                self._failure = None  # it has been told, and what follows is the farewell
                continue
            except LinkError as error:
                self._failed(error)
                return
            while self.arrived:
                self.deliver(self.arrived.popleft())
            if self.end is not None:
                self._said(self.end, self.end_reason)
                self.start()
        with contextlib.suppress(LinkError):
            self._answer()

    def _said(self, end: int, reason: str | None) -> None:
        with self.changed:
            if end == _MARK:
                self.marks += 1
            elif end == _FAREWELL:
                self.left = True
            elif end >= 0:
                self.data_end, self.data_failed = end, reason
            self.changed.notify_all()
        if end <= _CALL:
            self.heard(_CALL - end)

    def _failed(self, error: LinkError) -> None:
        with self.changed:
            self.failure = self.failure or error
            self.changed.notify_all()

    @property
    def _silent(self) -> str:
        return "that rank is gone"

    def _start(self, buffer: Tensor) -> Any:
        return self.group.recv([buffer], self._place, 0)
