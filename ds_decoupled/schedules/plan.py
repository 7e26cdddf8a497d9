"""One plan for three readers: the simulator, the engine on one rank, and the engine on many.

Ranks keep no common clock: each works through its own list, tick by tick, and waits only for the messages that its next
action needs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from ds_decoupled.schedules.actions import BACKWARD_OF_RECOVER, Action, Kind
from ds_decoupled.schedules.communication import add_communication
from ds_decoupled.schedules.partition import Placement
from ds_decoupled.schedules.ticks import Ticks


@dataclass(frozen=True)
class Plan:
    """Who does what, when.

    Attributes:
        placement: stages and their ranks.
        ticks: when each stage meets each micro-batch.
        k: micro-batches per update (``gradient_accumulation_steps``).
        recover: the ``recover`` axis, which names the backward actions.
        wants_output: stages that need their output back with its gradient; by default, with ``reconstruct``, all but
            the last.
        split_backward: the gradient goes to another rank before the weights' own gradients are computed.
    """

    placement: Placement
    ticks: Ticks
    k: int = 1
    recover: str = "graph"
    wants_output: frozenset[int] = field(default=frozenset())
    split_backward: bool = False

    @staticmethod
    def make(placement: Placement, *, hops: tuple[int, int], k: int, recover: str, flush: bool,
             wants_output: frozenset[int] | None = None, split_backward: bool = False, window: int = 0,
             farthest: bool = False) -> Plan:
        """The plan of a method on a placement; ``window`` is 0 unless losses are the stages' own."""
        if window:
            ticks = Ticks.local(placement.stages, hops, window, farthest)
        else:
            ticks = Ticks.flush(placement.rank_of_stage) if flush else Ticks.delayed(placement.stages, hops)
        if wants_output is None:
            wants_output = frozenset(range(placement.stages - 1)) if recover == "reconstruct" else frozenset()
        return Plan(placement, ticks, k, recover, wants_output, split_backward)

    def tick(self, rank: int, tick: int, micro_batches: int) -> list[Action]:
        """What ``rank`` does in one tick of a run of ``micro_batches``: forwards, backwards, updates as they fall due.

        Within a tick the order among forwards matters where they hop in no time (``a = 0``: stage order), and among
        backwards likewise (stages of one rank under a flush: reverse order). Elsewhere what is sent goes first and what
        is received goes last, so that both travel while the rank computes.
        """
        if self.ticks.window:
            return list(add_communication(self._compute_local(rank, tick, micro_batches), self.placement.rank_of_stage,
                                          sends_gradient=self.sends_gradient))
        return list(add_communication(self._compute(rank, tick, micro_batches), self.placement.rank_of_stage,
                                      self.wants_output, self.split_backward))

    def sends_gradient(self, action: Action) -> bool:
        """With stage-local losses: whether the loss of this action reaches the stage below."""
        if action.stage == 0 or self.ticks.window == 1:
            return False
        if action.kind.is_backward:  # the farthest loss of this stage: within the window of the one below at the top alone
            return self.ticks.reach(action.stage) <= self.ticks.window - 2
        return action.kind in (Kind.LOSS, Kind.HEAD, Kind.RELAY)

    def _compute_local(self, rank: int, tick: int, micro_batches: int) -> Iterator[Action]:
        stages = self.placement.stages_of(rank)
        for s in stages if self.ticks.hops[0] == 0 else reversed(stages):
            m = tick - self.ticks.forward(s, 0)
            if 0 <= m < micro_batches:
                if s == 0:
                    yield Action(s, Kind.LOAD, m)
                alone = self.ticks.reach(s) == 0
                yield Action(s, Kind.LOSS if alone else Kind.HEAD if s >= self.ticks.first_loss else Kind.FORWARD, m)
                if alone:
                    yield from self._update_if_due(s, m)
        for s in stages:
            reach = self.ticks.reach(s)
            for distance in range(1, reach + 1):
                m = tick - self.ticks.gradient(s, distance, 0)
                if 0 <= m < micro_batches and s + distance >= self.ticks.first_loss:
                    yield Action(s, Kind.BACKWARD if distance == reach else Kind.RELAY, m)
                    if distance == reach:
                        yield from self._update_if_due(s, m)

    def _compute(self, rank: int, tick: int, micro_batches: int) -> Iterator[Action]:
        stages = self.placement.stages_of(rank)
        last = self.placement.stages - 1
        ascending, descending = stages, reversed(stages)
        for s in ascending if self.ticks.hops[0] == 0 else descending:
            m = tick - self.ticks.forward(s, 0)
            if 0 <= m < micro_batches:
                if s == 0:
                    yield Action(s, Kind.LOAD, m)
                yield Action(s, Kind.LOSS if s == last else Kind.FORWARD, m)
                if s == last:
                    yield from self._update_if_due(s, m)
        shared_depth = len(stages) > 1 and self.ticks.depth[stages[0]] == self.ticks.depth[stages[-1]]
        for s in reversed(stages) if shared_depth else stages:
            m = tick - self.ticks.backward(s, 0)
            if s != last and 0 <= m < micro_batches:
                yield Action(s, BACKWARD_OF_RECOVER[self.recover], m)
                yield from self._update_if_due(s, m)

    def _update_if_due(self, stage: int, micro_batch: int) -> Iterator[Action]:
        if (micro_batch + 1) % self.k == 0:
            yield Action(stage, Kind.UPDATE, (micro_batch + 1) // self.k - 1)

    def run(self, rank: int, micro_batches: int) -> Iterator[list[Action]]:
        """A whole run: fill, steady state and drain, one list a tick."""
        for tick in range(micro_batches + self.ticks.drain):
            yield self.tick(rank, tick, micro_batches)
