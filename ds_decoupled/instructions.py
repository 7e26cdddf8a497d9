"""Actions as DeepSpeed instructions, and a stretch of a plan as a DeepSpeed ``PipeSchedule``.

Every row of the table of kinds has an instruction class, made when it is first asked for. Every instruction carries ``stage``
and ``micro_batch``; for an update the latter is the update's number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

from deepspeed.runtime.pipe.schedule import PipeInstruction, PipeSchedule

from ds_decoupled.schedules import KINDS, Action, Kind, Plan


@cache
def instruction_class(kind: Kind) -> type[PipeInstruction]:
    """The instruction of an action kind; always the same class for the same kind, as DeepSpeed looks it up by its type."""
    return type(kind.name, (PipeInstruction,), {"__doc__": f"{kind.words.capitalize()}.", "__module__": __name__})


def instruction(action: Action, first_micro_batch: int) -> PipeInstruction:
    """``action`` of a run that began at ``first_micro_batch``, as an instruction with micro-batches of the whole training."""
    shift = 0 if action.kind.per_update else first_micro_batch
    return instruction_class(action.kind)(stage=action.stage, micro_batch=action.micro_batch + shift)


def instruction_map(act: Callable[[Action], None]) -> dict[type[PipeInstruction], Callable[..., None]]:
    """For DeepSpeed's loop: for every kind's instruction, a function that lets ``act`` do it.

    DeepSpeed binds the functions to its engine, which they do not need.
    """
    def doing(kind: Kind) -> Callable[..., None]:
        def do(engine: Any, stage: int, micro_batch: int) -> None:
            act(Action(stage, kind, micro_batch))

        return do

    return {instruction_class(kind): doing(kind) for kind in KINDS.values()}


class DecoupledSchedule(PipeSchedule):
    """Ticks ``ticks`` of ``plan`` on one rank.

    Args:
        plan: the method on its placement.
        rank: the pipe rank.
        ticks: counted from the start of the run (or the last drain).
        micro_batches: of the run so far, those of this call among them.
        first_micro_batch: the number of the run's first micro-batch over the whole training.
    """

    def __init__(self, plan: Plan, rank: int, ticks: range, micro_batches: int, first_micro_batch: int) -> None:
        super().__init__(micro_batches=micro_batches, stages=plan.placement.ranks, stage_id=rank)
        self.plan, self.rank, self.ticks, self.first_micro_batch = plan, rank, ticks, first_micro_batch

    def steps(self) -> Iterator[list[PipeInstruction]]:
        """One list of instructions a tick."""
        for tick in self.ticks:
            yield [instruction(action, self.first_micro_batch)
                   for action in self.plan.tick(self.rank, tick, self.micro_batches)]

    def num_pipe_buffers(self) -> int:
        """None of DeepSpeed's buffers are used."""
        return 0
