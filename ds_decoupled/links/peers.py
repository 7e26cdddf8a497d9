"""Other ranks that keep no step with this one, all of them: what is known of them, and how this one takes its leave.

With each there is a link each way (:mod:`ds_decoupled.links.free`): a neighbour's of a pipe that runs free, a replica's whose
threads do.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from ds_decoupled.errors import LinkError
from ds_decoupled.links.free import FreeReceiver, FreeSender

#: Seconds in which a peer whose connection broke has said farewell, if it did.
_FAREWELL = 2.0

#: Seconds between two looks at a collective call: from a short one to a long one, so that what is quick costs no time.
_LOOKS = 5e-5, 2e-3

Check = Callable[[], None]


class Peers:
    """The links with all peers.

    Args:
        changed: the condition that the receivers tell of whatever comes.
        links: a receiver and a sender for each.
    """

    def __init__(self, changed: threading.Condition, links: Sequence[tuple[FreeReceiver, FreeSender]]) -> None:
        self.changed, self.links = changed, list(links)

    def begin(self) -> None:
        """From now on what comes is taken in."""
        for receiver, sender in self.links:
            receiver.begin(sender.close)

    @property
    def failure(self) -> LinkError | None:
        """What a peer failed with, if one did."""
        with self.changed:
            return next((receiver.failure for receiver, _ in self.links if receiver.failure is not None), None)

    def check(self) -> None:
        """Raises it."""
        failure = self.failure
        if failure is not None:
            raise failure

    @property
    def gone(self) -> list[int]:
        """Ranks that have said farewell."""
        with self.changed:
            return [receiver.peer for receiver, _ in self.links if receiver.left]

    def saying(self, receiver: FreeReceiver, say: Callable[[], None]) -> None:
        """Say something to the peer that ``receiver`` listens to; that it has left is no error."""
        try:
            say()
        except LinkError:
            with self.changed:
                if not self.changed.wait_for(lambda: receiver.left, _FAREWELL):
                    raise

    def leave(self, timeout: float) -> None:
        """Say farewell to all, and wait until they have answered."""
        end = time.monotonic() + timeout
        for _, sender in self.links:
            with contextlib.suppress(LinkError):
                sender.close()
        for receiver, _ in self.links:
            receiver.wait_for_farewell(max(0.0, end - time.monotonic()))


def completion(work: Any, check: Check, lost: str) -> Callable[[], bool]:
    """A question: whether a collective call is complete.

    Args:
        work: what the call gave with ``async_op``.
        check: raises why it never will be, if that is known.
        lost: says in an error who was waiting, where a rank is gone.
    """
    def complete() -> bool:
        check()
        if not work.is_completed():
            return False
        try:
            work.wait()
        except RuntimeError as error:
            check()
            raise LinkError(lost) from error
        return True

    return complete


def wait_for(work: Any, check: Check, lost: str) -> None:
    """Wait until a collective call is complete, unless ``check`` raises meanwhile; see :func:`completion`.

    The calling thread never waits in the backend: one that Python ends there would take the process down with it.
    """
    complete, (pause, most) = completion(work, check, lost), _LOOKS
    while not complete():
        time.sleep(pause)
        pause = min(1.3 * pause, most)
