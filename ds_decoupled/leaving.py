"""A process that ends takes what it sent with it, unless somebody waits until the others have taken it.

A script may end without :meth:`~ds_decoupled.DecoupledPipelineEngine.drain` while another rank is still at work on what came
before; without this the other rank would find its neighbour gone. Connections outlive ``destroy_process_group`` as long as
their process groups are held, so that it matters only that the process goes on for a while.
"""

from __future__ import annotations

import atexit
import contextlib
import sys
import weakref
from typing import Protocol

from ds_decoupled.errors import LinkError

#: Seconds that a process which failed waits for others to hear why.
AFTER_FAILURE = 5.0


class Sends(Protocol):
    """Something that has messages under way."""

    timeout: float
    failed: bool

    def leave(self, timeout: float | None = None) -> None: ...


_open: weakref.WeakSet[Sends] = weakref.WeakSet()


def wait_at_exit(sends: Sends) -> None:
    """Before this process ends, what ``sends`` has under way is to be taken."""
    _open.add(sends)


@atexit.register
def _leave() -> None:
    crashed = getattr(sys, "last_value", None) is not None  # the interpreter sets it when it prints an uncaught exception
    for sends in list(_open):
        with contextlib.suppress(LinkError):
            sends.leave(timeout=min(sends.timeout, AFTER_FAILURE) if sends.failed or crashed else None)
