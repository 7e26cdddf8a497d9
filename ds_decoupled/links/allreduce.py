"""Gradients of data-parallel replicas whose threads run free, averaged by one thread of each: what comes is one order.

Backward threads finish layers in another order on every replica, and collective calls from them would mix up whose layers they
add together.
"""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from ds_decoupled.errors import LinkError
from ds_decoupled.links.exchange import Exchange, fill, flat


class AllReduce(Exchange):
    """Gradients are averaged before a stage steps, by one thread.

    All replicas go through the same order: of each stage's n-th gradients, from the topmost stage down, n = 0, 1, 2, ...
    Whoever went back with a micro-batch goes on to the next one when all of its gradients have been used.

    Args:
        use: called as ``use(stage, micro_batch, gradient)`` by the thread, one at a time: adds a stage's gradient to what it
            has, and steps if it is the k-th. None and None are for a micro-batch that others have and this one does not.
        failed: is told what ended the thread.

    Attributes:
        averaged: gradients of a stage so far.
        failure: what ended the thread, if something did.
    """

    drifts = False

    def __init__(self, *args: Any, use: Callable[[int, int | None, Any], None],
                 failed: Callable[[BaseException], None]) -> None:
        super().__init__(*args)
        self._use, self._failed = use, failed
        self._order = sorted(self.stages, reverse=True)
        self._changed = threading.Condition()
        self._waiting: dict[int, deque[tuple[int | None, Any]]] = {stage: deque() for stage in self._order}
        self._unused: Counter[int | None] = Counter()  # gradients of a micro-batch that wait
        self._filled = 0  # micro-batches that others had and this one did not
        self._stopped = False
        self._thread: threading.Thread | None = None
        self.averaged = 0
        self.failure: BaseException | None = None

    def start(self) -> None:
        # Ctrl-C may have come between a thread and its start.
        if self._thread is None or self._thread.ident is None:
            self._stopped = False
            self._thread = threading.Thread(target=self._run, name="gradients", daemon=True)
            self._thread.start()

    def give(self, stage: int, micro_batch: int | None, gradient: Any) -> None:
        """A stage's gradient exists."""
        with self._changed:
            self._waiting[stage].append((micro_batch, gradient))
            self._unused[micro_batch] += 1
            self._changed.notify_all()

    def wait(self, micro_batch: int | None) -> None:
        """Wait until all gradients of ``micro_batch`` that were given have been used, unless the thread is stopped. Raises what
        it failed with."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or not self._unused[micro_batch])
            del self._unused[micro_batch]
            if self.failure is not None:
                raise self.failure

    def before_finish(self, fed: int) -> None:
        """Ctrl-C may have come before a micro-batch on one replica, and behind it on another."""
        # What others alone had in an earlier call counts as this one's too: else it would be filled up again.
        missing = self.network.most(fed + self._filled) - fed - self._filled
        self._filled += missing
        if missing:
            self.start()
        for _ in range(missing):
            for stage in self._order:
                self.give(stage, None, None)

    def quiet(self) -> None:
        self.wait(None)
        self.network.meet()

    def stop(self) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
            thread, self._thread = self._thread, None
        if thread is not None and thread.ident is not None and thread is not threading.current_thread():
            thread.join()

    def forget(self) -> None:
        """What has been given and not used is given up; the thread has been stopped."""
        for waiting in self._waiting.values():
            waiting.clear()
        self._unused.clear()
        self._filled = 0
        self.failure = None

    def average(self, parameters: Sequence[nn.Parameter]) -> None:
        """Replace ``.grad`` of a stage's parameters by the mean over replicas; one that none of them used keeps None. Called by
        the thread, within ``use``."""
        trained = [p for p in parameters if p.requires_grad]
        grads = [torch.zeros_like(p.data) if p.grad is None else p.grad for p in trained]
        used = torch.tensor([0.0 if p.grad is None else 1.0 for p in trained])
        if not trained:
            return
        total = self.network.add_up_gradients(torch.cat([flat(grads), used]), self._check)
        for p, grad, count in zip(trained, grads, total[-len(trained):].tolist()):
            p.grad = grad if count else None
        fill(grads, total[:-len(trained)] / self.network.count)
        self.averaged += 1

    def _check(self) -> None:
        if self._stopped:
            raise _Stopped

    def _run(self) -> None:
        try:
            while True:
                for stage in self._order:
                    with self._changed:
                        self._changed.wait_for(lambda stage=stage: self._waiting[stage] or self._stopped)  # type: ignore[misc]
                        if self._stopped:
                            return
                        micro_batch, gradient = self._waiting[stage].popleft()
                    self._use(stage, micro_batch, gradient)
                    with self._changed:
                        self._unused[micro_batch] -= 1
                        self._changed.notify_all()
        except _Stopped:
            return
        except BaseException as error:
            with self._changed:
                self.failure = error
                self._stopped = True
                self._changed.notify_all()
            self._failed(error)

    def report(self) -> dict[str, int]:
        return {"averaged": self.averaged}


class _Stopped(LinkError):
    """The thread is to end."""
