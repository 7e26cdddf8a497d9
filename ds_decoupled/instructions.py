"""Actions as DeepSpeed instructions, and a stretch of a plan as a DeepSpeed ``PipeSchedule``.

Every instruction carries ``stage`` and ``micro_batch``; for :class:`Update` the latter is the update's number.
"""

from __future__ import annotations

from collections.abc import Iterator

from deepspeed.runtime.pipe.schedule import PipeInstruction, PipeSchedule

from ds_decoupled.schedules import Action, Kind, Plan


class Load(PipeInstruction):
    """Take a micro-batch from the data iterator."""


class Forward(PipeInstruction):
    """Forward pass of a stage."""


class ForwardLossBackward(PipeInstruction):
    """Forward, loss and backward of the last stage in one."""


class ForwardHead(PipeInstruction):
    """Forward of a stage, the loss of its own head, and that loss's gradient to the stage's input."""


class Relay(PipeInstruction):
    """A gradient of a loss above, passed on to the stage's input."""


class Backward(PipeInstruction):
    """Backward pass through the kept graph."""


class BackwardRecompute(Backward):
    """Backward pass by recomputation from the kept input."""


class BackwardReconstruct(Backward):
    """Backward pass by reconstruction from the output."""


class WeightGradients(PipeInstruction):
    """The weights' gradients, put off until the input's gradient was sent."""


class Update(PipeInstruction):
    """Optimizer step of one stage."""


class SendActivation(PipeInstruction):
    """Send a stage's output to the next rank."""


class RecvActivation(PipeInstruction):
    """Receive a stage's input from the previous rank."""


class SendGradient(PipeInstruction):
    """Send the gradient of a stage's input to the previous rank."""


class RecvGradient(PipeInstruction):
    """Receive the gradient of a stage's output from the next rank."""


class SendReconstruction(SendGradient):
    """Send the gradient of a stage's input together with the input."""


class RecvReconstruction(RecvGradient):
    """Receive the gradient of a stage's output together with the output."""


INSTRUCTION_OF: dict[Kind, type[PipeInstruction]] = {
    Kind.LOAD: Load,
    Kind.FORWARD: Forward,
    Kind.LOSS: ForwardLossBackward,
    Kind.HEAD: ForwardHead,
    Kind.RELAY: Relay,
    Kind.BACKWARD: Backward,
    Kind.RECOMPUTE: BackwardRecompute,
    Kind.RECONSTRUCT: BackwardReconstruct,
    Kind.WEIGHTS: WeightGradients,
    Kind.UPDATE: Update,
    Kind.SEND_ACTIVATION: SendActivation,
    Kind.RECV_ACTIVATION: RecvActivation,
    Kind.SEND_GRADIENT: SendGradient,
    Kind.RECV_GRADIENT: RecvGradient,
    Kind.SEND_RECONSTRUCTION: SendReconstruction,
    Kind.RECV_RECONSTRUCTION: RecvReconstruction,
}


def instruction(action: Action, first_micro_batch: int) -> PipeInstruction:
    """``action`` of a run that began at ``first_micro_batch``, as an instruction with micro-batches of the whole run."""
    shift = 0 if action.kind is Kind.UPDATE else first_micro_batch
    return INSTRUCTION_OF[action.kind](stage=action.stage, micro_batch=action.micro_batch + shift)


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
