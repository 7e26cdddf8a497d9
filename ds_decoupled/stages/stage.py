"""A stage: the unit that is decoupled. Consecutive layers, their weights by version, and what is in flight."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from ds_decoupled.config import Axes
from ds_decoupled.errors import ConfigError
from ds_decoupled.stages.autocast import Autocast
from ds_decoupled.stages.buffers import Buffers
from ds_decoupled.stages.graph import GraphSegment
from ds_decoupled.stages.layers import Layer, Layers, backward, input_gradients
from ds_decoupled.stages.randomness import LayerSeeds
from ds_decoupled.stages.recompute import RecomputeSegment
from ds_decoupled.stages.reversible import ReversibleSegment, is_invertible
from ds_decoupled.stages.segment import Segment
from ds_decoupled.stages.split import DeferredWeightGradients
from ds_decoupled.stages.weights import Weights
from ds_decoupled.tensors import Gradients, Tensors, detach, leaves

LossFn = Callable[[Any, Any], Tensor]


@dataclass(frozen=True)
class LossResult:
    """What a stage with a loss gives: the loss (not scaled), its input, the gradients that reach it (None where nobody
    below heeds them), and its output, where another stage follows."""

    loss: Tensor
    inputs: Tensors
    grads: Gradients | None
    outputs: Tensors | None = None


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
        axes: the method.
        is_last: whether the loss is computed here.
        loss_fn: ``loss_fn(outputs, labels)``; None where the last layer gives the loss itself. Parameters of a module are the
            last stage's.
        seeds: the layers' random seeds.
        autocast: how the layers run.
        split_backward: put the weights' gradients off until :meth:`finish_backward`.
    """

    def __init__(self, index: int, layers: Sequence[Layer], first_layer: int, axes: Axes, is_last: bool,
                 loss_fn: LossFn | None, seeds: LayerSeeds, autocast: Autocast = Autocast(),  # noqa: B008  (frozen)
                 split_backward: bool = False) -> None:
        self.index = index
        self.is_last = is_last
        self.loss_fn = loss_fn
        self.seeds = seeds
        self.parameters = unique_parameters([*layers, loss_fn] if is_last else layers)
        self.weights = Weights(self.parameters, stashed=axes.weights == "stashed", predicted=axes.weights == "predicted")
        self.autocast = autocast
        self._all = Layers(layers, first_layer, seeds, autocast)
        self.segments = self._make_segments(layers, first_layer, axes)
        self.deferred = DeferredWeightGradients(layers) if split_backward else None
        self.in_flight: set[int] = set()
        self.peak_in_flight = 0

    def _make_segments(self, layers: Sequence[Layer], first_layer: int, axes: Axes) -> list[Segment]:
        if self.is_last:  # forward, loss and backward in one: nothing to recover
            return []
        if axes.recover != "reconstruct":
            kind = {"graph": GraphSegment, "input": RecomputeSegment}[axes.recover]
            return [kind(Layers(layers, first_layer, self.seeds, self.autocast), self.weights, self.index > 0)]
        runs: list[Segment] = []
        start = 0
        for invertible, group in groupby(layers, is_invertible):
            functions = list(group)
            part = Layers(functions, first_layer + start, self.seeds, self.autocast)
            runs.append((ReversibleSegment if invertible else RecomputeSegment)(part, self.weights, self.index > 0 or start > 0))
            start += len(functions)
        return runs

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
                x = run.forward(micro_batch, x)
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
                tensors, grads = run.backward(micro_batch, tensors, grads)
        self.weights.backward_done(micro_batch)
        assert tensors is not None
        return tensors, grads

    def loss_and_backward(self, micro_batch: int, inputs: Tensors, labels: Any, scale: float) -> LossResult:
        """The last stage's whole work on a micro-batch: forward, loss, and the backward of ``scale * loss``."""
        self.peak_in_flight = max(self.peak_in_flight, 1)
        kept = leaves(inputs, self.index > 0)
        with self.seeds.scope(), torch.enable_grad():
            loss = self.loss(self._all.keep_input(kept, micro_batch), labels)
            if loss.requires_grad:
                backward(loss * scale if scale != 1 else loss, (torch.ones_like(loss),))
        return LossResult(loss.detach(), detach(kept), input_gradients(kept))

    def finish_backward(self) -> None:
        """Compute the weights' gradients that were put off, if any."""
        if self.deferred is not None:
            self.deferred.run()

    def loss(self, outputs: Tensors, labels: Any) -> Tensor:
        """The scalar loss."""
        loss = self.loss_fn(outputs, labels) if self.loss_fn is not None else outputs
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise TypeError(f"the loss must be a tensor with one element; loss_fn of the pipeline module gave {loss!r:.80}")
        return loss

    # -- without records ------------------------------------------------------------------------------------------------

    def plain_forward(self, micro_batch: int, inputs: Tensors) -> Tensors:
        """The stage's output, recording nothing: for evaluation and for the exact gradient (grad mode is the caller's)."""
        with self.seeds.scope(), self.deferred.paused() if self.deferred is not None else nullcontext():
            return self._all.keep_input(inputs, micro_batch)

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
            yield from run.kept()

    def kept_bytes(self) -> int:
        """Bytes held for micro-batches in flight, each storage once."""
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in self.kept()}
        return sum(storages.values())

    def state_dict(self) -> dict[str, Any]:
        """What is in flight, and the weights' versions."""
        return {"runs": [run.state_dict() for segment in self.segments], "weights": self.weights.state_dict(),
                "in_flight": sorted(self.in_flight)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        self.weights.load_state_dict(state["weights"])
        with self.seeds.scope():
            for run, records in zip(self.segments, state["runs"]):
                run.load_state_dict(records)
        self.in_flight = set(state["in_flight"])


def check_reconstruct(any_reversible: bool, axes: Axes, layer_names: Sequence[Sequence[str]]) -> None:
    """``reconstruct`` with no layer that can be inverted is a mistake.

    Args:
        any_reversible: whether any stage of any rank has a layer that can be inverted.
        axes: the method.
        layer_names: the layers' types, by stage.

    Raises:
        ConfigError: naming the layers and what to take instead.
    """
    if axes.recover != "reconstruct" or any_reversible:
        return
    names = dict.fromkeys(name for stage in layer_names for name in stage)
    raise ConfigError("decoupled.recover", "reconstruct", f"no layer of this model can be inverted: {', '.join(names)}",
                      'Wrap residual functions in ds_decoupled.nn.ReversibleCoupling, give a layer an "inverse", '
                      'or take "recover": "input" (method "dsp")')
