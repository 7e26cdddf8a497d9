"""``gradient: local``: a stage learns from the loss of its own head, and from those of a window of stages above it.

The definition (decoupled greedy learning, arXiv 2106.06401; local parallelism, arXiv 2012.03837): with a window of n, stage s
learns from ``L_s + ... + L_{s+n-1}`` (or from the farthest of them alone), each taken through the stages between. What it
sends up is what its own loss saw. Of a loss above, its gradient comes down stage by stage and is passed on unchanged in
number: never a sum, because the stage below has another window.

A head learns from its own stage's loss alone, at the same update as the stage.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ds_decoupled.nn.heads import StageHead
from ds_decoupled.stages.graph import GraphSegment
from ds_decoupled.stages.stage import LossResult, Stage
from ds_decoupled.tensors import Gradients, Tensors, as_tuple, detach, leaves

_HEAD_SEED = 1 << 20  # past every layer's index


@dataclass
class _Waiting:
    """A micro-batch whose losses above have not all come."""

    grads: list[Tensor | None]
    head_grads: list[Tensor | None] = field(default_factory=list)


def _added(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


class LocalStage(Stage):
    """A stage with a loss of its own.

    Args:
        head: from the stage's output to what ``loss_fn`` takes; None on the last stage, and where nobody heeds its loss.
        window: stages whose losses reach a stage.
        above: stages above this one.
        farthest: learn from the farthest of them alone.

    Attributes:
        own_loss: the stage's copy of a ``loss_fn`` that has a state; it learns with the head.
        stopped: whether it learns no more, and forwards in evaluation mode.
    """

    def __init__(self, *args: Any, head: StageHead | None, window: int, above: int, farthest: bool,
                 **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.head, self.window, self.above, self.farthest = head, window, above, farthest
        self.own_loss: nn.Module | None = None
        self.stopped = False
        self._waiting: dict[int, _Waiting] = {}
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    @property
    def _graph(self) -> GraphSegment:
        run = self.segments[0]
        assert isinstance(run, GraphSegment)
        return run

    @property
    def head_parameters(self) -> list[nn.Parameter]:
        """The parameters of the head, and of the stage's own copy of the loss, that get gradients."""
        modules = [module for module in (self.head, self.own_loss) if module is not None]
        return [p for module in modules for p in module.parameters() if p.requires_grad]

    @property
    def trainable(self) -> list[nn.Parameter]:
        return [*super().trainable, *self.head_parameters]

    def give_loss(self, state: dict[str, Tensor]) -> None:
        """A copy of the loss for this stage alone, which starts from ``state``."""
        assert isinstance(self.loss_fn, nn.Module)
        self.own_loss = copy.deepcopy(self.loss_fn)
        self.own_loss.load_state_dict(state)
        for parameter in self.own_loss.parameters():
            parameter.use_muon = False  # type: ignore[attr-defined]  # as those of heads
        self.loss_fn = self.own_loss

    # -- training -----------------------------------------------------------------------------------------------------

    def head_forward(self, micro_batch: int, inputs: Tensors, labels: Any, scale: float) -> LossResult:
        """Forward, own loss, and its gradient to the input if the stage below heeds it; the graph waits for losses above."""
        outputs = self.forward(micro_batch, inputs)
        loss, grads, head_grads = self._own_loss(micro_batch, outputs, labels, scale)
        passed_on = self._graph.relay(micro_batch, grads) if self.index > 0 else None
        kept: list[Tensor | None] = [None] * len(grads) if self.farthest else list(grads)
        self._waiting[micro_batch] = _Waiting(kept, head_grads)
        return LossResult(loss, inputs, passed_on, outputs)

    def relay(self, micro_batch: int, grads: Gradients) -> Gradients | None:
        """The gradient of a loss above, to the input; kept for the sum too."""
        if not self.farthest:
            self._collect(micro_batch, grads)
        return self._graph.relay(micro_batch, grads) if self.index > 0 else None

    def backward(self, micro_batch: int, outputs: Tensors | None, grads: Gradients) -> tuple[Tensors, Gradients | None]:
        """The last loss above has come: add the gradients of all of them to ``.grad``."""
        self.in_flight.remove(micro_batch)
        self._collect(micro_batch, grads)
        waiting = self._waiting.pop(micro_batch)
        # At the top end a window is cut short, and the stage below heeds this loss too.
        heeded = self.index > 0 and min(self.window - 1, self.above) <= self.window - 2
        passed_on: Gradients | None = None
        with self.seeds.scope():
            if heeded:
                passed_on = self._graph.relay(micro_batch, grads)
            if self.stopped:
                self._graph.drop(micro_batch)
            else:
                self._graph.backward_to_weights(micro_batch, tuple(waiting.grads))
        self.weights.backward_done(micro_batch)
        if not self.stopped:
            for parameter, grad in zip(self.head_parameters, waiting.head_grads):
                parameter.grad = _added(parameter.grad, grad)
        return (), passed_on

    def loss_and_backward(self, micro_batch: int, inputs: Tensors, labels: Any, scale: float) -> LossResult:
        """A stage that no loss above reaches: all at once."""
        if self.is_last:
            result = super().loss_and_backward(micro_batch, inputs, labels, scale)
            return result if self.window > 1 else LossResult(result.loss, result.inputs, None)
        if self.stopped:
            return self._only_forward(micro_batch, inputs, labels)
        outputs = self.forward(micro_batch, inputs)
        self.in_flight.remove(micro_batch)
        loss, grads, head_grads = self._own_loss(micro_batch, outputs, labels, scale)
        self._graph.backward_to_weights(micro_batch, grads)
        self.weights.backward_done(micro_batch)
        for parameter, grad in zip(self.head_parameters, head_grads):
            parameter.grad = _added(parameter.grad, grad)
        return LossResult(loss, inputs, None, outputs)

    def loss(self, outputs: Tensors, labels: Any) -> Tensor:
        value = super().loss(outputs, labels)
        if torch.is_grad_enabled():
            self._note(outputs, labels, value)
        return value

    def _logits(self, outputs: Tensors) -> Tensor:
        assert self.head is not None
        with self.autocast.forward():
            logits: Tensor = self.head(outputs)
        return logits

    def _own_loss(self, micro_batch: int, outputs: Tensors, labels: Any,
                  scale: float) -> tuple[Tensor, Gradients, list[Tensor | None]]:
        """The head's loss, and its gradients: of the stage's output, and of the head's parameters."""
        assert self.head is not None
        ends = leaves(outputs, True)
        wanted = [t for t in as_tuple(ends) if t.requires_grad]
        with self.seeds.scope(), torch.enable_grad():
            self.seeds.set(_HEAD_SEED + self.index, micro_batch)
            loss = self.loss(self._logits(ends), labels)
        parameters = self.head_parameters
        found = torch.autograd.grad(loss * scale if scale != 1 else loss, [*wanted, *parameters], allow_unused=True)
        by_end = iter(found[:len(wanted)])
        at_ends = tuple(next(by_end) if t.requires_grad else None for t in as_tuple(ends))
        return loss.detach(), at_ends, list(found[len(wanted):])

    def _collect(self, micro_batch: int, grads: Gradients) -> None:
        if micro_batch not in self._waiting:  # its own loss is heeded by nobody
            self._waiting[micro_batch] = _Waiting([None] * len(grads))
        waiting = self._waiting[micro_batch]
        waiting.grads = [_added(a, b) for a, b in zip(waiting.grads, grads)]

    def _only_forward(self, micro_batch: int, inputs: Tensors, labels: Any) -> LossResult:
        assert self.head is not None
        with torch.no_grad():
            outputs = self.plain_forward(micro_batch, inputs)
            loss = self.loss(self._logits(outputs), labels)
        return LossResult(loss, inputs, None, detach(outputs))

    def stop(self) -> None:
        """Learn no more: from now on forward alone, in evaluation mode."""
        self.stopped = True
        for layer in (*self._all.functions, self.head, self.own_loss):
            if isinstance(layer, nn.Module):
                layer.eval()

    def vote(self, outputs: Tensors) -> Tensor:
        """The head's probabilities ``(..., classes)`` for what the stage gave in evaluation."""
        assert self.head is not None
        training = self.head.training
        with self.seeds.scope():
            self.head.eval()
            votes = self._logits(outputs).float().softmax(dim=-1)
        self.head.train(training)
        return votes

    # -- what it reports --------------------------------------------------------------------------------------------------

    def _note(self, outputs: Tensors, labels: Any, loss: Tensor) -> None:
        self._add("loss", loss.detach().float().reshape(()), 1)
        if isinstance(outputs, Tensor) and isinstance(labels, Tensor) and labels.shape == outputs.shape[:-1]:
            known = labels >= 0
            self._add("accuracy", ((outputs.detach().argmax(-1) == labels) & known).sum(), known.sum())

    def _add(self, name: str, value: Tensor, count: Any) -> None:
        total, number = self._sums.get(name, 0), self._counts.get(name, 0)
        self._sums[name], self._counts[name] = total + value, number + count

    def take_metrics(self) -> dict[str, float]:
        """Mean loss and accuracy of the head since the last call."""
        metrics = {name: float(value) / float(self._counts[name]) for name, value in self._sums.items() if self._counts[name]}
        self._sums.clear()
        self._counts.clear()
        return metrics

    # -- what is kept ------------------------------------------------------------------------------------------------------

    def kept(self) -> Iterator[Tensor]:
        yield from super().kept()
        for waiting in self._waiting.values():
            yield from (t for t in (*waiting.grads, *waiting.head_grads) if t is not None)

    def state_dict(self) -> dict[str, Any]:
        waiting = {m: (w.grads, w.head_grads) for m, w in self._waiting.items()}
        return {**super().state_dict(), "waiting": waiting, "stopped": self.stopped,
                "head": None if self.head is None else self.head.state_dict(),
                "loss_fn": None if self.own_loss is None else self.own_loss.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        device = self.seeds.device

        def placed(values: list[Tensor | None]) -> list[Tensor | None]:
            return [None if t is None else t.to(device) for t in values]

        self._waiting = {m: _Waiting(placed(grads), placed(head_grads)) for m, (grads, head_grads) in state["waiting"].items()}
        if self.head is not None:
            self.head.load_state_dict(state["head"])
        if self.own_loss is not None:
            self.own_loss.load_state_dict(state["loss_fn"])
        self.take_metrics()
        if state["stopped"]:
            self.stop()
