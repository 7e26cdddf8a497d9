"""A stage: the unit that is decoupled. Consecutive layers, their weights by version, and what is in flight."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import groupby
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ds_decoupled.config import AuxNetSettings, Axes
from ds_decoupled.schedules import Kind, Slot
from ds_decoupled.stages.autocast import Autocast
from ds_decoupled.stages.buffers import Buffers
from ds_decoupled.stages.graph import GraphSegment
from ds_decoupled.stages.layers import Layer, Layers, Listener, backward, input_gradients, scalar_loss
from ds_decoupled.stages.lesson import Lesson
from ds_decoupled.stages.outcome import Outcome
from ds_decoupled.stages.randomness import LayerSeeds
from ds_decoupled.stages.recompute import RecomputeSegment
from ds_decoupled.stages.reversible import ReversibleSegment, is_invertible
from ds_decoupled.stages.segment import Segment, SegmentObserver
from ds_decoupled.stages.split import DeferredWeightGradients
from ds_decoupled.stages.weights import Weights
from ds_decoupled.tensors import Gradients, Tensors, detach, leaves

LossFn = Callable[[Any, Any], Tensor]


@dataclass(frozen=True)
class Shared:
    """What all stages of a rank are made with.

    Attributes:
        axes: the method.
        stages: J.
        loss_fn: ``loss_fn(outputs, labels)``; None where the last layer gives the loss itself. Parameters of a module are the
            last stage's.
        seeds: the layers' random seeds.
        autocast: how the layers run.
        farthest: whether a stage with losses of a window learns from the farthest of them alone.
        transport: factor of the penalty on what residual layers add, in a stage's own loss.
        auxnet: how inputs are generated, where they are.
        additional_losses: the module's losses beside the one that is learned from, by name, after a forward pass; None for none
            (:meth:`PipelineModule.get_additional_losses`). They are reported.
    """

    axes: Axes
    stages: int
    loss_fn: LossFn | None
    seeds: LayerSeeds
    autocast: Autocast = Autocast()
    farthest: bool = False
    transport: float = 0.0
    auxnet: AuxNetSettings = AuxNetSettings()
    additional_losses: Callable[[], Mapping[str, Tensor] | None] = lambda: None


def unique_parameters(layers: Sequence[Any]) -> list[nn.Parameter]:
    """The parameters of ``layers``, each once, in order."""
    seen: dict[int, nn.Parameter] = {}
    for layer in layers:
        if isinstance(layer, nn.Module):
            seen.update((id(p), p) for p in layer.parameters())
    return list(seen.values())


class Stage:
    """One stage.

    Args:
        index: its number, 0..J-1.
        layers: its layers; each takes and returns a tensor or a tuple of tensors.
        first_layer: the first one's index in the whole model.
        shared: what all stages of the rank are made with.
        split_backward: put the weights' gradients off until :meth:`finish_backward`.

    Attributes:
        handlers: what it does in an action of each kind: the name of a method of ``(micro_batch, *parts of what the action
            takes)`` that gives an :class:`Outcome`. A subclass overrides methods, and adds rows for kinds of its own.
        scale: of a micro-batch's loss: 1/k.
        returns_input: whether the stage below wants its output back, beside its gradient.
        observers: are told what goes through its segments.
        stopped: whether it learns no more, and forwards in evaluation mode.
        lesson: its part in teaching heads before anybody learns from them; None for none.
    """

    handlers: ClassVar[Mapping[Kind, str]] = {
        Kind.LOAD: "on_load", Kind.FORWARD: "on_forward", Kind.LOSS: "on_loss", Kind.BACKWARD: "on_backward",
        Kind.RECOMPUTE: "on_backward", Kind.RECONSTRUCT: "on_backward", Kind.WEIGHTS: "on_weights", Kind.UPDATE: "on_update"}

    def __init__(self, index: int, layers: Sequence[Layer], first_layer: int, shared: Shared,
                 split_backward: bool = False) -> None:
        self.index, self.shared = index, shared
        self.is_last = index == shared.stages - 1
        self.loss_fn = shared.loss_fn
        self.seeds, self.autocast = shared.seeds, shared.autocast
        self.parameters = unique_parameters([*layers, self.loss_fn] if self.is_last else layers)
        self.weights = Weights(self.parameters, stashed=shared.axes.weights == "stashed",
                               predicted=shared.axes.weights == "predicted")
        self._all = Layers(layers, first_layer, self.seeds, self.autocast)
        self.segments = self._make_segments(layers, first_layer, shared.axes)
        self.deferred = DeferredWeightGradients(layers) if split_backward else None
        self.in_flight: set[int] = set()
        self.peak_in_flight = 0
        self.scale = 1.0
        self.returns_input = False
        self.observers: list[SegmentObserver] = []
        self.stopped = False
        self.lesson: Lesson | None = None

    def _make_segments(self, layers: Sequence[Layer], first_layer: int, axes: Axes) -> list[Segment]:
        if self.is_last:  # forward, loss and backward in one: nothing to recover
            return []
        if axes.recover != "reconstruct":
            kind = {"graph": GraphSegment, "input": RecomputeSegment}[axes.recover]
            return [kind(Layers(layers, first_layer, self.seeds, self.autocast), self.weights, self.index > 0)]
        segments: list[Segment] = []
        start = 0
        for invertible, group in groupby(layers, is_invertible):
            functions = list(group)
            part = Layers(functions, first_layer + start, self.seeds, self.autocast)
            kind = ReversibleSegment if invertible else RecomputeSegment
            segments.append(kind(part, self.weights, self.index > 0 or start > 0))
            start += len(functions)
        return segments

    @property
    def wants_output(self) -> bool:
        """Whether :meth:`backward` must be given the stage's output, because its last layers reconstruct from it."""
        return bool(self.segments) and self.segments[-1].wants_output

    @property
    def reversible(self) -> bool:
        """Whether any layer can be undone."""
        return any(map(is_invertible, self._all.functions))

    @property
    def trainable(self) -> list[nn.Parameter]:
        """The parameters that get gradients."""
        return [p for p in self.parameters if p.requires_grad]

    # -- training -----------------------------------------------------------------------------------------------------

    def forward(self, micro_batch: int, inputs: Tensors) -> Tensors:
        """The stage's output; whatever the backward pass will need of ``micro_batch`` is recorded."""
        with self.seeds.scope(), self.weights.ahead():
            x = inputs
            for segment in self.segments:
                given, x = x, segment.forward(micro_batch, x)
                for observer in self.observers:
                    observer.went_forward(segment, micro_batch, given)
        self.weights.forward_done(micro_batch)
        self.in_flight.add(micro_batch)
        self.peak_in_flight = max(self.peak_in_flight, len(self.in_flight))
        return x

    def backward(self, micro_batch: int, outputs: Tensors | None, grads: Gradients) -> tuple[Tensors, Gradients | None]:
        """Add the parameters' gradients to ``.grad``; return the input (kept or rebuilt) and the gradients that reach it."""
        self.in_flight.remove(micro_batch)
        tensors = outputs
        with self.seeds.scope(), self.weights.of(micro_batch):
            for segment in reversed(self.segments):
                tensors, grads = segment.backward(micro_batch, tensors, grads)
                for observer in self.observers:
                    observer.went_back(segment, micro_batch, tensors)
        self.weights.backward_done(micro_batch)
        assert tensors is not None
        return tensors, grads

    def loss_and_backward(self, micro_batch: int, inputs: Tensors, labels: Any) -> tuple[Tensor, Tensors, Gradients]:
        """The last stage's whole work on a micro-batch: forward, loss, and the backward of ``scale * loss``.

        Returns:
            The loss (not scaled, without penalties; the additional ones behind it), the input, and the gradients that reach it.
        """
        self.peak_in_flight = max(self.peak_in_flight, 1)
        kept = leaves(inputs, self.index > 0)
        with self.seeds.scope(), torch.enable_grad():
            outputs, penalties = self._whole(kept, micro_batch)
            loss = self.loss(outputs, labels)
            learned = sum(penalties, loss)
            if learned.requires_grad:
                backward(learned * self.scale if self.scale != 1 else learned, (torch.ones_like(learned),))
        return self._with_additional(loss.detach()), detach(kept), input_gradients(kept)

    def _whole(self, inputs: Tensors, micro_batch: int) -> tuple[Tensors, list[Tensor]]:
        """Through all layers, with a graph; and what is added to the loss for them."""
        return self._all.keep_input(inputs, micro_batch), []

    def _with_additional(self, loss: Tensor) -> Tensor:
        additional = self.shared.additional_losses()
        if not additional:
            return loss
        return torch.stack([value.detach().float().reshape(()) for value in (loss, *additional.values())])

    def finish_backward(self) -> None:
        """Compute the weights' gradients that were put off, if any."""
        if self.deferred is not None:
            self.deferred.run()

    # -- what it does in an action ----------------------------------------------------------------------------------------

    def act(self, kind: Kind, micro_batch: int, *parts: Any) -> Outcome:
        """Do what an action of ``kind`` is to this stage; ``parts`` are those of the message that it takes."""
        if kind not in self.handlers:
            raise TypeError(f"{type(self).__name__} has no handler for {kind.name} ({kind.letter})")
        outcome: Outcome = getattr(self, self.handlers[kind])(micro_batch, *parts)
        return outcome

    def on_load(self, micro_batch: int, inputs: Tensors, labels: Any) -> Outcome:
        """The raw batch is the first stage's input."""
        return Outcome({Slot.INPUT: (inputs, labels)}, inputs=inputs)

    def on_forward(self, micro_batch: int, inputs: Tensors, labels: Any) -> Outcome:
        """The labels travel along."""
        return Outcome({Slot.OUTPUT: (self.forward(micro_batch, inputs), labels)}, inputs=inputs)

    def on_loss(self, micro_batch: int, inputs: Tensors, labels: Any) -> Outcome:
        """Forward, loss and backward in one."""
        loss, inputs, grads = self.loss_and_backward(micro_batch, inputs, labels)
        return Outcome(self.down(grads, inputs, loss), loss, complete=self.deferred is None, inputs=inputs)

    def on_backward(self, micro_batch: int, grads: Gradients, outputs: Tensors | None, loss: Tensor) -> Outcome:
        """Back through the stage."""
        inputs, input_grads = self.backward(micro_batch, outputs, grads)
        return Outcome(self.down(input_grads, inputs, loss), loss, complete=self.deferred is None, inputs=inputs)

    def on_weights(self, micro_batch: int) -> Outcome:
        """The second half of a backward pass."""
        self.finish_backward()
        return Outcome(complete=True)

    def on_update(self, update: int) -> Outcome:
        """The k-th gradient is there."""
        if not self.stopped:
            self.weights.before_update()
        return Outcome(steps=not self.stopped)

    def down(self, grads: Gradients | None, inputs: Tensors, loss: Tensor) -> dict[Slot, tuple[Any, ...]]:
        """What goes to the stage below, if there is one and gradients reach it."""
        if self.index == 0 or grads is None:
            return {}
        return {Slot.INPUT_GRADIENT: (grads, inputs if self.returns_input else None, loss)}

    # -- the parts of it --------------------------------------------------------------------------------------------------

    def stop(self) -> None:
        """Learn no more: from now on forward alone, in evaluation mode."""
        self.stopped = True
        self.train_mode()

    def follow(self, schedule: Callable[[], float]) -> None:
        """What learns in it beside its layers goes by ``schedule``: where the stage's rate is, as a part of its peak."""

    def train_mode(self) -> None:
        """To be called once the module is in training mode: what has stopped goes back to evaluation."""
        if self.stopped:
            for module in self.modules():
                module.eval()

    def modules(self) -> Iterator[nn.Module]:
        """Its layers and whatever else it owns that is a module."""
        yield from (layer for layer in self._all.functions if isinstance(layer, nn.Module))

    @property
    def head_parameters(self) -> list[nn.Parameter]:
        """Those of a head of its own that get gradients."""
        return []

    def votes(self, outputs: Tensors) -> list[Tensor]:
        """What a head of its own says of ``outputs`` in evaluation: probabilities ``(..., classes)``; nothing without one."""
        return []

    def take_metrics(self) -> dict[str, float] | None:
        """Means since the last call (loss and accuracy by its own loss, or what else it has of its own); None for nothing."""
        return None

    def report(self) -> dict[str, Any]:
        """What it has to tell of the run, beside what every stage has."""
        return {}

    def loss(self, outputs: Tensors, labels: Any) -> Tensor:
        """The scalar loss."""
        return scalar_loss(self.loss_fn, outputs, labels)

    @property
    def serial(self) -> bool:
        """Whether generated inputs have come to their end, where stages had them."""
        return False

    # -- without records ------------------------------------------------------------------------------------------------

    def plain_forward(self, micro_batch: int, inputs: Tensors) -> Tensors:
        """The stage's output, recording nothing: for evaluation and for the exact gradient (grad mode is the caller's)."""
        with self.seeds.scope(), self.deferred.paused() if self.deferred is not None else nullcontext():
            return self._all.keep_input(inputs, micro_batch)

    def generate(self, micro_batch: int, inputs: Tensors) -> Tensors:
        """What a small network in its place gives, in evaluation."""
        raise TypeError(f"{type(self).__name__} generates nothing")

    @contextmanager
    def listening(self, listener: Listener) -> Iterator[None]:
        """Within, :meth:`plain_forward` tells ``listener`` of every layer that runs."""
        with self._all.listening(listener):
            yield

    @property
    def buffers(self) -> Buffers:
        """What its layers keep beside their weights."""
        return self._all.buffers

    @property
    def layers(self) -> Sequence[Layer]:
        """Its layers."""
        return self._all.functions

    @property
    def layer_names(self) -> list[str]:
        """The layers' types, for messages."""
        return [type(layer).__name__ if isinstance(layer, nn.Module) else getattr(layer, "__name__", repr(layer))
                for layer in self._all.functions]

    # -- what is kept ------------------------------------------------------------------------------------------------------

    def kept(self) -> Iterator[Tensor]:
        """Every tensor held for micro-batches in flight."""
        for segment in self.segments:
            yield from segment.kept()

    def state_dict(self) -> dict[str, Any]:
        """What is in flight, and the weights' versions."""
        return {"segments": [segment.state_dict() for segment in self.segments], "weights": self.weights.state_dict(),
                "in_flight": sorted(self.in_flight)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        self.weights.load_state_dict(state["weights"])
        with self.seeds.scope():
            for segment, records in zip(self.segments, state["segments"]):
                segment.load_state_dict(records)
        self.in_flight = set(state["in_flight"])
