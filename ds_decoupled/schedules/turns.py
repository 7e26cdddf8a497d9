"""Which stage is the next to act, where stages go at their own pace on a virtual clock.

Two clocks. *Chance*, the paper's simulated delays (decoupled greedy learning, arXiv 2106.06401): every turn is a draw among
all stages, in which one that is slowed by S has the weight 1/S (the paper's ``1 - noise``, so that ``S = 1/(1-noise)``).
*Durations*: a stage acts when the time of its last turn is over.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Protocol


@dataclass(frozen=True)
class Clock:
    """What makes the order of turns.

    Attributes:
        seed: of the draws.
        durations: of a turn of each stage, in any unit; None: turns are drawn.
        slow_down: a factor for each stage; None: none is slowed.
        warm_start: stages act one after the other until the rings are full, before they go their own ways.
    """

    seed: int = 0
    durations: tuple[float, ...] | None = None
    slow_down: tuple[float, ...] | None = None
    warm_start: bool = True

    def turns(self, stages: int) -> Turns:
        """The order itself, from its beginning."""
        slow_down = self.slow_down or (1.0,) * stages
        if self.durations is None:
            return DrawnTurns([1 / factor for factor in slow_down], self.seed)
        return TimedTurns([factor * duration for factor, duration in zip(slow_down, self.durations)])


class Turns(Protocol):
    """An order of turns. Stage 0 never lacks data; another may find nothing in its ring."""

    def next(self) -> int:
        """The stage that is to act."""

    def acted(self, stage: int) -> None:
        """It has."""

    def idled(self, stage: int) -> None:
        """It found nothing."""

    def arrived(self, stage: int) -> None:
        """Something came for it."""

    def state_dict(self) -> Any:
        """Where the order is."""

    def load_state_dict(self, state: Any) -> None:
        """The inverse of :meth:`state_dict`."""


class DrawnTurns:
    """Each turn is drawn; one that finds nothing is lost.

    Args:
        weights: of the stages.
        seed: of Python's own generator, whose numbers are the same on every machine. One ``random()`` a turn is compared with
            the running sums of the weights.
    """

    def __init__(self, weights: Sequence[float], seed: int) -> None:
        self.sums = list(accumulate(weights))
        self.random = random.Random(seed)

    def next(self) -> int:
        value = self.random.random() * self.sums[-1]
        return next((stage for stage, total in enumerate(self.sums) if value < total), len(self.sums) - 1)  # rounding

    def acted(self, stage: int) -> None:
        """The draws have no memory."""

    def idled(self, stage: int) -> None:
        """The turn is lost."""

    def arrived(self, stage: int) -> None:
        """It waits for a turn."""

    def state_dict(self) -> Any:
        return self.random.getstate()

    def load_state_dict(self, state: Any) -> None:
        self.random.setstate(state)


class TimedTurns:
    """A turn is over in no time, and the next one of its stage comes when the duration has passed; of two at the same time the
    lower stage goes first. A stage that finds nothing waits, and acts when something comes.

    Args:
        durations: by stage.
    """

    def __init__(self, durations: Sequence[float]) -> None:
        self.durations = list(durations)
        self.now = 0.0
        self._due: list[tuple[float, int]] = []
        self._waiting = set(range(1, len(durations)))

    def next(self) -> int:
        self.now, stage = heapq.heappop(self._due)
        return stage

    def acted(self, stage: int) -> None:
        self._waiting.discard(stage)
        heapq.heappush(self._due, (self.now + self.durations[stage], stage))

    def idled(self, stage: int) -> None:
        self._waiting.add(stage)

    def arrived(self, stage: int) -> None:
        if stage in self._waiting:
            self._waiting.remove(stage)
            heapq.heappush(self._due, (self.now, stage))

    def state_dict(self) -> Any:
        return self.now, list(self._due), sorted(self._waiting)

    def load_state_dict(self, state: Any) -> None:
        self.now, due, waiting = state
        self._due, self._waiting = list(due), set(waiting)
