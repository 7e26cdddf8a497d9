"""Batch norm's statistics of the serial network, where training has shown its layers other inputs.

In training with generated inputs the running statistics follow those. Before an evaluation some of the last micro-batches of
training pass through the serial network once, batch norm as in training and all else as in evaluation, and the plain mean of
what it sees becomes its statistics. They stay: a checkpoint that is saved after an evaluation has them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from ds_decoupled.passes import Passes
from ds_decoupled.stages.auxiliary import AuxiliaryStage
from ds_decoupled.stages.stage import Stage
from ds_decoupled.tensors import Tensors


class NormStatistics:
    """Estimates them anew.

    Args:
        passes: the way through this rank's stages.
        stages: of this rank; the first of all has the micro-batches.
        count: micro-batches at most; 0 for never.
    """

    def __init__(self, passes: Passes, stages: Sequence[AuxiliaryStage], count: int) -> None:
        self.passes, self.stages, self.count = passes, stages, count
        self._seen = 0

    def before_evaluation(self) -> None:
        """A collective call; nothing where nothing was trained since the last."""
        # By now all stages have seen the same number of micro-batches: none is in flight between two calls.
        stage = self.stages[0]
        count = min(self.count, stage.seen)
        if not count or stage.seen == self._seen:
            return
        self._seen = stage.seen

        def through(stage: Stage, x: Tensors, beside: list[Any]) -> Tensors:
            return stage.plain_forward(number, x)

        with torch.no_grad(), _estimating(self.stages):
            self.passes.expect("evaluation", count)
            for number in range(count):  # noqa: B007  (through reads it)
                self.passes.forward("evaluation", number, lambda: (stage.recent[number], None), through)  # noqa: B023
        self.passes.network.wait_until_taken("evaluation")


@contextmanager
def _estimating(stages: Sequence[Stage]) -> Iterator[None]:
    norms = [module for stage in stages for layer in stage.layers if isinstance(layer, nn.Module) for module in layer.modules()
             if isinstance(module, _NormBase) and module.track_running_stats]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain mean
        norm.train()
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta):
            norm.momentum = momentum
            norm.eval()
