"""Running layers one after the other, each with its own seed, on inputs that they may not change."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ds_decoupled.stages.autocast import Autocast
from ds_decoupled.stages.buffers import Buffers
from ds_decoupled.stages.randomness import LayerSeeds
from ds_decoupled.tensors import Gradients, Tensors, as_tuple, map_tensors

Layer = Callable[[Any], Any]
Listener = Callable[[Layer, Any, Any], None]


@dataclass
class Layers:
    """Consecutive layers of one stage.

    Attributes:
        functions: the layers.
        first: the first one's index in the whole model.
        seeds: their random seeds.
        autocast: how they run.
        buffers: what they keep beside their weights.
        listeners: are told of every layer that runs: it, what it was given, and what it made.
    """

    functions: Sequence[Layer]
    first: int
    seeds: LayerSeeds
    autocast: Autocast = Autocast()
    buffers: Buffers = field(init=False)
    listeners: list[Listener] = field(init=False, default_factory=list)
    _copy_input: bool | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.buffers = Buffers(self.functions)

    def __call__(self, inputs: Tensors, micro_batch: int) -> Tensors:
        """The last layer's output."""
        x: Any = inputs
        with self.autocast.forward():
            for index, layer in enumerate(self.functions, self.first):
                self.seeds.set(index, micro_batch)
                given, x = x, layer(x)
                for listener in self.listeners:
                    listener(layer, given, x)
        as_tuple(x)
        return x

    @contextmanager
    def listening(self, listener: Listener) -> Iterator[None]:
        """Within, ``listener`` is told of every layer that runs."""
        self.listeners.append(listener)
        try:
            yield
        finally:
            self.listeners.remove(listener)

    def keep_input(self, inputs: Tensors, micro_batch: int) -> Tensors:
        """:meth:`__call__`, leaving ``inputs`` as they are even if the first layer works in place.

        The first call finds out, on a copy, whether it does; only then are later inputs copied.
        """
        # To copy every input would cost time and memory for the sake of the few models that begin with an in-place layer.
        if self._copy_input is not None:
            return self(map_tensors(Tensor.clone, inputs) if self._copy_input else inputs, micro_batch)
        copies = map_tensors(Tensor.clone, inputs)
        before = [t._version for t in as_tuple(copies)]
        outputs = self(copies, micro_batch)
        self._copy_input = before != [t._version for t in as_tuple(copies)]
        return outputs


def backward(outputs: Tensors, grads: Gradients) -> None:
    """Backpropagate ``grads`` from ``outputs``; pairs without a graph or without a gradient are left out."""
    pairs = [(y, dy) for y, dy in zip(as_tuple(outputs), grads) if y.requires_grad and dy is not None]
    if pairs:
        torch.autograd.backward([y for y, _ in pairs], [dy.to(y.dtype) for y, dy in pairs])


def input_gradients(inputs: Tensors) -> Gradients:
    """What the leaves have collected; None where nothing reached one."""
    return tuple(t.grad if t.requires_grad else None for t in as_tuple(inputs))


def scalar_loss(loss_fn: Callable[[Any, Any], Tensor] | None, outputs: Any, labels: Any) -> Tensor:
    """``loss_fn(outputs, labels)``; ``outputs`` where there is none. Raises TypeError for what is no scalar."""
    loss = loss_fn(outputs, labels) if loss_fn is not None else outputs
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise TypeError(f"the loss must be a tensor with one element; loss_fn of the pipeline module gave {loss!r:.80}")
    return loss
