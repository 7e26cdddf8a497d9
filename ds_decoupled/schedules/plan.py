"""One plan for three readers: the simulator, the engine on one rank, and the engine on many.

Ranks keep no common clock: each works through its own list, tick by tick, and waits only for the messages that its next
action needs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial

from ds_decoupled.schedules.actions import Action
from ds_decoupled.schedules.communication import add_communication
from ds_decoupled.schedules.families import FAMILIES
from ds_decoupled.schedules.kinds import Kind
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
        family: of :data:`~ds_decoupled.schedules.families.FAMILIES`, the value of the ``gradient`` axis.
    """

    placement: Placement
    ticks: Ticks
    k: int = 1
    recover: str = "graph"
    wants_output: frozenset[int] = field(default=frozenset())
    split_backward: bool = False
    family: str = "global"

    @staticmethod
    def make(placement: Placement, *, hops: tuple[int, int], k: int, recover: str, flush: bool,
             wants_output: frozenset[int] | None = None, split_backward: bool = False, window: int = 0,
             farthest: bool = False, family: str | None = None) -> Plan:
        """The plan of a method on a placement; ``window`` is 0 unless losses are the stages' own, and ``family`` follows from
        it where it is not given."""
        if window:
            ticks = Ticks.local(placement.stages, hops, window, farthest)
        else:
            ticks = Ticks.flush(placement.rank_of_stage) if flush else Ticks.delayed(placement.stages, hops)
        if wants_output is None:
            wants_output = frozenset(range(placement.stages - 1)) if recover == "reconstruct" else frozenset()
        return Plan(placement, ticks, k, recover, wants_output, split_backward, family or ("local" if window else "global"))

    def tick(self, rank: int, tick: int, micro_batches: int) -> list[Action]:
        """What ``rank`` does in one tick of a run of ``micro_batches``: forwards, backwards, updates as they fall due.

        Within a tick the order among forwards matters where they hop in no time (``a = 0``: stage order), and among
        backwards likewise (stages of one rank under a flush: reverse order). Elsewhere what is sent goes first and what
        is received goes last, so that both travel while the rank computes.
        """
        family = FAMILIES[self.family]
        return list(add_communication(family.compute(self, rank, tick, micro_batches), self.placement.rank_of_stage,
                                      self.wants_output, self.split_backward, partial(family.sends_gradient, self)))

    def update_if_due(self, stage: int, micro_batch: int) -> Iterator[Action]:
        """The stage's update, if the one of ``micro_batch`` is the k-th gradient since its last."""
        if (micro_batch + 1) % self.k == 0:
            yield Action(stage, Kind.UPDATE, (micro_batch + 1) // self.k - 1)

    def run(self, rank: int, micro_batches: int) -> Iterator[list[Action]]:
        """A whole run: fill, steady state and drain, one list a tick."""
        for tick in range(micro_batches + self.ticks.drain):
            yield self.tick(rank, tick, micro_batches)
