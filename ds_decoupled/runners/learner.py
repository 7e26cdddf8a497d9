"""What happens when a stage's gradient exists, whichever thread has it: it is handed over, and the k-th lets the stage step."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any, cast

from ds_decoupled.optim import Hand
from ds_decoupled.schedules import Action, Kind
from ds_decoupled.stages.outcome import Outcome
from ds_decoupled.stages.threaded import ThreadedStage
from ds_decoupled.stages.worker import Worker
from ds_decoupled.watchers import Watcher


class Learner:
    """Updates from several threads.

    Args:
        workers: by stage.
        watchers: hear of one thing at a time.
        locked: whether updates of a stage come one after the other.
        k: gradients of an update.
        order: a context for each stage: within, its device is done with its last update.

    Attributes:
        turns: gradients that each stage has got since its last update.
        overlaps: updates of each stage that began while another one was under way, without locks: of these a part may be lost.
    """

    def __init__(self, workers: Mapping[int, Worker], watchers: Sequence[Watcher], locked: bool, k: Callable[[], int],
                 order: Callable[[int], AbstractContextManager[Any]]) -> None:
        self.workers, self.watchers, self.locked, self.k, self.order = workers, watchers, locked, k, order
        self._locks = {stage: threading.Lock() for stage in workers}
        self._telling = threading.RLock()
        self._hands = threading.local()
        self.overlaps = dict.fromkeys(workers, 0)
        self.start(dict.fromkeys(workers, 0))

    def start(self, turns: Mapping[int, int]) -> None:
        """Nothing is under way, and stages have got so many gradients since their last updates."""
        self.turns = dict(turns)
        self._under_way = dict.fromkeys(self.workers, 0)

    @contextmanager
    def turn(self, stage: int) -> Iterator[None]:
        """Within, nobody else changes the stage's weights, unless updates have no lock."""
        with self._locks[stage], self.order(stage):
            yield

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Within, no other thread tells watchers anything."""
        if self.watchers:
            with self._telling:
                yield
        else:
            yield

    def before(self, action: Action) -> None:
        """Watchers hear that an action is about to be done."""
        with self.watching():
            for watcher in self.watchers:
                watcher.before(action)

    def after(self, action: Action) -> None:
        """They hear that it has been."""
        with self.watching():
            for watcher in self.watchers:
                watcher.after(action)

    def learn(self, stage: int, m: int, outcome: Outcome) -> bool:
        """The gradient of ``m`` is there: hand it over, and step if it is the k-th. Returns whether it was."""
        worker = self.workers[stage]
        with self.turn(stage), self.watching():
            # The first update makes what the optimizer keeps beside the weights.
            if self.locked or not worker.optimizer.updates:
                cast(ThreadedStage, worker.stage).hand_over(m)
                worker.settle(Kind.BACKWARD, m, outcome)
                return self._update_if_due(stage)
        self._update_freely(stage, worker, m, outcome)
        return True

    def skip(self, stage: int) -> None:
        """The gradient is one that this replica does not have and others do."""
        with self.turn(stage), self.watching():
            self._update_if_due(stage)

    def _update_if_due(self, stage: int) -> bool:
        self.turns[stage] += 1
        if self.turns[stage] < self.k():
            return False
        self.turns[stage] = 0
        worker = self.workers[stage]
        action = Action(stage, Kind.UPDATE, worker.optimizer.updates)
        self.before(action)
        worker.act(Kind.UPDATE, action.micro_batch)
        self.after(action)
        return True

    def _update_freely(self, stage: int, worker: Worker, m: int, outcome: Outcome) -> None:
        """An update beside others of the stage; what counts them has its lock."""
        hands: dict[int, Hand] = self._hands.__dict__.setdefault("of", {})
        if stage not in hands:
            hands[stage] = Hand(worker.optimizer)  # this thread's
        with self._locks[stage], self.watching():
            self.overlaps[stage] += self._under_way[stage] > 0
            self._under_way[stage] += 1
            gradients = cast(ThreadedStage, worker.stage).gradients(m)
            worker.settle(Kind.BACKWARD, m, outcome)
        hands[stage].step(gradients)
        with self._locks[stage], self.watching():
            self._under_way[stage] -= 1
            action = Action(stage, Kind.UPDATE, worker.optimizer.updates)
            self.before(action)
            made = worker.stage.act(Kind.UPDATE, action.micro_batch)
            worker.settle(Kind.UPDATE, action.micro_batch, replace(made, steps=False))
            worker.optimizer.stepped()
            self.after(action)
