"""``gradient: global``: forwards, then backwards, each in the tick that :class:`~ds_decoupled.schedules.ticks.Ticks` says."""

from __future__ import annotations

from collections.abc import Iterator

from ds_decoupled.schedules.actions import Action
from ds_decoupled.schedules.kinds import BACKWARD_OF_RECOVER, Kind
from ds_decoupled.schedules.outline import Outline


def compute(plan: Outline, rank: int, tick: int, micro_batches: int) -> Iterator[Action]:
    """What ``rank`` computes in one tick of ``micro_batches``, in order."""
    stages, ticks = plan.placement.stages_of(rank), plan.ticks
    last = plan.placement.stages - 1
    # Where forwards hop in no time a micro-batch passes all stages, so they go in stage order. Elsewhere the top one goes
    # first: its output is what another rank waits for.
    for s in stages if ticks.hops[0] == 0 else reversed(stages):
        m = tick - ticks.forward(s, 0)
        if 0 <= m < micro_batches:
            if s == 0:
                yield Action(s, Kind.LOAD, m)
            yield Action(s, Kind.LOSS if s == last else Kind.FORWARD, m)
            if s == last:
                yield from plan.update_if_due(s, m)
    # Under a flush the stages of one rank go back in one tick, the upper ones first.
    shared_depth = len(stages) > 1 and ticks.depth[stages[0]] == ticks.depth[stages[-1]]
    for s in reversed(stages) if shared_depth else stages:
        m = tick - ticks.backward(s, 0)
        if s != last and 0 <= m < micro_batches:
            yield Action(s, BACKWARD_OF_RECOVER[plan.recover], m)
            yield from plan.update_if_due(s, m)


def sends_gradient(plan: Outline, action: Action) -> bool:
    """Whatever goes back through a stage goes on to the stage below."""
    return True


def gradient_kind(plan: Outline, below: int, action: Action) -> Kind:
    """A stage that reconstructs needs its output back."""
    return Kind.SEND_RECONSTRUCTION if below in plan.wants_output else Kind.SEND_GRADIENT
