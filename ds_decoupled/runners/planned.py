"""Pace ``ticks``: a rank works through its plan, tick by tick, and waits only for the messages that its next action needs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ds_decoupled.instructions import DecoupledSchedule
from ds_decoupled.runners.runner import DataEnd, Runner
from ds_decoupled.schedules import Slot


class PlannedRunner(Runner):
    """Where a rank is in its plan. Ticks and micro-batches count from the start of the run.

    Attributes:
        fed: micro-batches of this run.
        tick: the next one.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.fed = self.tick = 0

    def train(self) -> DataEnd | None:
        if self.end is None:
            self.fed += self.plan.k
            self._fetch()
            self._run_until(self.tick + self.plan.k + (self.plan.ticks.drain if self.flush else 0))
        end = self.end
        if self.flush:
            self._start_run()
        return end

    def drain(self) -> None:
        self._run_until(max(self.tick, self.fed + self.plan.ticks.drain))
        self.network.wait_until_taken()
        self._start_run()

    @property
    def in_flight(self) -> int:
        return max(0, min(self.fed, self.fed + self.plan.ticks.drain - self.tick))

    @property
    def through(self) -> int:
        return self.first + max(0, min(self.fed, self.tick - self.plan.ticks.drain))

    @property
    def next_micro_batch(self) -> int:
        return self.first + self.fed

    def data_ended(self, end: DataEnd) -> None:
        if self.end is None:
            self.fed = end.micro_batch - self.first
        super().data_ended(end)

    def _fetch(self) -> None:
        """All of this call's micro-batches, before anything is done with the first: data that end leave no call half done."""
        if self.fetch is None:
            return
        first = self.first + self.fed - self.plan.k
        fetched = self.fetch(self.plan.k)
        if isinstance(fetched, Exception):
            self.data_ended(DataEnd(first, None if isinstance(fetched, StopIteration) else fetched))
            return
        for micro_batch, parts in enumerate(fetched, first):
            self.network.feed(micro_batch, parts)

    def _run_until(self, tick: int) -> None:
        """Work through this rank's list up to ``tick``."""
        # Receives are posted ahead, and only for what is sure to come: a receive that nobody answers would keep a rank from
        # leaving. What is sure is in the neighbour's list, as far as this rank itself will go.
        ticks = range(self.tick, tick)
        self.network.expect(activations=self._sent_by(self.rank - 1, ticks, Slot.OUTPUT),
                            gradients=self._sent_by(self.rank + 1, ticks, Slot.INPUT_GRADIENT))
        self.execute(DecoupledSchedule(self.plan, self.rank, ticks, self.fed, self.first))
        self.tick = tick

    def _sent_by(self, rank: int, ticks: range, slot: Slot) -> Iterator[int]:
        """Micro-batches whose messages from ``slot`` a neighbour sends in ``ticks``, in order, by its own list."""
        if 0 <= rank < self.plan.placement.ranks:
            yield from (self.first + action.micro_batch for tick in ticks for action in self.plan.tick(rank, tick, self.fed)
                        if action.kind.is_send and action.kind.takes is slot)

    def _start_run(self) -> None:
        """Nothing is in flight: ticks count from 0 again, micro-batches go on."""
        self.first += self.fed
        self.fed = self.tick = 0
        self.end = None
        self.network.start_run(self.first)

    def state_dict(self) -> tuple[int, int, int]:
        return self.first, self.fed, self.tick

    def load_state_dict(self, state: tuple[int, int, int]) -> None:
        self.first, self.fed, self.tick = state
        self.end = None

    def rests(self, state: tuple[int, int, int]) -> bool:
        return state[2] == 0

    def sent_up(self) -> int:
        # The last ticks may have sent nothing (the pipeline was draining), so that this looks back to the last one that did.
        for tick in reversed(range(self.tick)):
            sent = [a.micro_batch for a in self.plan.tick(self.rank, tick, self.fed)
                    if a.kind.is_send and a.kind.takes is Slot.OUTPUT]
            if sent:
                return max(sent) + 1
        return 0
