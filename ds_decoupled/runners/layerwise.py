"""Layer-wise updates on a virtual clock: the deterministic twin of threads that go forward and threads that go back.

One thread carries out what :mod:`ds_decoupled.schedules.layerwise` says is next, so that a run comes out bit for bit and its
staleness can be counted.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ds_decoupled.runners.runner import DataEnd, Runner
from ds_decoupled.schedules import Action
from ds_decoupled.schedules.layerwise import LayerwiseOrder


class LayerwiseRunner(Runner):
    """Carries out the order.

    A call is over when a forward thread is free again after k new micro-batches.

    Attributes:
        order: where the threads are.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.order = LayerwiseOrder(self.plan, self.pace.threads)

    def train(self) -> DataEnd | None:
        assert self.fetch is not None  # one pipe rank
        if self.end is None:
            fetched = self.fetch(self.plan.k)
            if isinstance(fetched, Exception):
                self.end = DataEnd(self.next_micro_batch, None if isinstance(fetched, StopIteration) else fetched)
            else:
                self.order.plan = self.plan  # k may have changed between two drains
                for parts in fetched:
                    self.network.feed(self.next_micro_batch, parts)
                    self._carry_out(self.order.call())
        return self.end

    def drain(self) -> None:
        self._carry_out(self.order.drain())
        self.end = None

    def _carry_out(self, order: Iterable[Action]) -> None:
        for action in order:
            self.act(action)

    def due(self, action: Action) -> bool:
        return True  # where the data end, no call begins

    @property
    def in_flight(self) -> int:
        return self.order.fed - self.order.done

    @property
    def through(self) -> int:
        return self.order.done

    @property
    def next_micro_batch(self) -> int:
        return self.order.fed

    def state_dict(self) -> dict[str, Any]:
        return self.order.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.order.load_state_dict(state)
        self.end = None

    def rests(self, state: dict[str, Any]) -> bool:
        return bool(state["fed"] == state["done"])

    def sent_up(self) -> int:
        return 0  # there is no other rank
