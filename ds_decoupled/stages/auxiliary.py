"""``gradient: auxiliary``: a stage learns to give what the AuxNet said that it would, and the AuxNet what it should have said.

Layer-parallel training (arXiv 2112.05387), with the terms of :mod:`ds_decoupled.nn.auxiliary_terms`. Stage s has step s of the
AuxNet, and with it everything of the pair of its own output z and the next stage's input lambda: multipliers, targets, and
what the step learns from. So two things go over a link, as in backpropagation: lambda up, p (what has reached it) down. The raw
batch and the output z go nowhere, and no weight is in two places: any number of ranks has the same numbers::

    stage s       lambda_s --step--> lambda_{s+1} ==> stage s+1          N
                  lambda_s --layers--> z                                  P, or Q
                  gradient of z: from lambda_{s+1} - z and kappa
                  p of lambda_{s+1} <---- stage s+1                       G, B, T
                  lambda^_{s+1}: what the step learns to give
                  p of lambda_s ----> stage s-1
                  q of lambda_s ----> stage s-1                           T, or the last B

q is the gradient, at the step's input, of all that this step and those above are to learn, so that the steps are one network
and learn together. Were each to learn from its own pair alone, layers and steps between the ends would agree on constants,
which costs nothing: with four stages on CIFAR-10 they do (docs/auxnet.md). Evaluation is the serial network, without any of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ds_decoupled.nn.auxiliary_terms import Coefficients, Spread, Terms, mean_square
from ds_decoupled.optim.teacher import Teacher
from ds_decoupled.schedules import Kind, Slot
from ds_decoupled.schedules.auxiliary import waits_for_target
from ds_decoupled.stages.graph import GraphSegment
from ds_decoupled.stages.layers import input_gradients
from ds_decoupled.stages.means import Means
from ds_decoupled.stages.outcome import Outcome
from ds_decoupled.stages.stage import Stage
from ds_decoupled.tensors import Gradients, Tensors, as_tuple, detach, leaves, map_tensors

_STEP_SEED = 1 << 21  # past every layer's index, and heads'


@dataclass
class _Pair:
    """A stage's output and the next one's generated input, in one micro-batch.

    Attributes:
        inputs: of the stage, and the micro-batch's ``labels``; ``entered``, the same as the step took it.
        generated: by the step, with its graph; ``guesses`` likewise, what the multipliers were predicted from.
        outputs: z; ``spreads`` (v), ``terms`` and ``kappas`` (None for none) go with it.
        to_be: what the generated input should have been, by the last gradient from above.
        passed_on: p of the stage's own input, where it waits for q.
    """

    inputs: Tensors
    labels: Any
    entered: Tensors
    generated: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...] = ()
    spreads: list[Tensor] = field(default_factory=list)
    terms: list[Terms] = field(default_factory=list)
    kappas: list[Tensor | None] = field(default_factory=list)
    guesses: tuple[Tensor, ...] = ()
    to_be: list[Tensor] = field(default_factory=list)
    passed_on: Gradients | None = None

    @property
    def lambdas(self) -> list[Tensor]:
        """What was generated, as numbers."""
        return [t.detach().float() for t in self.generated]


class AuxiliaryStage(Stage):
    """A stage that all others need not wait for.

    Attributes:
        step: of the AuxNet, from what the stage takes to what it gives; None on the last stage. It is given once shapes are
            known (:mod:`ds_decoupled.stages.auxnet_builder`).
        adjoint: predicts the multipliers from the stage's output and the labels; None where they are not predicted.
        teacher: of both.
        average: over data-parallel replicas, in place; None for one replica.
        counted: multiply-adds of a sample in the stage's layers, in the step, and in the adjoint.
        updates: made so far, by which the betas grow.
        recent: the last raw micro-batches, on the first stage; ``seen`` counts them on all.
    """

    handlers = {**Stage.handlers, Kind.GENERATE: "on_generate", Kind.ALONE: "on_alone", Kind.PROBE: "on_probe",
                Kind.RELAY: "on_relay", Kind.TARGET: "on_target"}

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        given, self.kappa = self.shared.auxnet, self.shared.axes.kappa
        growth = None if given.growth is None else (given.growth.factor, given.growth.updates)
        self.coefficients = Coefficients(given.fit, given.pull, given.eta, given.trust, growth)
        self.waits = waits_for_target(self.shared.stages, self.index, given.sweeps)
        # What came through a penalty counts pull / fit: the betas of the two places differ.
        through_penalty = self.kappa == "zero" and self.index < self.shared.stages - 2
        self._ratio = given.pull / given.fit if through_penalty else None
        self.step: nn.Module | None = None
        self.adjoint: nn.Module | None = None
        self.teacher: Teacher | None = None
        self.average: Callable[[Tensor], None] | None = None
        self.counted = (0, 0, 0)
        self.updates = self.seen = 0
        self.recent: list[Tensors] = []
        self._spreads: list[Spread] = []  # of each tensor of z
        self._adjoint_scale: list[Tensor] = []  # root mean square of p, not scaled
        self._pairs: dict[int, _Pair] = {}
        self._means = Means()

    def learn_steps(self, average: Callable[[Tensor], None] | None) -> None:
        """Its part of the AuxNet is there, and from now on learns."""
        self.average = average
        modules = [module for module in (self.step, self.adjoint) if module is not None]
        parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
        self.teacher = Teacher(parameters, self.shared.auxnet.lr, average)

    def follow(self, schedule: Callable[[], float]) -> None:
        if self.teacher is not None:
            self.teacher.schedule = schedule

    @property
    def _graph(self) -> GraphSegment:
        segment = self.segments[0]
        assert isinstance(segment, GraphSegment)
        return segment

    # -- what it does in an action ----------------------------------------------------------------------------------------

    def on_load(self, micro_batch: int, inputs: Tensors, labels: Any) -> Outcome:
        if self.shared.auxnet.norm_batches:
            self.recent = [*self.recent, detach(inputs)][-self.shared.auxnet.norm_batches:]
        return super().on_load(micro_batch, inputs, labels)

    def on_forward(self, micro_batch: int, inputs: Tensors, labels: Any) -> Outcome:
        """In the serial network."""
        self.seen += 1
        return super().on_forward(micro_batch, inputs, labels)

    def on_generate(self, micro_batch: int, inputs: Tensors, labels: Any) -> Outcome:
        """The next stage's input; the stage's own is kept for its layers, which come after."""
        # What is below the first stage learns nothing.
        entered = leaves(inputs, self.index > 0)
        generated = self._run_step(micro_batch, entered)
        self._pairs[micro_batch] = _Pair(inputs, labels, entered, as_tuple(generated))
        return Outcome({Slot.OUTPUT: (detach(generated), labels)}, inputs=inputs)

    def on_alone(self, micro_batch: int) -> Outcome:
        """Forward, and backward against what was generated."""
        pair = self._forward_pair(micro_batch)
        inputs, pair.passed_on = self.backward(micro_batch, None, self._gradients(pair, pair.lambdas))
        return Outcome(complete=True, inputs=inputs)

    def on_probe(self, micro_batch: int) -> Outcome:
        """The same for the stage below alone: the weights wait for a later sweep."""
        pair = self._forward_pair(micro_batch)
        return Outcome(self.down(self._relay(micro_batch, self._gradients(pair, pair.lambdas)), (), None), inputs=pair.inputs)

    def on_relay(self, micro_batch: int, grads: Gradients, outputs: Tensors | None, loss: Tensor | None) -> Outcome:
        """A further sweep."""
        return Outcome(self.down(self._relay(micro_batch, self._corrected(micro_batch, grads)), (), loss))

    def on_backward(self, micro_batch: int, grads: Gradients, outputs: Tensors | None, loss: Tensor | None) -> Outcome:
        """The last sweep; or, in the serial network, the pass back."""
        if self.serial:
            assert loss is not None
            return super().on_backward(micro_batch, grads, None, loss)
        pair = self._pairs[micro_batch]
        inputs, passed_on = self.backward(micro_batch, None, self._corrected(micro_batch, grads))
        if self.waits:
            pair.passed_on = passed_on
            return Outcome(loss=loss, complete=True, inputs=inputs)
        return Outcome(self._taught(micro_batch, grads, outputs, passed_on, loss), loss, complete=True, inputs=inputs)

    def on_target(self, micro_batch: int, grads: Gradients, outputs: Tensors | None, loss: Tensor | None) -> Outcome:
        """The stage has learned; now its step of the AuxNet does."""
        pair = self._pairs[micro_batch]
        pair.to_be = self._to_be(pair, self._from_above(pair, grads))
        return Outcome(self._taught(micro_batch, grads, outputs, pair.passed_on, loss), loss)

    def on_loss(self, micro_batch: int, inputs: Tensors, labels: Any) -> Outcome:
        self.seen += 1
        return super().on_loss(micro_batch, inputs, labels)

    @property
    def serial(self) -> bool:
        """Whether from its next micro-batch on it trains as a part of the serial network."""
        last = self.shared.auxnet.serial_from
        return last is not None and self.updates >= last

    def on_update(self, update: int) -> Outcome:
        self.updates += 1
        for spread in self._spreads:
            spread.move(self.average)
        if self.teacher is not None:
            self.teacher.step()
        return super().on_update(update)

    def down(self, grads: Gradients | None, inputs: Tensors, loss: Tensor | None) -> dict[Slot, tuple[Any, ...]]:
        """The loss is known where what the stage learned from has heard of it."""
        return {} if self.index == 0 or grads is None else {Slot.INPUT_GRADIENT: (grads, None, loss)}

    # -- the terms --------------------------------------------------------------------------------------------------------

    def _run_step(self, micro_batch: int, inputs: Tensors) -> Tensors:
        assert self.step is not None
        # One of the user's own may begin in place, and the stage's layers come after it.
        with self.seeds.scope(), torch.enable_grad(), self.autocast.forward():
            taken = map_tensors(torch.clone, inputs) if self.shared.auxnet.net is not None else inputs
            self.seeds.set(_STEP_SEED + self.index, micro_batch)
            generated: Tensors = self.step(taken)
        return generated

    def _forward_pair(self, micro_batch: int) -> _Pair:
        """Through the layers; what the output is compared with, and by how much."""
        self.seen += 1
        pair = self._pairs[micro_batch]
        outputs = self.forward(micro_batch, pair.inputs)
        pair.outputs = tuple(t.float() for t in as_tuple(outputs))
        self._spreads = self._spreads or [Spread() for _ in pair.outputs]
        pair.spreads = [spread.see(z.detach(), self.average) for z, spread in zip(pair.outputs, self._spreads)]
        scale = self.scale * self.coefficients.grown(self.updates)
        pair.terms = [Terms.of(self.coefficients, z, v, scale) for z, v in zip(pair.outputs, pair.spreads)]
        pair.kappas = [torch.zeros_like(z) if self.kappa == "kept" else None for z in pair.outputs]
        if self.adjoint is not None:
            with self.seeds.scope(), torch.enable_grad(), self.autocast.forward():
                self.seeds.set(_STEP_SEED + self.shared.stages + self.index, micro_batch)
                pair.guesses = as_tuple(self.adjoint(detach(outputs), pair.labels))
            # Before the first gradient has come nobody knows how large they are.
            if self._adjoint_scale:
                pair.kappas = [self.scale * s * guess.detach().float() for s, guess in zip(self._adjoint_scale, pair.guesses)]
        for generated, z, spread in zip(pair.lambdas, pair.outputs, self._spreads):
            self._means.add("mismatch", ((generated - z).square().mean() / spread.now).sqrt())
        return pair

    def _averaged(self, value: Tensor) -> Tensor:
        if self.average is not None:
            self.average(value)
        return value

    def _gradients(self, pair: _Pair, targets: list[Tensor]) -> Gradients:
        return tuple(terms.gradient(z, target, kappa)
                     for terms, z, target, kappa in zip(pair.terms, pair.outputs, targets, pair.kappas))

    def _relay(self, micro_batch: int, grads: Gradients) -> Gradients | None:
        return self._graph.relay(micro_batch, grads) if self.index > 0 else None

    def _from_above(self, pair: _Pair, grads: Gradients) -> list[Tensor]:
        """p, of each tensor."""
        found = [torch.zeros_like(z) if p is None else p.float() for p, z in zip(grads, pair.outputs)]
        return found if self._ratio is None else [p * self._ratio for p in found]

    def _to_be(self, pair: _Pair, slopes: list[Tensor]) -> list[Tensor]:
        # Predicted multipliers stand for p, and would count it twice.
        kappas = pair.kappas if self.kappa == "kept" else [None] * len(slopes)
        return [terms.to_be(generated, z, p, kappa)
                for terms, generated, z, p, kappa in zip(pair.terms, pair.lambdas, pair.outputs, slopes, kappas)]

    def _corrected(self, micro_batch: int, grads: Gradients) -> Gradients:
        """The output's gradient in the next sweep: with another target, or other multipliers."""
        pair = self._pairs[micro_batch]
        pair.to_be = self._to_be(pair, self._from_above(pair, grads))
        if self.kappa != "kept":
            return self._gradients(pair, pair.to_be)
        pair.kappas = [None if kappa is None else terms.next_kappa(kappa, to_be, z)
                       for terms, kappa, to_be, z in zip(pair.terms, pair.kappas, pair.to_be, pair.outputs)]
        return self._gradients(pair, pair.lambdas)

    def _taught(self, micro_batch: int, grads: Gradients, q: Tensors | None, passed_on: Gradients | None,
                loss: Tensor | None) -> dict[Slot, tuple[Any, ...]]:
        """Teach, and tell the stage below ``passed_on`` of its output together with its own q."""
        own = self._teach(micro_batch, grads, q)
        return {} if self.index == 0 else {Slot.INPUT_GRADIENT: (passed_on, own, loss)}

    def _teach(self, micro_batch: int, grads: Gradients, q: Tensors | None) -> Gradients:
        """Add the gradients of the step, and of what predicts multipliers; return q of the step's input.

        Args:
            micro_batch: its number.
            grads: p, of what the step generated.
            q: of the same; None from the last stage.
        """
        pair = self._pairs.pop(micro_batch)
        losses = [(generated - to_be).square().sum() * (self.scale * 0.5 / to_be.numel() / v)
                  for generated, to_be, v in zip(pair.generated, pair.to_be, pair.spreads)]
        if self.adjoint is not None:
            slopes = self._from_above(pair, grads)
            if not self._adjoint_scale:
                self._adjoint_scale = [self._averaged(mean_square(p / self.scale)).sqrt() for p in slopes]
            losses += [(guess + p / (self.scale * s)).square().mean() * (self.scale * 0.5)
                       for guess, p, s in zip(pair.guesses, slopes, self._adjoint_scale)]
        total = sum(losses[1:], losses[0])
        pairs = [(total, None), *((t, g) for t, g in zip(pair.generated, as_tuple(q or ())) if g is not None)]
        pairs = [(root, grad) for root, grad in pairs if root.requires_grad]
        if pairs:
            torch.autograd.backward([root for root, _ in pairs], [grad for _, grad in pairs])
        return input_gradients(pair.entered)

    # -- the parts of it --------------------------------------------------------------------------------------------------

    def loss(self, outputs: Tensors, labels: Any) -> Tensor:
        value = super().loss(outputs, labels)
        if torch.is_grad_enabled():
            self._means.add_loss(outputs, labels, value)
        return value

    def generate(self, micro_batch: int, inputs: Tensors) -> Tensors:
        """What the step says that the stage gives, in evaluation."""
        assert self.step is not None
        self.step.eval()
        generated = self._run_step(micro_batch, detach(inputs))
        self.step.train()
        return detach(generated)

    def modules(self) -> Iterator[nn.Module]:
        yield from super().modules()
        yield from (module for module in (self.step, self.adjoint) if module is not None)

    def take_metrics(self) -> dict[str, float]:
        return self._means.take()

    def state_dict(self) -> dict[str, Any]:
        own = {name: None if part is None else part.state_dict()
               for name, part in (("step", self.step), ("adjoint", self.adjoint), ("teacher", self.teacher))}
        return {**super().state_dict(), "auxnet": own, "spreads": [spread.state_dict() for spread in self._spreads],
                "adjoint_scale": self._adjoint_scale, "updates": self.updates, "seen": self.seen, "recent": self.recent}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        for name, saved in state["auxnet"].items():
            part = getattr(self, name)
            if part is not None:
                part.load_state_dict(saved)
        device = self.seeds.device
        self._spreads = [Spread() for _ in state["spreads"]]
        for spread, saved in zip(self._spreads, state["spreads"]):
            spread.load_state_dict(saved, device)
        self._adjoint_scale = [t.to(device) for t in state["adjoint_scale"]]
        self.updates, self.seen = state["updates"], state["seen"]
        self.recent = [t.to(device) if isinstance(t, Tensor) else tuple(part.to(device) for part in t) for t in state["recent"]]
        self._means.take()
