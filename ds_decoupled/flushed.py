"""``"method": "backprop"``: DeepSpeed's own 1F1B engine, which answers what every engine made from a block answers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from deepspeed.runtime.pipe.engine import PipelineEngine
from deepspeed.runtime.pipe.schedule import SendActivation, SendGrad
from torch import Tensor

from ds_decoupled.compat import around_instructions
from ds_decoupled.summary import summarize_flushed
from ds_decoupled.tensors import as_tuple


class FlushedPipelineEngine(PipelineEngine):
    """DeepSpeed's ``PipelineEngine``. Every call of ``train_batch`` ends with an empty pipeline.

    :func:`ds_decoupled.initialize` gives a finished engine this class, so that nothing here takes part in its making. Unlike a
    decoupled engine it needs a data iterator on the ranks of the last stage too, as in DeepSpeed.

    Attributes:
        bytes_sent, messages_sent: from this rank to its neighbours: activations and gradients, without those of evaluations, as
            decoupled engines count.
    """

    in_flight = 0
    bytes_sent = messages_sent = 0

    def eval_batch(self, data_iter: Any, return_logits: bool = False, compute_loss: bool = True,
                   reduce_output: str | None = "avg", bcast_loss: bool = True, num_micro_batches: int | None = None) -> Any:
        """DeepSpeed's own; where it is asked for no mean loss, its monitor is told none.

        DeepSpeed would tell a monitor the mean of whatever it gives: a list, outputs, or None.
        """
        enabled, sent = self.monitor.enabled, (self.bytes_sent, self.messages_sent)
        self.monitor.enabled = enabled and compute_loss and reduce_output is not None
        try:
            return super().eval_batch(data_iter, return_logits, compute_loss, reduce_output, bcast_loss, num_micro_batches)
        finally:
            self.monitor.enabled = enabled
            self.bytes_sent, self.messages_sent = sent

    def drain(self) -> Tensor:
        """There is nothing to finish: NaN, as where a decoupled engine finished nothing."""
        return torch.full((), float("nan"), device=self.device)

    def stage_metrics(self) -> list[dict[str, float]]:
        """No stage has a loss of its own."""
        return []

    def decoupled_summary(self) -> dict[str, Any]:
        """What the run did, with None for what nobody counts. A collective call, as a decoupled engine's is."""
        return summarize_flushed(self.module.parts, self.global_steps, self.bytes_sent, self.messages_sent)

    def count(self, message: tuple[Tensor | None, ...]) -> None:
        """One is about to be sent, without its Nones; DeepSpeed sends what is bool as half precision."""
        self.messages_sent += 1
        self.bytes_sent += sum(2 * t.numel() if t.dtype == torch.bool else t.nbytes for t in message if t is not None)


def as_flushed(engine: PipelineEngine) -> FlushedPipelineEngine:
    """``engine``, once DeepSpeed has made it."""
    engine.__class__ = FlushedPipelineEngine
    around_instructions(engine, _counted)
    return engine


def _counted(kind: type, function: Callable[..., Any]) -> Callable[..., Any]:
    """DeepSpeed's function for an instruction; if it sends, one that counts first: it lets go of what it has sent."""
    def send_activation(engine: FlushedPipelineEngine, buffer_id: int) -> None:
        engine.count(as_tuple(engine.pipe_buffers["outputs"][buffer_id]))
        function(engine, buffer_id)

    def send_grad(engine: FlushedPipelineEngine, buffer_id: int) -> None:
        engine.count(tuple(t.grad for t in as_tuple(engine.pipe_buffers["inputs"][buffer_id])))
        function(engine, buffer_id)

    return {SendActivation: send_activation, SendGrad: send_grad}.get(kind, function)
