"""``gradient: local``: every stage has a loss, whose gradient reaches down through a window of stages."""

from __future__ import annotations

from collections.abc import Iterator

from ds_decoupled.schedules import global_gradient
from ds_decoupled.schedules.actions import Action
from ds_decoupled.schedules.kinds import Kind
from ds_decoupled.schedules.outline import Outline


def compute(plan: Outline, rank: int, tick: int, micro_batches: int) -> Iterator[Action]:
    """What ``rank`` computes in one tick of ``micro_batches``, in order."""
    stages, ticks = plan.placement.stages_of(rank), plan.ticks
    for s in stages if ticks.hops[0] == 0 else reversed(stages):
        m = tick - ticks.forward(s, 0)
        if 0 <= m < micro_batches:
            if s == 0:
                yield Action(s, Kind.LOAD, m)
            alone = ticks.reach(s) == 0
            yield Action(s, Kind.LOSS if alone else Kind.HEAD if s >= ticks.first_loss else Kind.FORWARD, m)
            if alone:
                yield from plan.update_if_due(s, m)
    for s in stages:
        reach = ticks.reach(s)
        for distance in range(1, reach + 1):
            m = tick - ticks.gradient(s, distance, 0)
            if 0 <= m < micro_batches and s + distance >= ticks.first_loss:
                yield Action(s, Kind.BACKWARD if distance == reach else Kind.RELAY, m)
                if distance == reach:
                    yield from plan.update_if_due(s, m)


def sends_gradient(plan: Outline, action: Action) -> bool:
    """Whether the loss of this action reaches the stage below."""
    if action.stage == 0 or plan.ticks.window == 1:
        return False
    # A backward pass is of the farthest loss of this stage: within the window of the one below at the top alone.
    return not action.kind.is_backward or plan.ticks.reach(action.stage) <= plan.ticks.window - 2


def gradient_kind(plan: Outline, below: int, action: Action) -> Kind:
    """As where there is one loss."""
    return global_gradient.gradient_kind(plan, below, action)
