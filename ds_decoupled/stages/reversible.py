"""``recover: reconstruct``: keep nothing; rebuild the input from the output.

PETRA's and reversible backpropagation's way. A coupling with a fused ``reverse`` costs one forward and one backward in
the backward pass (4 units of work in all); a layer with an ``inverse`` alone is inverted and then run again (5 units).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from ds_decoupled.stages.buffers import Buffers
from ds_decoupled.stages.layers import backward, input_gradients
from ds_decoupled.stages.segment import Segment
from ds_decoupled.tensors import Gradients, Tensors, as_tuple, detach, leaves


@runtime_checkable
class Invertible(Protocol):
    """A layer that can be undone: ``inverse(outputs)`` gives the inputs, in the form that the layer takes them.

    A layer may also have ``reverse(outputs, grads) -> (inputs, input grads)``, which adds the parameters' gradients to
    ``.grad``; see :meth:`ds_decoupled.nn.ReversibleCoupling.reverse`. Whatever floating-point tensors it passes on beside what
    it inverts, their gradients go through it too: somebody below may have made them.
    """

    def inverse(self, outputs: Any) -> Any: ...


def is_invertible(layer: Any) -> bool:
    """Whether ``layer`` brings an inverse."""
    return isinstance(layer, nn.Module) and isinstance(layer, Invertible)


class ReversibleSegment(Segment):
    """Forward without a graph and without a record; backward rebuilds layer by layer from the output."""

    wants_output = True
    _checked = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._inverted: dict[int, Buffers] = {}  # of layers that an inverse and then a forward pass run through

    def forward(self, micro_batch: int, inputs: Tensors) -> Tensors:
        # Looked at once, at the first micro-batch: a layer that writes into its input does so always.
        before = [t._version for t in as_tuple(inputs)]
        with torch.no_grad(), self.layers.buffers.held():
            outputs = self.layers(inputs, micro_batch)
        if not self._checked:
            self._checked = True
            if before != [t._version for t in as_tuple(inputs)]:
                raise RuntimeError(f"a reversible segment (layers from {self.layers.first}) changes its input in place; "
                                   "take in-place operations away from what a coupling's function is given")
        return outputs

    def backward(self, micro_batch: int, outputs: Tensors | None, grads: Gradients) -> tuple[Tensors, Gradients]:
        assert outputs is not None, "a reversible segment needs its output"
        tensors = outputs
        for index in reversed(range(len(self.layers.functions))):
            tensors, grads = self._undo(index, micro_batch, tensors, grads)
        return tensors, grads

    def kept(self) -> Iterator[Tensor]:
        """Nothing."""
        return iter(())

    def state_dict(self) -> dict[int, Any]:
        return {}

    def load_state_dict(self, state: dict[int, Any]) -> None:
        """There is nothing to load."""

    def _undo(self, index: int, micro_batch: int, outputs: Tensors, grads: Gradients) -> tuple[Tensors, Gradients]:
        layer: Any = self.layers.functions[index]
        self.layers.seeds.set(self.layers.first + index, micro_batch)
        if hasattr(layer, "reverse"):
            with self.layers.autocast.forward():
                return layer.reverse(outputs, grads)
        # Made here, because most layers have a fused reverse and need none.
        if index not in self._inverted:
            self._inverted[index] = Buffers([layer])
        with torch.no_grad(), self.layers.autocast.forward(), self._inverted[index].held():
            rebuilt = detach(layer.inverse(outputs))
        self.layers.seeds.set(self.layers.first + index, micro_batch)
        inputs = leaves(rebuilt, True)
        with torch.enable_grad(), self.layers.autocast.forward():
            again = layer(inputs)
        backward(again, grads)
        return rebuilt, input_gradients(inputs)
