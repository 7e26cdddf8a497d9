"""The tracker: how far the gradient that a stage used is from the exact one.

Every n micro-batches, one is followed: each stage keeps the gradient that the method gave it for that micro-batch. When the
micro-batch has left stage 0, the same batch goes through plain backpropagation once, at the weights of that moment (the end
of that call), without touching anything; each stage then compares. At learning rate 0 nothing differs but rounding.

Ranks do wait for one another in that one pass, so a small n costs speed.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from deepspeed.utils import logger
from torch import Tensor, nn

from ds_decoupled.passes import Passes
from ds_decoupled.schedules import Action, Kind, Slot
from ds_decoupled.stages.outcome import Outcome
from ds_decoupled.stages.stage import Stage
from ds_decoupled.tensors import Gradients, Tensors, as_tuple, detach, leaves
from ds_decoupled.watchers.watcher import Watcher


def _flat(grad: Tensor) -> Tensor:
    return (grad.to_dense() if grad.is_sparse else grad).float().flatten()


class GradientTracker(Watcher):
    """Compares gradients; see the module's text.

    Args:
        passes: the way through this rank's stages.
        every: micro-batches from one that is followed to the next.

    Attributes:
        results: rows of ``micro_batch, stage, cosine, relative_error, norm_ratio`` of this rank's stages: with the gradient
            used g and the exact one e, ``g·e/|g||e|``, ``|g-e|/|e|``, ``|g|/|e|``.
    """

    def __init__(self, passes: Passes, every: int) -> None:
        self.passes, self.every = passes, every
        self.results: list[dict[str, float]] = []
        self._batches: dict[int, tuple[Tensors, Tensors | None]] = {}
        self._used: dict[tuple[int, int], list[Tensor | None]] = {}
        self._accumulated: list[Tensor | None] = []
        self._next = 0

    def before(self, action: Action) -> None:
        """Where a backward pass follows, set aside what has been accumulated."""
        if action.kind.ends and action.micro_batch % self.every == 0:
            parameters = self.passes.stages[action.stage].trainable
            # With k > 1 .grad holds the sum of earlier micro-batches, and it is this one's share that is compared.
            self._accumulated = [p.grad for p in parameters]
            for p in parameters:
                p.grad = None

    def acted(self, action: Action, outcome: Outcome) -> None:
        """Keep the raw batch; once all gradients of the micro-batch are in ``.grad``, note them and add what was set aside."""
        if action.kind.per_update or action.micro_batch % self.every:
            return
        if action.kind is Kind.LOAD:
            inputs, labels = outcome.given[Slot.INPUT]
            self._batches[action.micro_batch] = (detach(inputs), labels)
        if outcome.complete:
            parameters = self.passes.stages[action.stage].trainable
            self._used[action.micro_batch, action.stage] = [None if p.grad is None else p.grad.detach().clone()
                                                            for p in parameters]
            for p, before in zip(parameters, self._accumulated):
                if before is not None:
                    p.grad = before if p.grad is None else before.add_(p.grad)

    def resumed(self, micro_batch: int) -> None:
        """Follow none before ``micro_batch``."""
        self._batches.clear()
        self._used.clear()
        self._next = -(-micro_batch // self.every) * self.every

    def after_call(self, through: int) -> None:
        """Compare every followed micro-batch that has left stage 0."""
        while self._next < through:
            self._compare(self._next)
            self._next += self.every

    def report(self) -> list[dict[str, float]]:
        return self.results

    def merge(self, reports: list[Any]) -> dict[str, Any]:
        return {"gradient_tracker": sorted((row for rows in reports for row in rows),
                                           key=lambda row: (row["micro_batch"], row["stage"]))}

    def _compare(self, micro_batch: int) -> None:
        for stage, exact in self._exact(micro_batch).items():
            used = self._used.pop((micro_batch, stage))
            pairs = [(_flat(g), _flat(e)) for g, e in zip(used, exact) if g is not None and e is not None]
            if not pairs:
                continue
            g, e = (torch.cat(side) for side in zip(*pairs))
            g_norm, e_norm = g.norm().item(), e.norm().item()
            row = {
                "micro_batch": micro_batch, "stage": stage,
                "cosine": torch.dot(g, e).item() / (g_norm * e_norm) if g_norm and e_norm else math.nan,
                "relative_error": (g - e).norm().item() / e_norm if e_norm else math.nan,
                "norm_ratio": g_norm / e_norm if e_norm else math.nan}
            self.results.append(row)
            logger.info("gradient of micro-batch %d, stage %d: cosine %.4f, relative error %.3g, norm ratio %.4f",
                        *row.values())

    def _exact(self, micro_batch: int) -> dict[int, list[Tensor | None]]:
        """The stages' gradients of ``micro_batch`` by plain backpropagation, scaled as in training."""
        # A graph of its own for every stage, as between ranks: one graph over all stages would pass through detached tensors.
        ends: list[tuple[Stage, Tensors, Tensors]] = []

        def through(stage: Stage, x: Tensors, beside: list[Any]) -> Tensors:
            inputs = leaves(x, stage.index > 0)
            with torch.enable_grad(), stage.buffers.held():
                outputs = stage.plain_forward(micro_batch, inputs)
            ends.append((stage, inputs, outputs))
            return detach(outputs)

        self.passes.expect("beside forward", 1, micro_batch)
        _, (labels, *_) = self.passes.forward("beside forward", micro_batch, lambda: self._batches.pop(micro_batch), through)
        stage, inputs, outputs = ends[-1]
        if stage.is_last:
            with torch.enable_grad():
                loss = stage.loss(outputs, labels) * stage.scale
            ends[-1] = (stage, inputs, loss)
            grads: Gradients = (torch.ones_like(loss),)
        else:
            grads = self.passes.take_back("beside backward", micro_batch)
        exact: dict[int, list[Tensor | None]] = {}
        for stage, inputs, outputs in reversed(ends):
            exact[stage.index], grads = _gradients(stage.trainable, inputs, outputs, grads)
        self.passes.hand_back("beside backward", micro_batch, grads)
        return exact


def _gradients(parameters: list[nn.Parameter], inputs: Tensors, outputs: Tensors,
               grads: Gradients) -> tuple[list[Tensor | None], Gradients]:
    """Of a stage's parameters and of its inputs, from those of its outputs."""
    wanted = [t for t in (*parameters, *as_tuple(inputs)) if t.requires_grad]
    pairs = [(y, dy.to(y.dtype)) for y, dy in zip(as_tuple(outputs), grads) if y.requires_grad and dy is not None]
    found = iter(torch.autograd.grad([y for y, _ in pairs], wanted, [dy for _, dy in pairs], allow_unused=True)
                 if pairs and wanted else [None] * len(wanted))
    of_parameters = [next(found) for _ in parameters]
    return of_parameters, tuple(next(found) if t.requires_grad else None for t in as_tuple(inputs))
