"""Slots: for each graph in flight copies of a stage's layers, whose weights are the stage's own.

Threads that go forward and back at the same time cannot share modules. One leaf with two graphs has one ``.grad``, into which
two backward threads would add at once; and an optimizer that steps on a leaf which a live graph has saved makes that graph
useless (its version counter moved). So every graph has leaves of its own: copies of the modules whose parameters are other
tensors over the same memory. What an update writes is what every graph finds, no graph notices, and nothing is copied. Buffers
are shared as they are.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ds_decoupled.stages.autocast import Autocast
from ds_decoupled.stages.layers import Layer, Layers, backward, input_gradients
from ds_decoupled.stages.randomness import LayerSeeds
from ds_decoupled.tensors import Gradients, Tensors, detach, leaves


class Unseeded(LayerSeeds):
    """Layers draw from the generators as they stand: a seed for each layer would be overwritten by another thread's."""

    @contextmanager
    def scope(self) -> Iterator[None]:
        yield

    def set(self, layer: int, micro_batch: int) -> None:
        """Nothing is seeded."""


@dataclass
class Slot:
    """A stage's layers for one graph.

    Attributes:
        layers: the copies.
        loss_fn: likewise.
        twins: each parameter of the stage with its copy here.
        buffers: modules here, with the stage's own: a layer may replace a buffer where it should write to it.
        own_values: whether the copies keep the values of the forward pass, and do not follow updates.
    """

    layers: Layers
    loss_fn: Any
    twins: list[tuple[nn.Parameter, nn.Parameter]]
    buffers: list[tuple[nn.Module, nn.Module]]
    own_values: bool
    inputs: Tensors = field(default=(), init=False)
    outputs: Tensors = field(default=(), init=False)

    @staticmethod
    def make(layers: Sequence[Layer], first_layer: int, loss_fn: Any, parameters: Sequence[nn.Parameter], own_values: bool,
             seeds: LayerSeeds, autocast: Autocast) -> Slot:
        """Copies of ``layers``, and of a ``loss_fn`` that is a module; for the other arguments see :class:`Slot`."""
        memo: dict[int, Any] = {}
        twins = []
        for p in parameters:
            # .data: a tensor of its own, with a version counter of its own, over the same memory.
            twin = nn.Parameter(p.data.clone() if own_values else p.data, requires_grad=p.requires_grad)
            memo[id(p)] = twin
            twins.append((p, twin))
        originals = [layer for layer in (*layers, loss_fn) if isinstance(layer, nn.Module)]
        memo.update((id(buffer), buffer) for layer in originals for buffer in layer.buffers())
        copies = [copy.deepcopy(layer, memo) if isinstance(layer, nn.Module) else layer for layer in layers]
        loss = copy.deepcopy(loss_fn, memo) if isinstance(loss_fn, nn.Module) else loss_fn
        made = [layer for layer in (*copies, loss) if isinstance(layer, nn.Module)]
        buffers = [(ours, theirs) for one, other in zip(made, originals)
                   for ours, theirs in zip(one.modules(), other.modules()) if theirs._buffers]
        unseeded = Unseeded(seeds.base, seeds.replica, seeds.device)
        return Slot(Layers(copies, first_layer, unseeded, autocast), loss, twins, buffers, own_values)

    def forward(self, micro_batch: int, inputs: Tensors, need_input_grad: bool) -> Tensors:
        """The outputs, without the graph, which stays here."""
        for p, twin in self.twins:
            if self.own_values:
                twin.data.copy_(p.data)
            elif twin.data_ptr() != p.data_ptr():  # an optimizer flattens them, a checkpoint replaces them
                twin.data = p.data
        self.inputs = leaves(inputs, need_input_grad)
        with torch.enable_grad():
            self.outputs = self.layers.keep_input(self.inputs, micro_batch)
        for ours, theirs in self.buffers:
            for name, buffer in theirs._buffers.items():
                moved = ours._buffers[name]
                if moved is not buffer:  # replaced, not written to
                    if buffer is None or moved is None:
                        theirs._buffers[name] = moved
                    else:
                        buffer.data.copy_(moved)
                        ours._buffers[name] = buffer
        return detach(self.outputs)

    def backward(self, grads: Gradients) -> Gradients:
        """The gradients that reach the input; those of the weights are the copies' own, until :meth:`gradients` takes them."""
        backward(self.outputs, grads)
        found = input_gradients(self.inputs)
        self.inputs = self.outputs = ()
        return found

    def gradients(self) -> list[tuple[nn.Parameter, Tensor]]:
        """The stage's parameters with what this graph has for them, which is taken away; none for what was not used."""
        found = []
        for p, twin in self.twins:
            if twin.grad is not None:
                found.append((p, twin.grad))
                twin.grad = None
        return found

    def clear(self) -> None:
        """What was begun here is given up."""
        self.inputs = self.outputs = ()
        self.gradients()


class Slots:
    """The free slots of a stage; they are made when they are first needed, so that what was done to the layers before holds.

    Args:
        make: a new one.
    """

    def __init__(self, make: Callable[[], Slot]) -> None:
        self._make, self._lock = make, threading.Lock()
        self._free: list[Slot] = []
        self.taken: dict[int, Slot] = {}

    def take(self, micro_batch: int) -> Slot:
        """One for ``micro_batch``."""
        with self._lock:
            slot = self._free.pop() if self._free else None
        if slot is None:
            slot = self._make()
        self.taken[micro_batch] = slot
        return slot

    def give_back(self, micro_batch: int) -> None:
        """Nothing of it is needed any more."""
        slot = self.taken.pop(micro_batch)
        with self._lock:
            self._free.append(slot)

    def clear(self) -> None:
        """Everything that was begun is given up."""
        for micro_batch in list(self.taken):
            self.taken[micro_batch].clear()
            self.give_back(micro_batch)
