"""Pace ``clock``: stages at their own pace on a virtual clock: the deterministic twin of :mod:`ds_decoupled.runners.free`.

The order is worked out ahead, alike on every rank, so that a run comes out bit for bit on any number of ranks.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from typing import Any

from ds_decoupled.runners.runner import DataEnd, Runner
from ds_decoupled.schedules import Action, Kind
from ds_decoupled.schedules.asynchronous import AsynchronousOrder


class SimulatedRunner(Runner):
    """Carries out this rank's part of the order.

    A call is over when k new micro-batches have gone through stage 0, and whatever else had its turn until then.

    Attributes:
        order: where all stages are.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.order = AsynchronousOrder(self.plan, self.pace)

    def train(self) -> DataEnd | None:
        self.order.plan = self.plan  # k may have changed between two drains
        if self.end is None:
            # Ranks above the first would only learn of the end in the middle of a call, when some have done more than others.
            error = self.network.agree(self.next_micro_batch, self._fetch())
            if error is not None:
                self.end = DataEnd(self.next_micro_batch, None if isinstance(error, StopIteration) else error)
            else:
                self._carry_out(chain.from_iterable(self.order.call() for _ in range(self.plan.k)))
        return self.end

    def drain(self) -> None:
        self._carry_out(self.order.drain())
        self.network.wait_until_taken()
        self.end = None

    @property
    def in_flight(self) -> int:
        return self.order.unseen

    @property
    def through(self) -> int:
        return self.next_micro_batch

    @property
    def next_micro_batch(self) -> int:
        return self.order.turns[0]

    def due(self, action: Action) -> bool:
        return True  # where the data end, no call begins

    def _fetch(self) -> Exception | None:
        """All of this call's micro-batches; or why there are none."""
        if self.fetch is None:
            return None
        fetched = self.fetch(self.plan.k)
        if isinstance(fetched, Exception):
            return fetched
        for number, parts in enumerate(fetched, self.next_micro_batch):
            self.network.feed(number, parts)
        return None

    def _carry_out(self, order: Iterable[Action]) -> None:
        """This rank's part of ``order``."""
        ranks = self.plan.placement.rank_of_stage
        actions = [action for action in order if ranks[action.stage] == self.rank]
        self.network.expect((a.micro_batch for a in actions if a.kind is Kind.RECV_ACTIVATION), ())
        for action in actions:
            self.act(action)

    def state_dict(self) -> dict[str, Any]:
        return self.order.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.order.load_state_dict(state)
        self.end = None

    def rests(self, state: dict[str, Any]) -> bool:
        seen = all(uses for ring in state["rings"].values() for uses in ring["uses"].values())
        return seen and not any(state["gradients"])

    def sent_up(self) -> int:
        return 0  # nothing comes back for what was sent
