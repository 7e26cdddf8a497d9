"""What data-parallel replicas exchange whose threads run free.

::

    gossip     a stage has stepped:   x_i --> a peer j: x_j += d,  d = (x_i - x_j) / 2;   d --> i: x_i -= d
    average    every n micro-batches: the same for all stages, with all peers and d = (x_i - x_j) / P
    allreduce  a stage's k-th gradient exists: all replicas' are averaged, in one order, by one thread of each

Gossip is LayUp's (arXiv 2410.05985, v4), averaging every n batches LAPSGD's. Nobody waits in either: what comes is answered by
a thread, and a difference is taken from the weights as they are when it comes. What one replica adds the other takes away, so
that the sum of the weights over replicas is changed by updates alone, to rounding. A stage has one message to a peer under way,
and skips its turn while that is not answered. Where two requests cross, the lower replica answers that it changes nothing: else
both would go all the way to where the other was. Only with ``allreduce`` does a slow replica stop the others
(:mod:`ds_decoupled.links.allreduce`).
"""

from __future__ import annotations

import random
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ds_decoupled.links.message import Message


class Replicas(Protocol):
    """What an exchange needs of :class:`ds_decoupled.replica_network.ReplicaNetwork`."""

    changed: threading.Condition
    replica: int
    count: int

    @property
    def there(self) -> list[int]: ...

    def open_to(self, replica: int) -> AbstractContextManager[bool]: ...

    def tell(self, replica: int, message: Message) -> None: ...

    def check(self) -> None: ...

    def meet(self) -> None: ...

    def most(self, number: int) -> int: ...

    def add_up(self, values: Tensor) -> Tensor: ...

    def add_up_gradients(self, values: Tensor, check: Callable[[], None]) -> Tensor: ...


class Exchange(ABC):
    """How replicas hear of one another.

    Args:
        network: the links.
        stages: the trainable parameters of each.
        turn: a context for each stage: within, nobody else changes its weights.

    Attributes:
        drifts: whether replicas have weights of their own.
    """

    drifts = True

    def __init__(self, network: Replicas, stages: Mapping[int, Sequence[nn.Parameter]],
                 turn: Callable[[int], AbstractContextManager[Any]]) -> None:
        self.network, self.stages, self.turn = network, stages, turn

    def updated(self, stage: int) -> None:  # noqa: B027
        """A stage has stepped. Called by the thread that did it, outside of its turn."""

    def done(self) -> None:  # noqa: B027
        """A micro-batch is through. Called by the thread that went back with it."""

    def deliver(self, replica: int, message: Message) -> None:  # noqa: B027
        """A message has come. Called by the thread that listens to ``replica``."""

    def before_finish(self, fed: int) -> None:  # noqa: B027
        """All that was fed is about to be finished; ``fed``: micro-batches so far. A collective call."""

    @abstractmethod
    def quiet(self) -> None:
        """No thread is at a pass here: wait until nothing is under way, on all replicas. A collective call."""

    def start(self) -> None:  # noqa: B027
        """A micro-batch is about to be fed."""

    def stop(self) -> None:  # noqa: B027
        """Nobody waits in here any longer, until the next :meth:`start`."""

    def forget(self) -> None:  # noqa: B027
        """What is in flight is given up; all has been stopped."""

    @abstractmethod
    def report(self) -> dict[str, int]:
        """Counts of this replica."""


