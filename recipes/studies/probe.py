"""How far what is rebuilt is from what was there."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ds_decoupled.stages import Stage
from ds_decoupled.stages.segment import Segment, SegmentObserver


@dataclass
class ReconstructionProbe(SegmentObserver):
    """How far the input that a stage's lowest couplings rebuild is from the one that they were given.

    Attributes:
        every: micro-batches from one that is looked at to the next.
        errors: ``|rebuilt - true| / |true|`` over both streams, of those looked at.
    """

    every: int
    errors: list[float] = field(default_factory=list)

    def watch(self, stage: Stage) -> None:
        """Look on at the lowest segment of ``stage`` that rebuilds its input, if there is one."""
        self._segment = next((segment for segment in stage.segments if segment.wants_output), None)
        self._given: dict[int, tuple[Tensor, ...]] = {}
        stage.observers.append(self)

    def went_forward(self, segment: Segment, micro_batch: int, inputs: Any) -> None:
        if segment is self._segment and micro_batch % self.every == 0:
            self._given[micro_batch] = tuple(x.detach() for x in inputs[:2])

    def went_back(self, segment: Segment, micro_batch: int, inputs: Any) -> None:
        if segment is self._segment and micro_batch % self.every == 0:
            true, found = (torch.stack(pair) for pair in (self._given.pop(micro_batch), inputs[:2]))
            self.errors.append(((found - true).norm() / true.norm()).item())
