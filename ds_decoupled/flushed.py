"""``"method": "backprop"``: DeepSpeed's own 1F1B engine, which answers what every engine made from a block answers."""

from __future__ import annotations

from typing import Any

import torch
from deepspeed.runtime.pipe.engine import PipelineEngine
from torch import Tensor

from ds_decoupled.summary import summarize_flushed


class FlushedPipelineEngine(PipelineEngine):
    """DeepSpeed's ``PipelineEngine``. Every call of ``train_batch`` ends with an empty pipeline.

    :func:`ds_decoupled.initialize` gives a finished engine this class, so that nothing here takes part in its making. Unlike a
    decoupled engine it needs a data iterator on the ranks of the last stage too, as in DeepSpeed.
    """

    in_flight = 0

    def eval_batch(self, data_iter: Any, return_logits: bool = False, compute_loss: bool = True,
                   reduce_output: str | None = "avg", bcast_loss: bool = True, num_micro_batches: int | None = None) -> Any:
        """DeepSpeed's own; where it is asked for no mean loss, its monitor is told none.

        DeepSpeed would tell a monitor the mean of whatever it gives: a list, outputs, or None.
        """
        enabled = self.monitor.enabled
        self.monitor.enabled = enabled and compute_loss and reduce_output is not None
        try:
            return super().eval_batch(data_iter, return_logits, compute_loss, reduce_output, bcast_loss, num_micro_batches)
        finally:
            self.monitor.enabled = enabled

    def drain(self) -> Tensor:
        """There is nothing to finish: NaN, as where a decoupled engine finished nothing."""
        return torch.full((), float("nan"), device=self.device)

    def stage_metrics(self) -> list[dict[str, float]]:
        """No stage has a loss of its own."""
        return []

    def decoupled_summary(self) -> dict[str, Any]:
        """What the run did, with None for what DeepSpeed does not count."""
        return summarize_flushed(self.module.parts, self.global_steps)


def as_flushed(engine: PipelineEngine) -> FlushedPipelineEngine:
    """``engine``, once DeepSpeed has made it."""
    engine.__class__ = FlushedPipelineEngine
    return engine