class Pairwise(Exchange):
    """Gossip and averaging: pairs of replicas, with a reply.

    Args:
        every: updates of a stage, or micro-batches, from one exchange to the next.
        whole: whether all stages are exchanged at once with all peers, or each by itself with a peer drawn by chance.

    Attributes:
        asked, answered: exchanges that this replica began, and those that others did; ``skipped``: those that it did not begin,
            because the one before was still under way or no other replica was there; ``crossed``: those that changed nothing.
    """

    def __init__(self, *args: Any, every: int, whole: bool) -> None:
        super().__init__(*args)
        self.every, self.whole = every, whole
        self.asked = self.answered = self.skipped = self.crossed = 0
        self._share = 1 / self.network.count if whole else 1 / 2
        self._draw = random.Random(self.network.replica)
        self._lock = threading.Lock()  # of the counters
        self._since = dict.fromkeys(self.stages, 0)
        self._through = 0
        self._under_way: set[tuple[int, int]] = set()  # stage and replica

    def updated(self, stage: int) -> None:
        if self.whole:
            return
        with self._lock:
            self._since[stage] += 1
            if self._since[stage] % self.every:
                return
            there = self.network.there
            chosen = self._draw.choice(there) if there else None
            self.skipped += chosen is None
        if chosen is not None:
            self._ask(stage, chosen)

    def done(self) -> None:
        if not self.whole:
            return
        with self._lock:
            self._through += 1
            if self._through % self.every:
                return
        there = self.network.there
        for stage in self.stages:
            for replica in there:
                self._ask(stage, replica)
        if not there:
            with self._lock:
                self.skipped += len(self.stages)

    def _ask(self, stage: int, replica: int) -> None:
        if not self.stages[stage]:
            return
        with self.network.changed:
            free = (stage, replica) not in self._under_way
            if free:
                self._under_way.add((stage, replica))
        with self._lock:
            self.asked += free
            self.skipped += not free
        if free:
            # The links before the weights, here and in the answer; the message is written before the turn ends.
            with self.network.open_to(replica), self.turn(stage):
                self.network.tell(replica, Message(2 * stage, (tuple(p.data for p in self.stages[stage]),)))

    def deliver(self, replica: int, message: Message) -> None:
        stage, reply = divmod(message.micro_batch, 2)
        (parts,) = message.parts
        if reply:
            if isinstance(parts, tuple):
                with self.turn(stage):
                    _add(self.stages[stage], parts, -1)
            with self.network.changed:
                self._under_way.discard((stage, replica))
                self.network.changed.notify_all()
            return
        with self.network.open_to(replica) as heard:
            if not heard:
                return  # the answer would not come, and the other takes back nothing
            with self.network.changed:
                crossed = (stage, replica) in self._under_way and self.network.replica < replica
            difference: Any = torch.zeros(1)
            if not crossed:
                with self.turn(stage), torch.no_grad():
                    difference = tuple((theirs - p.data) * self._share for theirs, p in zip(parts, self.stages[stage]))
                    _add(self.stages[stage], difference, 1)
            self.network.tell(replica, Message(2 * stage + 1, (difference,)))
        with self._lock:
            self.answered += not crossed
            self.crossed += crossed

    def quiet(self) -> None:
        network = self.network

        def settled() -> bool:
            network.check()
            there = network.there
            return not any(replica in there for _, replica in self._under_way)

        with network.changed:
            network.changed.wait_for(settled)
            self._under_way.clear()
        network.meet()

    def mean(self, tensors: Sequence[Tensor]) -> None:
        """Replace floating-point ``tensors`` by their means over all replicas. A collective call of main threads."""
        if tensors:
            total = self.network.add_up(flat(tensors)) / self.network.count
            fill(tensors, total)

    def report(self) -> dict[str, int]:
        with self._lock:
            return {"asked": self.asked, "answered": self.answered, "skipped": self.skipped, "crossed": self.crossed}


def flat(tensors: Sequence[Tensor]) -> Tensor:
    """In the host's memory, in one type."""
    return torch.cat([tensor.detach().reshape(-1).cpu() for tensor in tensors])


def fill(tensors: Sequence[Tensor], values: Tensor) -> None:
    """The inverse of :func:`flat`."""
    for tensor, part in zip(tensors, values.split([tensor.numel() for tensor in tensors])):
        tensor.data.copy_(part.view_as(tensor))


def _add(parameters: Sequence[nn.Parameter], parts: Sequence[Tensor], sign: int) -> None:
    for p, part in zip(parameters, parts):
        p.data.add_(part, alpha=sign)
