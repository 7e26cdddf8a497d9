"""Pace ``free``: every rank goes through its own turns as fast as it can, and waits for no other.

The bottom stage of a rank uses whatever its replay ring says is next; stages above it on the same rank use what has just come
up. A call of ``train_batch`` is over when this rank has done its own k micro-batches, or found nothing more to use once the
rank below had made the call too. :mod:`ds_decoupled.runners.simulated` is the same on a virtual clock.
"""

from __future__ import annotations

import time
from typing import Any

import torch

from ds_decoupled.collectives import gather
from ds_decoupled.errors import ConfigError
from ds_decoupled.free_network import FreeNetwork, NoInput
from ds_decoupled.links import Message
from ds_decoupled.passes import as_in_evaluation
from ds_decoupled.runners.runner import DataEnd, Runner
from ds_decoupled.schedules import Action, Kind

#: Seconds between two looks at whether something is to be done, of a rank that is done itself.
_LOOK = 0.001


class FreeRunner(Runner):
    """This rank's turns.

    Attributes:
        turns: by stage.
        gradients: by stage, since its last update; a stage steps when it has k.
        sent: numbers given to what a stage made, its turns and what it only forwarded.
    """

    network: FreeNetwork
    network_class = FreeNetwork

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.pace.replay.cap is not None and self.network.replicas is not None:
            raise ConfigError("decoupled.replay.cap", self.pace.replay.cap, 'with "pace": "free" and data-parallel replicas '
                              "one may find nothing to use where another does, and they step together", "Leave it out.")
        self.turns, self.sent, self.gradients = (dict.fromkeys(self.workers, 0) for _ in range(3))
        self.bottom, self.top = min(self.workers), max(self.workers)

    def train(self) -> DataEnd | None:
        if self.end is None:
            error = self._begin()
            if error is not None:
                self.data_ended(DataEnd(self.sent[self.bottom], None if isinstance(error, StopIteration) else error))
                return self.end
            for made in range(self.plan.k):
                if (nothing := self._round()) is None:
                    continue
                if nothing.for_good:
                    self.data_ended(DataEnd(self.sent[self.bottom]))
                else:
                    self.network.idle += self.plan.k - made
                break
            self.network.call_over()
        return self.end

    def drain(self) -> None:
        """Whoever is done forwards until all are, in evaluation mode; then, from the lowest rank up, what came and was not
        used yet is used. Nobody goes on before all have: what it would send, or say of new data, would be taken for the old."""
        all_done = self.network.arrive()
        while not all_done():
            if not self._only_forward():
                time.sleep(_LOOK)
        self.network.pass_mark(before=self._use_up)
        self.network.start_run(0)
        self.end = None
        all_drained = self.network.arrive()
        while not all_drained():
            time.sleep(_LOOK)

    def _begin(self) -> Exception | None:
        """What there is to do a call with; or why there is nothing, on all replicas alike."""
        self.network.check()
        if self.fetch is not None:
            fetched = self.fetch(self.plan.k)
            if isinstance(fetched, Exception):
                return fetched
            for number, parts in enumerate(fetched, self.sent[0]):
                self.network.feed(number, parts)
            return None
        nothing = self.network.wait_for_input()
        ended = self.network.data_ended
        error: Exception | None = None
        if ended is not None:
            error = ended[1] or StopIteration(f"the data ended before micro-batch {ended[0]}")
        elif nothing is not None and nothing.for_good:
            error = StopIteration(nothing.reason)
        return self.network.agree_replicas(error)

    def _round(self) -> NoInput | None:
        """A turn of every stage, from the bottom; or why there is nothing for it."""
        if (nothing := self.network.wait_for_input()) is not None:
            return nothing
        for stage in self.workers:
            started = time.perf_counter()
            self._turn(stage)
            if self.pace.clock.slow_down is not None:
                time.sleep((self.pace.clock.slow_down[stage] - 1) * (time.perf_counter() - started))
        return None

    def _turn(self, stage: int) -> None:
        number = self.sent[stage]
        self.sent[stage] += 1
        self.turns[stage] += 1
        if stage == 0:
            self.act(Action(0, Kind.LOAD, number))
        self.act(Action(stage, Kind.LOSS, number))
        if stage == self.top < self.plan.placement.stages - 1:
            self.act(Action(stage, Kind.SEND_ACTIVATION, number))
        self.gradients[stage] += 1
        if self.gradients[stage] == self.plan.k:
            self.act(Action(stage, Kind.UPDATE, self.workers[stage].optimizer.updates))
            self.gradients[stage] = 0

    def _use_up(self) -> None:
        while self.bottom in self.network.rings and self.network.rings[self.bottom].order.unseen:
            self._round()

    def _only_forward(self) -> bool:
        """Forward what came and was not used yet, if anything did; nothing is learned from it here."""
        ring = self.network.rings.get(self.bottom)
        if ring is None or not ring.order.unseen:
            return False
        x, labels = ring.recv(0, f"stage {self.bottom}, forward").parts
        stages = [worker.stage for worker in self.workers.values()]
        with torch.no_grad(), as_in_evaluation(stages):
            for stage in stages:
                x = stage.plain_forward(self.sent[stage.index], x)
                self.sent[stage.index] += 1
        self.network.offer(Message(self.sent[self.top] - 1, (x, labels)))
        return True

    def due(self, action: Action) -> bool:
        return True  # a call that has begun is done

    @property
    def in_flight(self) -> int:
        return sum(ring.order.unseen for ring in self.network.rings.values())

    @property
    def through(self) -> int:
        return min(self.turns.values())

    @property
    def next_micro_batch(self) -> int:
        return self.sent[self.bottom]

    def state_dict(self) -> dict[str, Any]:
        """Of all ranks. A collective call."""
        told = gather(({"turns": self.turns, "sent": self.sent, "gradients": self.gradients}, self.in_flight))
        merged = {name: {s: n for counts, _ in told for s, n in counts[name].items()} for name in told[0][0]}
        return {**merged, "unseen": sum(unseen for _, unseen in told)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.turns = {s: state["turns"][s] for s in self.workers}
        self.sent = {s: state["sent"][s] for s in self.workers}
        self.gradients = {s: state["gradients"][s] for s in self.workers}
        self.end = None

    def rests(self, state: dict[str, Any]) -> bool:
        return state["unseen"] == 0 and not any(state["gradients"].values())

    def sent_up(self) -> int:
        return 0  # nothing comes back for what was sent
