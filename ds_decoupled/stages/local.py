"""``gradient: local``: a stage learns from the loss of its own head, and from those of a window of stages above it.

The definition (decoupled greedy learning, arXiv 2106.06401; local parallelism, arXiv 2012.03837): with a window of n, stage s
learns from ``L_s + ... + L_{s+n-1}`` (or from the farthest of them alone), each taken through the stages between. What it
sends up is what its own loss saw. Of a loss above, its gradient comes down stage by stage and is passed on unchanged in
number: never a sum, because the stage below has another window.

One micro-batch with a window of 2, J = 4 (actions as in :mod:`ds_decoupled.schedules.kinds`; ``==`` is an activation, ``<-`` a
gradient of the loss that stands behind it)::

                stage 0          stage 1          stage 2          stage 3
    forward     H == output ===> H == output ===> H == output ===> X
    own loss    L_0              L_1              L_2              L_3
    L_1         B <- L_1 ------- H
    L_2                          B <- L_2 ------- H
    L_3                                           B <- L_3 ------- X
    learns from L_0 + L_1        L_1 + L_2        L_2 + L_3        L_3

With a window of 3, stage 1 has two stages above it within reach, and a gradient passes through it to stage 0 without being its
last: that is ``G``, a relay. Between ``H`` and ``B`` a stage keeps its graph, and the gradients that have come so far.

A head learns from its own stage's loss alone, at the same update as the stage. Where heads are taught first
(:mod:`ds_decoupled.stages.lesson`), stages that would learn from one forward alone meanwhile, and what comes down to them is
empty.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ds_decoupled.nn.heads import StageHead, one_tensor
from ds_decoupled.nn.reconstruction import reconstruction_loss
from ds_decoupled.schedules import Kind, Slot
from ds_decoupled.stages.graph import GraphSegment
from ds_decoupled.stages.means import Means
from ds_decoupled.stages.outcome import Outcome
from ds_decoupled.stages.stage import Stage
from ds_decoupled.stages.transport import Transport
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

    Attributes:
        head: from the stage's output to what ``loss_fn`` takes; None on the last stage, and where nobody learns from its loss.
            It is given once shapes are known (:mod:`ds_decoupled.stages.heads`).
        window: stages whose losses reach a stage.
        above: stages above this one.
        own_loss: the stage's copy of a ``loss_fn`` that has a state; it learns with the head.
        transport: the penalty that is part of its own loss, and goes wherever that goes; None for none.
    """

    handlers = {**Stage.handlers, Kind.HEAD: "on_head", Kind.RELAY: "on_relay"}

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.window, self.farthest = self.shared.axes.window, self.shared.farthest
        self.above = self.shared.stages - 1 - self.index
        self.head: StageHead | None = None
        self.own_loss: nn.Module | None = None
        self.transport = Transport(self.shared.transport) if self.shared.transport else None
        self._entry: Tensor | None = None
        if not self.is_last:
            self._graph.transport = self.transport
        self._waiting: dict[int, _Waiting] = {}
        self._means = Means()

    @property
    def has_loss(self) -> bool:
        """Whether anybody learns from its loss."""
        return not self.farthest or self.index >= min(self.window, self.shared.stages) - 1

    @property
    def learns_from_head(self) -> bool:
        """Whether a loss that it learns from is a head's, not the model's own."""
        return not self.is_last and (not self.farthest or self.window <= self.above)

    @property
    def _graph(self) -> GraphSegment:
        segment = self.segments[0]
        assert isinstance(segment, GraphSegment)
        return segment

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

    def rebuild_input(self) -> None:
        """From now on its own loss is how well its head rebuilds its input; what the stage's labels are does not count."""
        self.loss_fn = reconstruction_loss
        if self.index == 0:  # ids cannot be rebuilt: the first layer's output stands for them
            for layers in (self._graph.layers, self._all):
                layers.listeners.append(self._note_entry)

    @property
    def rebuilds(self) -> bool:
        """Whether its head rebuilds its input."""
        return self.loss_fn is reconstruction_loss

    def _note_entry(self, layer: Any, given: Any, made: Any) -> None:
        if layer is self._all.functions[0]:
            self._entry = one_tensor(made).detach()

    def _target(self, inputs: Tensors, labels: Any) -> Any:
        """What the head's output is compared with."""
        if not self.rebuilds:
            return labels
        entry, self._entry = self._entry, None
        return one_tensor(inputs).detach() if entry is None else entry

    # -- training -----------------------------------------------------------------------------------------------------

    def on_forward(self, micro_batch: int, inputs: Tensors, labels: Any) -> Outcome:
        """Nobody learns from its own loss."""
        self._enter(micro_batch)
        return super().on_forward(micro_batch, inputs, labels)

    def _enter(self, micro_batch: int) -> bool:
        """Whether ``micro_batch``, which goes up now, belongs to the lesson."""
        return self.lesson is not None and self.lesson.enter(micro_batch, round(1 / self.scale))

    def _holds(self, micro_batch: int) -> bool:
        """Whether it learns nothing from ``micro_batch``, nor do the stages below."""
        return self.lesson is not None and self.lesson.holds(micro_batch)

    def on_head(self, micro_batch: int, inputs: Tensors, labels: Any) -> Outcome:
        """Forward, own loss, and its gradient to the input; the graph waits for losses above."""
        taught = self._enter(micro_batch)
        outputs = self.forward(micro_batch, inputs)
        loss, grads, head_grads = self._own_loss(micro_batch, outputs, self._target(inputs, labels))
        passed_on: Gradients | None = None
        if self.index > 0:  # whoever learns from the head below holds still as long as it is taught
            passed_on = self._graph.nothing(micro_batch) if taught else self._graph.relay(micro_batch, grads, self.scale)
        kept: list[Tensor | None] = [None] * len(grads) if self.farthest else list(grads)
        self._waiting[micro_batch] = _Waiting(kept, head_grads)
        return Outcome({Slot.OUTPUT: (outputs, labels), **self.down(passed_on, inputs, loss)}, loss, inputs=inputs)

    def on_relay(self, micro_batch: int, grads: Gradients, outputs: Tensors | None, loss: Tensor) -> Outcome:
        """The gradient of a loss above, passed on."""
        return Outcome(self.down(self.relay(micro_batch, grads), (), loss))

    def on_backward(self, micro_batch: int, grads: Gradients, outputs: Tensors | None, loss: Tensor) -> Outcome:
        """The farthest loss: all that this stage learns from is there."""
        outcome = super().on_backward(micro_batch, grads, outputs, loss)
        return replace(outcome, loss=None) if self.has_loss else outcome  # it reported its own

    def on_loss(self, micro_batch: int, inputs: Tensors, labels: Any) -> Outcome:
        """A stage that no loss above reaches: all at once."""
        if not self.is_last:
            return self._alone(micro_batch, inputs, labels)
        outcome = super().on_loss(micro_batch, inputs, labels)
        return outcome if self.window > 1 else replace(outcome, given={})  # a window of 1 ends at this stage

    def relay(self, micro_batch: int, grads: Gradients) -> Gradients | None:
        """The gradient of a loss above, to the input; kept for the sum too."""
        if self._holds(micro_batch):
            return self._graph.nothing(micro_batch) if self.index > 0 else None
        if not self.farthest:
            self._collect(micro_batch, grads)
        return self._graph.relay(micro_batch, grads) if self.index > 0 else None

    def backward(self, micro_batch: int, outputs: Tensors | None, grads: Gradients) -> tuple[Tensors, Gradients | None]:
        """The last loss above has come: add the gradients of all of them to ``.grad``."""
        self.in_flight.remove(micro_batch)
        self._collect(micro_batch, grads)
        waiting = self._waiting.pop(micro_batch)
        holds = self._holds(micro_batch)
        # At the top end a window is cut short, and the stage below learns from this loss too.
        reaches_below = self.index > 0 and min(self.window - 1, self.above) <= self.window - 2
        passed_on: Gradients | None = None
        with self.seeds.scope():
            if reaches_below:
                passed_on = self._graph.nothing(micro_batch) if holds else self._graph.relay(micro_batch, grads)
            if self.stopped or holds:
                self._graph.drop(micro_batch)
            else:
                self._graph.backward_to_weights(micro_batch, tuple(waiting.grads), 0.0 if self.farthest else self.scale)
        self.weights.backward_done(micro_batch)
        if not self.stopped:
            self._give_head(waiting.head_grads)
        if self.lesson is not None:
            self.lesson.leave(micro_batch)
        return (), passed_on

    def _give_head(self, grads: list[Tensor | None]) -> None:
        for parameter, grad in zip(self.head_parameters, grads):
            parameter.grad = _added(parameter.grad, grad)

    def _whole(self, inputs: Tensors, micro_batch: int) -> tuple[Tensors, list[Tensor]]:
        if self.transport is None:
            return super()._whole(inputs, micro_batch)
        with self.transport.of(self._all) as penalties:
            return self._all.keep_input(inputs, micro_batch), penalties

    def _alone(self, micro_batch: int, inputs: Tensors, labels: Any) -> Outcome:
        if self.stopped:
            return self._only_forward(micro_batch, inputs, labels)
        if self._enter(micro_batch):
            return self._teach_head(micro_batch, inputs, labels)
        outputs = self.forward(micro_batch, inputs)
        self.in_flight.remove(micro_batch)
        loss, grads, head_grads = self._own_loss(micro_batch, outputs, self._target(inputs, labels))
        self._graph.backward_to_weights(micro_batch, grads, self.scale)
        self.weights.backward_done(micro_batch)
        self._give_head(head_grads)
        return Outcome({Slot.OUTPUT: (outputs, labels)}, loss, complete=True, inputs=inputs)

    def _teach_head(self, micro_batch: int, inputs: Tensors, labels: Any) -> Outcome:
        """The stage holds still: forward, and the gradients of the head."""
        assert self.lesson is not None
        with torch.no_grad():
            outputs = detach(self.plain_forward(micro_batch, inputs))
        loss, _, head_grads = self._own_loss(micro_batch, outputs, labels)
        self._give_head(head_grads)
        self.lesson.leave(micro_batch)
        return Outcome({Slot.OUTPUT: (outputs, labels)}, loss, complete=True, inputs=inputs)

    def on_update(self, update: int) -> Outcome:
        """The k-th gradient is there."""
        if self.lesson is not None:
            self.lesson.updated(round(1 / self.scale))
        return super().on_update(update)

    def loss(self, outputs: Tensors, labels: Any) -> Tensor:
        value = super().loss(outputs, labels)
        if torch.is_grad_enabled():
            self._means.add_loss(outputs, labels, value)
        return value

    def _logits(self, outputs: Tensors) -> Tensor:
        assert self.head is not None
        with self.autocast.forward():
            logits: Tensor = self.head(outputs)
        return logits

    def _own_loss(self, micro_batch: int, outputs: Tensors, labels: Any) -> tuple[Tensor, Gradients, list[Tensor | None]]:
        """The head's loss, and its gradients: of the stage's output, and of the head's parameters."""
        assert self.head is not None
        ends = leaves(outputs, True)
        wanted = [t for t in as_tuple(ends) if t.requires_grad]
        with self.seeds.scope(), torch.enable_grad():
            self.seeds.set(_HEAD_SEED + self.index, micro_batch)
            loss = self.loss(self._logits(ends), labels)
        parameters = self.head_parameters
        found = torch.autograd.grad(loss * self.scale if self.scale != 1 else loss, [*wanted, *parameters], allow_unused=True)
        by_end = iter(found[:len(wanted)])
        at_ends = tuple(next(by_end) if t.requires_grad else None for t in as_tuple(ends))
        if self.lesson is not None:
            self.lesson.tell(micro_batch, loss.detach())
        return loss.detach(), at_ends, list(found[len(wanted):])

    def _collect(self, micro_batch: int, grads: Gradients) -> None:
        if micro_batch not in self._waiting:  # nobody learns from its own loss
            self._waiting[micro_batch] = _Waiting([None] * len(grads))
        waiting = self._waiting[micro_batch]
        waiting.grads = [_added(a, b) for a, b in zip(waiting.grads, grads)]

    def _only_forward(self, micro_batch: int, inputs: Tensors, labels: Any) -> Outcome:
        assert self.head is not None
        with torch.no_grad():
            outputs = self.plain_forward(micro_batch, inputs)
            loss = self.loss(self._logits(outputs), self._target(inputs, labels))
        return Outcome({Slot.OUTPUT: (detach(outputs), labels)}, loss, complete=True, inputs=inputs)

    def modules(self) -> Iterator[nn.Module]:
        yield from super().modules()
        yield from (module for module in (self.head, self.own_loss) if module is not None)

    def votes(self, outputs: Tensors) -> list[Tensor]:
        if self.head is None:
            return []
        training = self.head.training
        with self.seeds.scope():
            self.head.eval()
            votes = self._logits(outputs).float().softmax(dim=-1)
        self.head.train(training)
        return [votes]

    # -- what it reports --------------------------------------------------------------------------------------------------

    def take_metrics(self) -> dict[str, float]:
        return self._means.take()

    # -- what is kept ------------------------------------------------------------------------------------------------------

    def kept(self) -> Iterator[Tensor]:
        yield from super().kept()
        for waiting in self._waiting.values():
            yield from (t for t in (*waiting.grads, *waiting.head_grads) if t is not None)

    def state_dict(self) -> dict[str, Any]:
        waiting = {m: (w.grads, w.head_grads) for m, w in self._waiting.items()}
        return {**super().state_dict(), "waiting": waiting, "stopped": self.stopped,
                "head": None if self.head is None else self.head.state_dict(),
                "loss_fn": None if self.own_loss is None else self.own_loss.state_dict(),
                "lesson": None if self.lesson is None else self.lesson.state_dict()}

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
        if self.lesson is not None:
            self.lesson.load_state_dict(state.get("lesson"))
        self.take_metrics()
        if state["stopped"]:
            self.stop()
