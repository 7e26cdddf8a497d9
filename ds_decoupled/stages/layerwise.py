"""Stages of a layer-wise update: forward and backward passes are apart for every one of them, the last one too.

PD-ASGD (arXiv 2410.05985). The loss belongs to the backward pass: whoever goes back through the last stage takes what its
forward pass left, and begins with the loss of it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ds_decoupled.axes import Axes
from ds_decoupled.schedules import Slot
from ds_decoupled.stages.graph import GraphSegment
from ds_decoupled.stages.layers import Layer, Layers, backward, input_gradients
from ds_decoupled.stages.outcome import Outcome
from ds_decoupled.stages.segment import Segment
from ds_decoupled.stages.stage import Stage
from ds_decoupled.tensors import Gradients, Tensors, as_tuple, leaves, on_device


class LayerwiseStage(Stage):
    """One stage; see :class:`~ds_decoupled.stages.stage.Stage` for the arguments.

    Attributes:
        updates: made so far.
        staleness: how often a gradient came so many updates of the stage after its forward pass.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.updates = 0
        self.staleness: Counter[int] = Counter()
        self._seen: dict[int, int] = {}  # updates at the forward pass, by micro-batch
        self._ends: dict[int, tuple[Tensors, Any]] = {}  # of the last stage: outputs and labels, by micro-batch

    def _make_segments(self, layers: Sequence[Layer], first_layer: int, axes: Axes) -> list[Segment]:
        return [GraphSegment(Layers(layers, first_layer, self.seeds, self.autocast), self.weights, self.index > 0)]

    def on_forward(self, micro_batch: int, inputs: Tensors, labels: Any) -> Outcome:
        """The last stage keeps what the loss is taken from."""
        self._seen[micro_batch] = self.updates
        outputs = self.forward(micro_batch, inputs)
        if self.is_last:
            self._ends[micro_batch] = outputs, labels
            return Outcome(inputs=inputs)
        return Outcome({Slot.OUTPUT: (outputs, labels)}, inputs=inputs)

    def on_backward(self, micro_batch: int, grads: Gradients = (), outputs: Tensors | None = None,
                    loss: Tensor | None = None) -> Outcome:
        """Back through the stage; the last one begins with the loss."""
        if self.is_last:
            loss, grads = self.loss_gradients(micro_batch, *self._ends.pop(micro_batch))
        assert loss is not None
        inputs, input_grads = self.backward(micro_batch, outputs, grads)
        self.count_staleness(micro_batch)
        return Outcome(self.down(input_grads, inputs, loss), loss, complete=True, inputs=inputs)

    def count_staleness(self, micro_batch: int) -> None:
        """The gradient of ``micro_batch`` is there."""
        self.staleness[self.updates - self._seen.pop(micro_batch)] += 1

    def loss_gradients(self, micro_batch: int, outputs: Tensors, labels: Any) -> tuple[Tensor, Gradients]:
        """The loss of what the last stage gave, and the gradients of ``scale * loss`` with respect to it."""
        ends = leaves(outputs, True)
        with self.seeds.scope(), torch.enable_grad():
            loss = self.loss(ends, labels)
            if loss.requires_grad:
                backward(loss * self.scale if self.scale != 1 else loss, (torch.ones_like(loss),))
        return self._with_additional(loss.detach()), input_gradients(ends)

    def on_update(self, update: int) -> Outcome:
        """The k-th gradient is there."""
        self.updates += 1
        return super().on_update(update)

    def report(self) -> dict[str, Any]:
        """The staleness of its gradients: ``mean``, ``max``, and how ``often`` each came."""
        counts = dict(sorted(self.staleness.items()))
        total = sum(counts.values())
        mean = sum(n * count for n, count in counts.items()) / total if total else None
        return {"staleness": {"mean": mean, "max": max(counts, default=None), "often": counts}}

    def kept(self) -> Iterator[Tensor]:
        yield from super().kept()
        for outputs, _ in self._ends.values():
            yield from as_tuple(outputs)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "updates": self.updates, "seen": dict(self._seen), "ends": dict(self._ends),
                "staleness": dict(self.staleness)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.updates, self._seen, self.staleness = state["updates"], dict(state["seen"]), Counter(state["staleness"])
        self._ends = {m: on_device(ends, self.seeds.device) for m, ends in state["ends"].items()}
