"""A segment: consecutive layers of a stage that go back in the same way."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from ds_decoupled.stages.layers import Layers
from ds_decoupled.stages.weights import Weights
from ds_decoupled.tensors import Gradients, Tensors


class SegmentObserver:
    """Is told what goes into the segments of a stage, and what they find of it again; see ``Stage.observers``."""

    def went_forward(self, segment: Segment, micro_batch: int, inputs: Tensors) -> None:
        """``segment`` went forward on ``inputs``."""

    def went_back(self, segment: Segment, micro_batch: int, inputs: Tensors) -> None:
        """``segment`` went back; ``inputs`` are what it kept, or rebuilt."""


class Segment(ABC):
    """How consecutive layers go forward and back.

    Args:
        layers: the layers.
        weights: the stage's weights, by version.
        need_input_grad: False for the model's very first layers, whose input is data.
    """

    #: Whether ``backward`` must be given the segment's output.
    wants_output = False

    def __init__(self, layers: Layers, weights: Weights, need_input_grad: bool) -> None:
        self.layers = layers
        self.weights = weights
        self.need_input_grad = need_input_grad

    @abstractmethod
    def forward(self, micro_batch: int, inputs: Tensors) -> Tensors:
        """The outputs, without a graph."""

    @abstractmethod
    def backward(self, micro_batch: int, outputs: Tensors | None, grads: Gradients) -> tuple[Tensors, Gradients]:
        """The input (kept or rebuilt) and the gradients that reach it; parameters' gradients are added to ``.grad``.

        Args:
            micro_batch: its number.
            outputs: the segment's output, where :attr:`wants_output`.
            grads: one per output tensor.
        """

    @abstractmethod
    def kept(self) -> Iterator[Tensor]:
        """Every tensor that the segment holds for micro-batches in flight."""

    @abstractmethod
    def state_dict(self) -> dict[int, Any]:
        """What is in flight, by micro-batch."""

    @abstractmethod
    def load_state_dict(self, state: dict[int, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
