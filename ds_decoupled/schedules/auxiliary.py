"""``gradient: auxiliary``: every stage has an input of its own making, so that all go forward and back at the same time.

Three sweeps (S = 3) of one micro-batch over J = 4 stages, all in one tick (letters as in
:mod:`ds_decoupled.schedules.kinds`; ``==`` the next stage's generated input, ``<-`` a gradient of it)::

              stage 0      stage 1      stage 2      stage 3
    inputs    N ========>  N ========>  N ========>  X
    sweep 1   Q         <- Q         <- Q         <- X
    sweep 2   G         <- G         <- B
    sweep 3   B         <- B
    targets   T         <-                                       (stages 1 and 2 have heard all that there is to hear)

The AuxNet learns as one network, from its last step to its first: a step's own gradient goes down with the last that its stage
sends, so with ``T``, or with the ``B`` of a stage that has heard the loss.

The first sweep waits for nobody. Each further one takes what the stage above made in the last, so that the loss is heard one
stage further down; a stage that has heard it goes back for good (``B``). Where the loss is farther away than that, one
gradient more is waited for (``T``), of which the small network alone learns. With one sweep: ``N``, ``P``, ``T``.
"""

from __future__ import annotations

from collections.abc import Iterator

from ds_decoupled.schedules.actions import Action
from ds_decoupled.schedules.kinds import Kind
from ds_decoupled.schedules.outline import Outline


def corrections(stages: int, stage: int, sweeps: int) -> int:
    """Sweeps of a stage behind its first: one fewer than all, and no more than there are stages above it.

    >>> [corrections(4, s, 3) for s in range(4)]
    [2, 2, 1, 0]
    """
    return min(sweeps - 1, stages - 1 - stage)


def waits_for_target(stages: int, stage: int, sweeps: int) -> bool:
    """Whether one gradient more comes from above once the stage has gone back for good.

    >>> [waits_for_target(4, s, 3) for s in range(4)]
    [True, False, False, False]
    """
    return sweeps - 1 < stages - 1 - stage


def compute(plan: Outline, rank: int, tick: int, micro_batches: int) -> Iterator[Action]:
    """What ``rank`` computes in one tick of ``micro_batches``, in order."""
    if tick >= micro_batches:
        return
    stages, top = plan.placement.stages_of(rank), plan.placement.stages - 1
    further = {s: corrections(top + 1, s, plan.sweeps) for s in stages}
    # The ranks above wait for their inputs, so these come first.
    for s in stages:
        if s == 0:
            yield Action(s, Kind.LOAD, tick)
        if s < top:
            yield Action(s, Kind.GENERATE, tick)
    # The upper ones first: what they make is what the lower ones' next sweep begins with.
    for s in reversed(stages):
        yield Action(s, Kind.LOSS if s == top else Kind.PROBE if further[s] else Kind.ALONE, tick)
    for sweep in range(1, plan.sweeps):
        for s in reversed(stages):
            if sweep <= further[s]:
                yield Action(s, Kind.RELAY if sweep < further[s] else Kind.BACKWARD, tick)
    for s in reversed(stages):
        if waits_for_target(top + 1, s, plan.sweeps):
            yield Action(s, Kind.TARGET, tick)
    for s in stages:
        yield from plan.update_if_due(s, tick)


def sends_gradient(plan: Outline, action: Action) -> bool:
    """What a stage's sweep finds at its input is what the stage below takes in its next; what the last one finds goes down
    together with what the AuxNet's step has to say there."""
    ends = action.kind in (Kind.ALONE, Kind.BACKWARD)
    return not (ends and waits_for_target(plan.placement.stages, action.stage, plan.sweeps))


def gradient_kind(plan: Outline, below: int, action: Action) -> Kind:
    """The last that a stage with a step of its own sends has the step's gradient beside its own."""
    top = plan.placement.stages - 1
    last = action.kind is Kind.TARGET or (
        action.kind is Kind.BACKWARD and not waits_for_target(top + 1, action.stage, plan.sweeps))
    return Kind.SEND_LESSON if last and below + 1 < top else Kind.SEND_GRADIENT
