"""``recover: graph``: keep the autograd graph of the forward pass.

Plain backpropagation's way (1 forward, 1 backward: 3 units of work); under a delayed update the graph keeps its
activations and only notes of its weights (:mod:`ds_decoupled.stages.weights`).
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ds_decoupled.stages.layers import backward, input_gradients
from ds_decoupled.stages.segment import Segment
from ds_decoupled.stages.transport import Transport
from ds_decoupled.stages.weights import Saved, SavedActivation
from ds_decoupled.tensors import Gradients, Tensors, as_tuple, detach, leaves, to_device


@dataclass
class _Record:
    inputs: Tensors
    outputs: Tensors
    penalties: list[Tensor] = field(default_factory=list)
    saved: list[weakref.ref[Saved]] = field(default_factory=list)


class GraphSegment(Segment):
    """Forward with a graph, backward through it.

    Attributes:
        transport: what is added to the stage's own loss for its layers, if anything.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._records: dict[int, _Record] = {}
        self.transport: Transport | None = None

    def _run(self, micro_batch: int, inputs: Tensors) -> tuple[Tensors, list[Tensor]]:
        if self.transport is None:
            return self.layers.keep_input(inputs, micro_batch), []
        with self.transport.of(self.layers) as penalties:
            return self.layers.keep_input(inputs, micro_batch), penalties

    def forward(self, micro_batch: int, inputs: Tensors) -> Tensors:
        inputs = leaves(inputs, self.need_input_grad)
        saved: list[weakref.ref[Saved]] = []
        # A graph that held its weights would hold their old values: a copy of the model for every micro-batch in flight.
        with torch.enable_grad(), self.weights.by_reference(saved):
            outputs, penalties = self._run(micro_batch, inputs)
        self._records[micro_batch] = _Record(inputs, outputs, penalties, saved)
        return detach(outputs)

    def backward(self, micro_batch: int, outputs: Tensors | None, grads: Gradients) -> tuple[Tensors, Gradients]:
        record = self._records.pop(micro_batch)
        backward(record.outputs, grads)
        return detach(record.inputs), input_gradients(record.inputs)

    def relay(self, micro_batch: int, grads: Gradients, penalty: float = 0.0) -> Gradients:
        """The gradients that reach the input; the graph stays, and no parameter learns.

        Args:
            micro_batch: its number.
            grads: one per output tensor.
            penalty: what the layers' penalties count, 0 where the gradients are those of another stage's loss.
        """
        record = self._records[micro_batch]
        wanted = [t for t in as_tuple(record.inputs) if t.requires_grad]
        pairs = self._pairs(record, grads, penalty)
        if not wanted or not pairs:
            return self.nothing(micro_batch)
        found = iter(torch.autograd.grad([y for y, _ in pairs], wanted, [dy for _, dy in pairs], retain_graph=True,
                                         allow_unused=True))
        return tuple(next(found) if t.requires_grad else None for t in as_tuple(record.inputs))

    def nothing(self, micro_batch: int) -> Gradients:
        """What :meth:`relay` gives where nothing goes back."""
        return tuple(None for _ in as_tuple(self._records[micro_batch].inputs))

    def drop(self, micro_batch: int) -> None:
        """Nobody goes back through this micro-batch."""
        del self._records[micro_batch]

    def backward_to_weights(self, micro_batch: int, grads: Gradients, penalty: float = 0.0) -> None:
        """Add the parameters' gradients to ``.grad``; nobody wants the input's. Arguments as for :meth:`relay`."""
        record = self._records.pop(micro_batch)
        parameters = [p for p in self.weights.parameters if p.requires_grad]
        pairs = self._pairs(record, grads, penalty)
        if parameters and pairs:
            # inputs=: without it autograd would go on to the input, whose gradient was sent down already.
            torch.autograd.backward([y for y, _ in pairs], [dy for _, dy in pairs], inputs=parameters)

    @staticmethod
    def _pairs(record: _Record, grads: Gradients, penalty: float) -> list[tuple[Tensor, Tensor]]:
        """What goes back, and the gradient that it starts with."""
        pairs = [(y, dy.to(y.dtype)) for y, dy in zip(as_tuple(record.outputs), grads) if y.requires_grad and dy is not None]
        if penalty:
            pairs += [(p, torch.full_like(p, penalty)) for p in record.penalties if p.requires_grad]
        return pairs

    def kept(self) -> Iterator[Tensor]:
        for record in self._records.values():
            yield from as_tuple(record.inputs)
            yield from as_tuple(record.outputs)
            for saved in (reference() for reference in record.saved):
                if isinstance(saved, SavedActivation):
                    yield saved.tensor

    def state_dict(self) -> dict[int, Any]:
        state = {}
        for m, record in self._records.items():
            saved = []
            for reference in record.saved:
                kept = reference()
                # What the graph has let go already (a value that no backward needs) is not asked for again.
                saved.append(torch.empty(0) if kept is None else
                             kept.tensor.detach() if isinstance(kept, SavedActivation) else kept.as_dict())
            state[m] = {"inputs": detach(record.inputs), "saved": saved}
        return state

    def load_state_dict(self, state: dict[int, Any]) -> None:
        self._records.clear()
        device = self.layers.seeds.device
        for m, record in state.items():
            inputs = leaves(to_device(record["inputs"], device), self.need_input_grad)
            saved: list[weakref.ref[Saved]] = []
            # Not held(): batch norm would then save fewer tensors than the graph that was stored.
            with torch.enable_grad(), self.weights.replay(record["saved"], saved), self.layers.buffers.put_back():
                outputs, penalties = self._run(m, inputs)
            self._records[m] = _Record(inputs, outputs, penalties, saved)
