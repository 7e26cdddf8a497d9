"""A stage of a layer-wise update whose passes run in several threads at once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ds_decoupled.stages.layers import backward, input_gradients, scalar_loss
from ds_decoupled.stages.layerwise import LayerwiseStage
from ds_decoupled.stages.slots import Slot, Slots
from ds_decoupled.tensors import Gradients, Tensors, as_tuple, leaves


class ThreadedStage(LayerwiseStage):
    """Every micro-batch in flight has a slot (:mod:`ds_decoupled.stages.slots`). Forward and backward passes of different
    micro-batches may run at the same time; :meth:`gradients` and :meth:`hand_over` are for one thread at a time.

    With ``"weights": "stashed"`` a slot keeps the values of the forward pass: copies that nobody else sees.

    Attributes:
        drifts: whether data-parallel replicas have weights of their own, which a checkpoint keeps for each.
    """

    drifts = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.slots = Slots(self._slot)

    def _slot(self) -> Slot:
        return Slot.make(self.layers, self._all.first, self.loss_fn if self.is_last else None, self.parameters,
                         self.shared.axes.weights == "stashed", self.seeds, self.autocast)

    def forward(self, micro_batch: int, inputs: Tensors) -> Tensors:
        self.in_flight.add(micro_batch)
        self.peak_in_flight = max(self.peak_in_flight, len(self.in_flight))
        return self.slots.take(micro_batch).forward(micro_batch, inputs, self.index > 0)

    def backward(self, micro_batch: int, outputs: Tensors | None, grads: Gradients) -> tuple[Tensors, Gradients | None]:
        slot = self.slots.taken[micro_batch]
        inputs = slot.inputs
        return inputs, slot.backward(grads)

    def loss_gradients(self, micro_batch: int, outputs: Tensors, labels: Any) -> tuple[Tensor, Gradients]:
        ends = leaves(outputs, True)
        with torch.enable_grad():
            loss = scalar_loss(self.slots.taken[micro_batch].loss_fn, ends, labels)
            if loss.requires_grad:
                backward(loss * self.scale if self.scale != 1 else loss, (torch.ones_like(loss),))
        return loss.detach(), input_gradients(ends)

    def count_staleness(self, micro_batch: int) -> None:
        """When the gradient is handed over, not before: others may do so in between."""

    def gradients(self, micro_batch: int) -> list[tuple[nn.Parameter, Tensor]]:
        """What the graph of ``micro_batch`` has for the weights; its slot is free then."""
        found = self.slots.taken[micro_batch].gradients()
        for _, grad in found:
            if grad.is_cuda:
                grad.record_stream(torch.cuda.current_stream(grad.device))
        self.slots.give_back(micro_batch)
        self.in_flight.discard(micro_batch)
        super().count_staleness(micro_batch)
        return found

    def hand_over(self, micro_batch: int) -> None:
        """Add them to the weights' ``.grad``."""
        for p, grad in self.gradients(micro_batch):
            if p.grad is None:
                p.grad = grad
            else:
                p.grad.add_(grad)

    def replicated(self) -> list[Tensor]:
        """What replicas have of their own where they drift: trained weights, and numbers that layers keep beside them."""
        modules = dict.fromkeys(m for layer in self.layers if isinstance(layer, nn.Module) for m in layer.modules())
        buffers = {id(b): b for m in modules for b in m.buffers(recurse=False) if b.is_floating_point()}
        return [*(p.data for p in self.trainable), *buffers.values()]

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), **({"replicated": self.replicated()} if self.drifts else {})}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        for tensor, saved in zip(self.replicated(), state.get("replicated", ())):
            tensor.copy_(saved)

    def give_up(self) -> None:
        """Forget whatever is in flight."""
        self.slots.clear()
        self.in_flight.clear()
        self._seen.clear()
        self._ends.clear()

    def kept(self) -> Iterator[Tensor]:
        for slot in list(self.slots.taken.values()):
            yield from as_tuple(slot.inputs)
            yield from as_tuple(slot.outputs)
