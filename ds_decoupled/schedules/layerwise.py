"""Forward threads, backward threads and a queue between them, on a virtual clock: the order of a layer-wise run is data.

PD-ASGD (arXiv 2410.05985). A forward thread takes one micro-batch after the other through all stages, on whatever the weights
are; what it has finished waits in a queue until a backward thread takes it; a backward thread goes down the stages, and each
stage steps at the moment when its gradient exists. One forward and two backward threads, J = 2, a forward pass of 1 and a
backward pass of 2 a stage::

    forward     0F0 1F0 0F1 1F1 0F2 1F2 0F3 1F3 ...
    backward 0          [ 1B0 ] [ 0B0 ] [ 1B2 ] ...
    backward 1                  [ 1B1 ] [ 0B1 ] ...
    steps                     1U0     0U0     0U1
                                      1U1     1U2

A forward pass reads its stage's weights when it begins. A backward pass reads them when it ends, and the update follows at
once. Of several things at one moment the ends of backward passes come first, and then what has the lower micro-batch.

With R updates of a stage in a unit of time, its staleness is ``ceil(R D) - 1`` updates, where D is the time from the beginning
of its forward pass to the end of its backward pass: those of all stages from it upward, and the wait between them.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from ds_decoupled.schedules.actions import Action
from ds_decoupled.schedules.kinds import Kind
from ds_decoupled.schedules.outline import Outline

#: Threads that ``"auto"`` takes at most.
MOST_AUTO = 8


@dataclass(frozen=True)
class Threads:
    """Who works in a layer-wise run.

    Attributes:
        forward: threads that go forward.
        backward: threads that go back; None for as many as a backward pass lasts forward passes (:meth:`for_ratio`); 0: those
            that went forward go back themselves, as Hogwild's workers do (arXiv 1106.5730).
        queue: finished forward passes that may wait beside those that a backward thread has taken.
        locked: whether updates of one stage come one after the other.
        forward_times: on the virtual clock, how long each stage's forward pass takes; None for 1.
        backward_times: likewise back; None for 2.
    """

    forward: int = 1
    backward: int | None = 2
    queue: int = 0
    locked: bool = True
    forward_times: tuple[float, ...] | None = None
    backward_times: tuple[float, ...] | None = None

    @staticmethod
    def for_ratio(ratio: float) -> int:
        """Backward threads that keep up with one forward thread, if a backward pass takes ``ratio`` forward passes."""
        return max(1, min(math.ceil(ratio), MOST_AUTO))


@dataclass(frozen=True)
class Exchanged:
    """What data-parallel replicas exchange whose threads run free.

    Attributes:
        kind: ``gossip``, ``average`` or ``allreduce``.
        every: updates of a stage, or micro-batches, from one exchange to the next.
        chosen: whether a user asked for it.
    """

    kind: str = "gossip"
    every: int = 1
    chosen: bool = False


def _exact(times: Sequence[float] | None, default: int, stages: int) -> list[Fraction]:
    """As they are written, so that sums of them meet where they should."""
    return [Fraction(str(time)) for time in times] if times is not None else [Fraction(default)] * stages


#: At one moment.
_BACKWARD, _FORWARD = 0, 1


class LayerwiseOrder:
    """The actions of a layer-wise run on one rank, in their order.

    Args:
        plan: stages and k.
        threads: who works, and how long stages take.

    Attributes:
        fed: micro-batches so far; ``done``: those that are through.
        now: the time.
    """

    def __init__(self, plan: Outline, threads: Threads) -> None:
        self.plan, self.stages, self.queue = plan, plan.placement.stages, threads.queue
        self.times = (_exact(threads.backward_times, 2, self.stages), _exact(threads.forward_times, 1, self.stages))
        self.forward = threads.forward
        ratio = float(sum(self.times[_BACKWARD]) / sum(self.times[_FORWARD]))
        self.backward = Threads.for_ratio(ratio) if threads.backward is None else threads.backward
        self.fed = self.done = 0
        self.now = Fraction(0)
        self.idle = [self.forward, self.backward]  # threads
        self._due: list[tuple[Fraction, int, int, int]] = []  # time, backward or forward, micro-batch, stage
        self._finished: deque[int] = deque()  # forward, where no room is: their threads wait
        self._waiting: deque[int] = deque()  # in the queue
        self._backwards = [0] * self.stages

    def call(self) -> Iterator[Action]:
        """From the beginning of a new micro-batch to where the next one would begin."""
        yield from self._until_free()
        m, self.fed = self.fed, self.fed + 1
        self.idle[0] -= 1
        yield Action(0, Kind.LOAD, m)
        yield from self._begin_forward(m, 0)
        yield from self._until_free()

    def drain(self) -> Iterator[Action]:
        """All that is in flight goes through."""
        while self._due:
            yield from self._event()
        self._backwards = [0] * self.stages

    def _until_free(self) -> Iterator[Action]:
        """On to where a forward thread is free, and nothing that comes first at that moment is left."""
        while not self.idle[0] or (self._due and self._due[0][:2] == (self.now, _BACKWARD)):
            yield from self._event()

    def _event(self) -> Iterator[Action]:
        """One stage's pass is over."""
        self.now, way, m, stage = heapq.heappop(self._due)
        if way == _FORWARD:
            if stage + 1 < self.stages:
                yield from self._begin_forward(m, stage + 1)
                return
            if not self.backward:
                self._begin_backward(m, stage)
                return
            self._finished.append(m)
        else:
            yield Action(stage, Kind.BACKWARD, m)
            # Micro-batches come in their order at every stage, as all take the same time there.
            yield from self.plan.update_if_due(stage, self._backwards[stage])
            self._backwards[stage] += 1
            if stage:
                self._begin_backward(m, stage - 1)
                return
            self.idle[1 if self.backward else 0] += 1
            self.done += 1
        self._hand_over()

    def _begin_forward(self, m: int, stage: int) -> Iterator[Action]:
        heapq.heappush(self._due, (self.now + self.times[_FORWARD][stage], _FORWARD, m, stage))
        yield Action(stage, Kind.FORWARD, m)

    def _begin_backward(self, m: int, stage: int) -> None:
        heapq.heappush(self._due, (self.now + self.times[_BACKWARD][stage], _BACKWARD, m, stage))

    def _hand_over(self) -> None:
        """Whoever can go on does: the queue's oldest to a free backward thread, then finished ones into the queue."""
        while self._waiting or self._finished:
            if self.idle[1]:
                if self._waiting:
                    m = self._waiting.popleft()
                else:
                    m = self._finished.popleft()
                    self.idle[0] += 1
                self.idle[1] -= 1
                self._begin_backward(m, self.stages - 1)
            elif self._finished and len(self._waiting) < self.queue:
                self._waiting.append(self._finished.popleft())
                self.idle[0] += 1
            else:
                return

    def state_dict(self) -> dict[str, Any]:
        """Where the order is."""
        return {"threads": (self.forward, self.backward, self.queue), "fed": self.fed, "done": self.done, "now": self.now,
                "idle": list(self.idle), "due": list(self._due), "finished": list(self._finished),
                "waiting": list(self._waiting), "backwards": list(self._backwards)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of :meth:`state_dict`.

        Raises:
            ValueError: if something is in flight, and there are other threads here.
        """
        threads = self.forward, self.backward, self.queue
        in_flight = state["fed"] > state["done"]
        if in_flight and tuple(state["threads"]) != threads:
            raise ValueError(f"what is in flight was begun by {state['threads'][0]} forward and {state['threads'][1]} backward "
                             f"threads with a queue of {state['threads'][2]}, and here are {threads[0]} and {threads[1]} with "
                             f"{threads[2]}: drain() before the checkpoint, or take the same")
        self.fed, self.done, self.now = state["fed"], state["done"], state["now"]
        self.idle = list(state["idle"]) if in_flight else [self.forward, self.backward]
        self._due, self._backwards = list(state["due"]), list(state["backwards"])
        self._finished, self._waiting = deque(state["finished"]), deque(state["waiting"])
