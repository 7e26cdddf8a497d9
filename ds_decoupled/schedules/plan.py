"""One plan for three readers: the simulator, the engine on one rank, and the engine on many.

Ranks keep no common clock: each works through its own list, tick by tick, and waits only for the messages that its next
action needs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

from ds_decoupled.schedules.actions import Action
from ds_decoupled.schedules.communication import add_communication
from ds_decoupled.schedules.families import FAMILIES
from ds_decoupled.schedules.outline import Outline
from ds_decoupled.schedules.partition import Placement
from ds_decoupled.schedules.ticks import Ticks


@dataclass(frozen=True)
class Plan(Outline):
    """Who does what, when; its numbers are those of :class:`~ds_decoupled.schedules.outline.Outline`."""

    @staticmethod
    def make(placement: Placement, *, hops: tuple[int, int], k: int, recover: str, flush: bool,
             wants_output: frozenset[int] | None = None, split_backward: bool = False, window: int = 0,
             farthest: bool = False, family: str | None = None, sweeps: int = 0) -> Plan:
        """The plan of a method on a placement; ``window`` is 0 unless losses are the stages' own, ``sweeps`` unless inputs
        are generated, and ``family`` follows from them where it is not given."""
        if sweeps:
            ticks = Ticks.together(placement.stages)
        elif window:
            ticks = Ticks.local(placement.stages, hops, window, farthest)
        else:
            ticks = Ticks.flush(placement.rank_of_stage) if flush else Ticks.delayed(placement.stages, hops)
        if wants_output is None:
            wants_output = frozenset(range(placement.stages - 1)) if recover == "reconstruct" else frozenset()
        family = family or ("auxiliary" if sweeps else "local" if window else "global")
        return Plan(placement, ticks, k, recover, wants_output, split_backward, family, sweeps)

    def tick(self, rank: int, tick: int, micro_batches: int) -> list[Action]:
        """What ``rank`` does in one tick of a run of ``micro_batches``: forwards, backwards, updates as they fall due.

        Within a tick the order among forwards matters where they hop in no time (``a = 0``: stage order), and among
        backwards likewise (stages of one rank under a flush: reverse order). Elsewhere what is sent goes first and what
        is received goes last, so that both travel while the rank computes.
        """
        family = FAMILIES[self.family]
        return list(add_communication(family.compute(self, rank, tick, micro_batches), self.placement.rank_of_stage,
                                      self.split_backward, partial(family.sends_gradient, self),
                                      partial(family.gradient_kind, self)))

    def run(self, rank: int, micro_batches: int) -> Iterator[list[Action]]:
        """A whole run: fill, steady state and drain, one list a tick."""
        for tick in range(micro_batches + self.ticks.drain):
            yield self.tick(rank, tick, micro_batches)
