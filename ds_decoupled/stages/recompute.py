"""``recover: input``: keep the input alone and run the forward again in the backward pass.

Diversely stale parameters' and activation checkpointing's way (2 forwards, 1 backward: 4 units of work).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ds_decoupled.stages.layers import backward, input_gradients
from ds_decoupled.stages.segment import Segment
from ds_decoupled.tensors import Gradients, Tensors, as_tuple, detach, leaves, to_device


class RecomputeSegment(Segment):
    """Forward without a graph; backward runs the forward again on the kept input, with the weights that it finds."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._inputs: dict[int, Tensors] = {}

    def forward(self, micro_batch: int, inputs: Tensors) -> Tensors:
        # Not a copy: keep_input leaves the tensor as it is, even under a first layer that works in place.
        self._inputs[micro_batch] = detach(inputs)
        with torch.no_grad(), self.layers.buffers.held():
            return self.layers.keep_input(inputs, micro_batch)

    def backward(self, micro_batch: int, outputs: Tensors | None, grads: Gradients) -> tuple[Tensors, Gradients]:
        kept = self._inputs.pop(micro_batch)
        inputs = leaves(kept, self.need_input_grad)
        with torch.enable_grad():
            again = self.layers.keep_input(inputs, micro_batch)
        backward(again, grads)
        return kept, input_gradients(inputs)

    def kept(self) -> Iterator[Tensor]:
        for inputs in self._inputs.values():
            yield from as_tuple(inputs)

    def state_dict(self) -> dict[int, Any]:
        return dict(self._inputs)

    def load_state_dict(self, state: dict[int, Any]) -> None:
        self._inputs = {m: to_device(inputs, self.layers.seeds.device) for m, inputs in state.items()}
