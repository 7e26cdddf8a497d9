"""Forward threads and backward threads, what lies between them, and who waits for what. No torch: what a pass is, others know.

::

    put --[inbox: one a forward thread]--> forward threads --[queue]--> backward threads

Without backward threads each forward thread goes back itself (Hogwild's workers, arXiv 1106.5730).
"""

from __future__ import annotations

import atexit
import threading
import time
import weakref
from collections import Counter, deque
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from ds_decoupled.errors import LinkError


class Crew:
    """Threads that are started with the first micro-batch, and end with :meth:`rest`.

    Args:
        go_forward: a forward pass of what was :meth:`put`; gives what its backward pass needs.
        go_back: that.
        within: a context for each thread.
        timeout: seconds in which one of them must get on.
        let_go: called before the threads are waited for; those that wait for others elsewhere are to go on.

    Attributes:
        threads: forward and backward; 0 backward threads: those that go forward go back too.
        queue: forward passes that may wait beside those for which a backward thread is free.
        fed, done: micro-batches so far.
        depths: how often so many lay in the queue already when another was finished.
    """

    def __init__(self, threads: tuple[int, int], queue: int, go_forward: Callable[[Any], Any], go_back: Callable[[Any], None],
                 within: Callable[[], AbstractContextManager[Any]], timeout: float,
                 let_go: Callable[[], None] = lambda: None) -> None:
        self.threads, self.queue, self.timeout = threads, queue, timeout
        self._passes = (go_forward, go_back)
        self._within, self._let_go = within, let_go
        self._changed = threading.Condition()
        self._inbox: deque[Any] = deque()
        self._between: deque[Any] = deque()
        self._idle = 0  # backward threads that wait
        self._moves = 0
        self._stop = False
        self._failure: BaseException | None = None
        self._running: list[threading.Thread] = []
        self.fed = self.done = 0
        self.depths: Counter[int] = Counter()
        self._busy = [[0.0] * count for count in threads]
        self._since: float | None = None  # something is in flight
        self._active = 0.0
        _crews.add(self)

    # -- from outside -------------------------------------------------------------------------------------------------------

    def put(self, item: Any) -> None:
        """Another micro-batch, as soon as the forward threads have room for it.

        Raises:
            BaseException: what a thread failed with.
            LinkError: if none of them gets on within the time.
        """
        with self._changed:
            self._start()
            self._wait(lambda: len(self._inbox) < self.threads[0])
            if self._failure is None:
                self._inbox.append(item)
                self.fed += 1
                self._since = self._since or time.perf_counter()
                self._changed.notify_all()
        self._check()

    def finish(self) -> None:
        """Wait until nothing is in flight. Raises as :meth:`put`."""
        with self._changed:
            self._wait(lambda: self.done == self.fed)
        self._check()

    def rest(self) -> None:
        """:meth:`finish`, and let the threads end."""
        self.finish()
        self.end()

    def end(self) -> None:
        """The threads end behind the pass that they are at; what is in flight stays there."""
        with self._changed:
            self._stop = True
            self._changed.notify_all()
        self._let_go()
        for thread in self._running:
            thread.join(self.timeout)
        self._running = []

    def fail(self, error: BaseException) -> None:
        """One of them, or another that works for them, has failed."""
        with self._changed:
            self._failure = self._failure or error
            self._stop = True
            self._changed.notify_all()

    @property
    def failure(self) -> BaseException | None:
        """What the first that failed did so with."""
        return self._failure

    def _start(self) -> None:
        if self._failure is not None or self._running:
            return
        self._stop = False
        for way, count in enumerate(self.threads):
            for index in range(count):
                thread = threading.Thread(target=self._run, args=(way, index), daemon=True,
                                          name=f"{('forward', 'backward')[way]} {index}")
                self._running.append(thread)
                thread.start()

    def _wait(self, ready: Callable[[], bool]) -> None:
        while self._failure is None and not ready():
            moves = self._moves
            if not self._changed.wait(self.timeout) and moves == self._moves:
                raise LinkError(f"no thread has finished a pass within {self.timeout:g} s; of the micro-batches in flight, "
                                f"{self.fed - self.done}, {len(self._inbox)} have not begun and {len(self._between)} wait to "
                                "go back")

    def _check(self) -> None:
        """Where one has failed, the others end, and the caller learns why."""
        if self._failure is not None:
            self.end()
            raise self._failure

    # -- the threads ----------------------------------------------------------------------------------------------------------

    def _run(self, way: int, index: int) -> None:
        try:
            with self._within():
                (self._forward, self._backward)[way](self._busy[way], index)
        except BaseException as error:
            self.fail(error)

    def _forward(self, busy: list[float], index: int) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._inbox or self._stop)
                if self._stop:
                    return
                item = self._inbox.popleft()
                self._changed.notify_all()
            begun = time.perf_counter()
            graph = self._passes[0](item)
            if not self.threads[1]:
                self._passes[1](graph)
            busy[index] += time.perf_counter() - begun
            with self._changed:
                self._moves += 1
                if not self.threads[1]:
                    self._one_done()
                    continue
                self.depths[len(self._between)] += 1
                self._changed.wait_for(lambda: len(self._between) < self.queue + self._idle or self._stop)
                if self._stop:
                    return
                self._between.append(graph)
                self._changed.notify_all()

    def _backward(self, busy: list[float], index: int) -> None:
        while True:
            with self._changed:
                self._idle += 1
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._between or self._stop)
                self._idle -= 1
                if self._stop:
                    return
                graph = self._between.popleft()
                self._changed.notify_all()
            begun = time.perf_counter()
            self._passes[1](graph)
            busy[index] += time.perf_counter() - begun
            with self._changed:
                self._moves += 1
                self._one_done()

    def _one_done(self) -> None:
        self.done += 1
        if self.done == self.fed and self._since is not None:
            self._active += time.perf_counter() - self._since
            self._since = None
        self._changed.notify_all()

    def report(self) -> dict[str, Any]:
        """``forward_busy`` and ``backward_busy``: the share of each thread's time, while anything was in flight, that it was at
        a pass; ``queue_depths``: how often so many waited already."""
        with self._changed:
            active = self._active + (0.0 if self._since is None else time.perf_counter() - self._since)
            shares = [[seconds / active if active else None for seconds in way] for way in self._busy]
            return {"forward_busy": shares[0], "backward_busy": shares[1], "queue_depths": dict(sorted(self.depths.items()))}


_crews: weakref.WeakSet[Crew] = weakref.WeakSet()


@atexit.register
def _end() -> None:
    """A process that ends in the middle of a pass would take torch away from under its threads."""
    for crew in list(_crews):
        crew.end()
