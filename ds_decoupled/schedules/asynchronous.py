"""A whole run of stages that go at their own pace, worked out ahead on a virtual clock: the order is data.

A stage numbers its own turns, 0, 1, 2, …; what it sends has the number of the turn. Whether a stage finds something in its
ring follows from numbers alone, so that every rank works out the whole order for itself and carries out its own part. J = 3,
rings of 2::

    warm start      0L0 0X0 1X0 2X0   0L1 0X1 1X1 2X1        all in turn, until every ring has been filled
    then, by turns  0L2 0X2 | 2X2 | 1X2 | 1X3 | 0L3 0X3 ...  who is drawn, or whose time has come

One call of ``train_batch`` ends before the (k+1)-th turn of stage 0 that follows its beginning.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ds_decoupled.schedules.actions import Action
from ds_decoupled.schedules.kinds import Kind
from ds_decoupled.schedules.layerwise import Exchanged, Threads
from ds_decoupled.schedules.outline import Outline
from ds_decoupled.schedules.replay import Replay, ReplayOrder
from ds_decoupled.schedules.turns import Clock


@dataclass(frozen=True)
class OwnPace:
    """How stages go at their own pace.

    Attributes:
        replay: of their inputs.
        clock: who acts next, on a virtual clock.
        threads: who goes forward and who goes back, where the update is layer-wise.
        exchange: of their data-parallel replicas.
    """

    replay: Replay = Replay()
    clock: Clock = Clock()
    threads: Threads = Threads()
    exchange: Exchanged = Exchanged()


class AsynchronousOrder:
    """Every rank's actions, one turn after another.

    Args:
        plan: stages, their ranks, k.
        pace: replay and clock.

    Attributes:
        plan: may get another k where no stage is in the middle of an update.
        turns: made so far, by stage.
        updates: likewise.
        gradients: since the last update, by stage.
        idle: turns in which a stage found nothing, by stage.
        rings: what lies in the ring before each stage, by stage; stage 0 has none.
    """

    def __init__(self, plan: Outline, pace: OwnPace) -> None:
        stages = plan.placement.stages
        self.plan = plan
        self._warm = pace.replay.size if pace.clock.warm_start else 0
        self.turns, self.idle, self.updates, self.gradients = ([0] * stages for _ in range(4))
        self.rings = {s: ReplayOrder(pace.replay) for s in range(1, stages)}
        self._next = pace.clock.turns(stages)

    def call(self) -> Iterator[Action]:
        """From this turn of stage 0 to before its next one."""
        yield from self._turn(0)
        if self.turns[0] <= self._warm:
            for stage in self.rings:
                yield from self._turn(stage)
            if self.turns[0] < self._warm:
                return
            for stage in range(self.plan.placement.stages):
                self._next.acted(stage)
        else:
            self._next.acted(0)
            self._next.arrived(1)
        while (stage := self._next.next()) != 0:
            before = self.turns[stage]
            yield from self._turn(stage)
            if self.turns[stage] == before:
                self.idle[stage] += 1
                self._next.idled(stage)
            else:
                self._next.acted(stage)
                self._next.arrived(stage + 1)

    def drain(self) -> Iterator[Action]:
        """What no stage has used yet goes all the way up, from the topmost ring to the lowest."""
        for stage in reversed(self.rings):
            while self.rings[stage].unseen:
                for above in range(stage, self.plan.placement.stages):
                    yield from self._turn(above)

    @property
    def unseen(self) -> int:
        """Messages in all rings that were not used yet."""
        return sum(ring.unseen for ring in self.rings.values())

    def _turn(self, stage: int) -> Iterator[Action]:
        """One turn of a stage; nothing where its ring has nothing for it."""
        if stage > 0 and self.rings[stage].draw() is None:
            return
        number = self.turns[stage]
        self.turns[stage] += 1
        if stage == 0:
            yield Action(0, Kind.LOAD, number)
        yield Action(stage, Kind.LOSS, number)
        if stage + 1 in self.rings:
            self.rings[stage + 1].put(number)
            ranks = self.plan.placement.rank_of_stage
            if ranks[stage] != ranks[stage + 1]:
                yield Action(stage, Kind.SEND_ACTIVATION, number)
                yield Action(stage + 1, Kind.RECV_ACTIVATION, number)
        self.gradients[stage] += 1
        if self.gradients[stage] == self.plan.k:
            yield Action(stage, Kind.UPDATE, self.updates[stage])
            self.updates[stage], self.gradients[stage] = self.updates[stage] + 1, 0

    def state_dict(self) -> dict[str, Any]:
        """Where the order is."""
        return {"turns": list(self.turns), "idle": list(self.idle), "updates": list(self.updates),
                "gradients": list(self.gradients), "next": self._next.state_dict(),
                "rings": {stage: ring.state_dict() for stage, ring in self.rings.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        self.turns, self.idle = list(state["turns"]), list(state["idle"])
        self.updates, self.gradients = list(state["updates"]), list(state["gradients"])
        self._next.load_state_dict(state["next"])
        for stage, ring in self.rings.items():
            ring.load_state_dict(state["rings"][stage])
