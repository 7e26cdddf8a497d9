"""The numbers that a plan is made of; what a family of plans is handed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from ds_decoupled.schedules.actions import Action
from ds_decoupled.schedules.kinds import Kind
from ds_decoupled.schedules.partition import Placement
from ds_decoupled.schedules.ticks import Ticks


@dataclass(frozen=True)
class Outline:
    """A method on a placement.

    Attributes:
        placement: stages and their ranks.
        ticks: when each stage meets each micro-batch.
        k: micro-batches per update (``gradient_accumulation_steps``).
        recover: the ``recover`` axis, which names the backward actions.
        wants_output: stages that need their output back with its gradient; by default, with ``reconstruct``, all but
            the last.
        split_backward: the gradient goes to another rank before the weights' own gradients are computed.
        sweeps: of a micro-batch over all stages, where inputs are generated; 0 elsewhere.
        family: of :data:`~ds_decoupled.schedules.families.FAMILIES`, the value of the ``gradient`` axis.
    """

    placement: Placement
    ticks: Ticks
    k: int = 1
    recover: str = "graph"
    wants_output: frozenset[int] = field(default=frozenset())
    split_backward: bool = False
    family: str = "global"
    sweeps: int = 0

    def update_if_due(self, stage: int, micro_batch: int) -> Iterator[Action]:
        """The stage's update, if the one of ``micro_batch`` is the k-th gradient since its last."""
        if (micro_batch + 1) % self.k == 0:
            yield Action(stage, Kind.UPDATE, (micro_batch + 1) // self.k - 1)
