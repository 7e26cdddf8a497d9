"""Buffers that were handed to the backend, held until the other side has taken them and not a moment longer."""

from __future__ import annotations

import threading
from collections import deque
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch import Tensor

from ds_decoupled.errors import LinkError

#: A message may be under way as long as the other side likes: an evaluation, a checkpoint, a slow neighbour.
_FOREVER = timedelta(days=365)
#: Seconds without a message after which the thread ends; the next message starts another.
_IDLE = 5.0


class UnderWay:
    """The sends of one link that are not complete, oldest first.

    NCCL's work objects can be asked whether they are complete. Gloo's cannot: ``is_completed()`` of a send stays false until
    ``wait()`` was called (``ProcessGroupGloo::SendWork`` in torch/csrc/distributed/c10d/ProcessGroupGloo.cpp), and a wait that
    runs into a time-out breaks the connection. So with gloo a thread waits for each in turn and lets its buffer go.

    Args:
        group: the process group that sends.
        whom: names the receiver in errors.

    Attributes:
        peak: the most buffers that were under way at once.
    """

    def __init__(self, group: Any, whom: str) -> None:
        self.whom = whom
        self.peak = 0
        self._works: deque[tuple[Any, Tensor]] = deque()
        self._failure: str | None = None
        self._changed = threading.Condition()
        self._must_wait = dist.get_backend(group) == "gloo"
        self._thread: threading.Thread | None = None

    def __len__(self) -> int:
        """Buffers that are held now."""
        with self._changed:
            self._drop_complete()
            return len(self._works)

    @property
    def nbytes(self) -> int:
        """Their bytes."""
        with self._changed:
            self._drop_complete()
            return sum(buffer.numel() for _, buffer in self._works)

    def add(self, work: Any, buffer: Tensor) -> None:
        """``buffer`` was handed over and must stay as it is until ``work`` is complete."""
        with self._changed:
            self._drop_complete()
            self._works.append((work, buffer))
            self.peak = max(self.peak, len(self._works))
            if self._must_wait and self._thread is None:
                # A daemon: a process that leaves does not wait for it, see ds_decoupled/leaving.py for what is waited for.
                self._thread = threading.Thread(target=self._let_go, name=f"sends to {self.whom}", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def wait_below(self, count: int, timeout: float) -> None:
        """Wait until fewer than ``count`` buffers are under way.

        Raises:
            LinkError: if that takes more than ``timeout`` seconds, or the other side is gone.
        """
        with self._changed:
            self._drop_complete()
            while not self._must_wait and len(self._works) >= count:
                self._wait_for_oldest(timeout)
            in_time = self._changed.wait_for(lambda: self._failure is not None or len(self._works) < count, timeout)
        if self._failure is not None:
            raise LinkError(f"{self.whom} did not take a message, or is gone ({self._failure})")
        if not in_time:
            raise LinkError(f"{self.whom} did not take a message within {timeout:g} s")

    # -- backends that can be asked ----------------------------------------------------------------------------------------

    def _drop_complete(self) -> None:
        while not self._must_wait and self._works and self._works[0][0].is_completed():
            self._works.popleft()

    def _wait_for_oldest(self, timeout: float) -> None:
        work, _ = self._works.popleft()
        try:
            work.wait(timedelta(seconds=timeout))
        except RuntimeError as error:
            self._failure = first_line(error)

    # -- gloo --------------------------------------------------------------------------------------------------------------

    def _let_go(self) -> None:
        """The thread: wait for the oldest, forget it, and so on. It holds no lock and no GIL while it waits."""
        while True:
            with self._changed:
                if not self._changed.wait_for(lambda: bool(self._works), _IDLE):
                    self._thread = None
                    return
                work = self._works[0][0]
            try:
                work.wait(_FOREVER)
            except RuntimeError as error:
                with self._changed:
                    self._failure = first_line(error)
                    self._works.clear()
                    self._changed.notify_all()
                return
            del work  # it holds the buffer too
            with self._changed:
                self._works.popleft()
                self._changed.notify_all()


def first_line(error: BaseException) -> str:
    """What ``error`` says, short enough to stand in another message."""
    return (str(error).splitlines() or [type(error).__name__])[0][:200]

