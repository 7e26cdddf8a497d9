"""The tracker: how far the gradient that a stage used is from the exact one.

Every n micro-batches, one is followed: each stage keeps the gradient that the method gave it for that micro-batch. When the
micro-batch has left stage 0, the same batch goes through plain backpropagation once, at the weights of that moment (the end
of that call), without touching anything; each stage then compares. At learning rate 0 nothing differs but rounding.

Ranks do wait for one another in that one pass, so a small n costs speed.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from deepspeed.utils import logger
from torch import Tensor

from ds_decoupled.links import Message
from ds_decoupled.tensors import Tensors, as_tuple, detach, leaves

if TYPE_CHECKING:
    from ds_decoupled.engine import DecoupledPipelineEngine


def _flat(grad: Tensor) -> Tensor:
    return (grad.to_dense() if grad.is_sparse else grad).float().flatten()


class GradientTracker:
    """Compares gradients; see the module's text.

    Args:
        engine: the engine.
        every: micro-batches from one that is followed to the next.

    Attributes:
        results: rows of ``micro_batch, stage, cosine, relative_error, norm_ratio`` of this rank's stages: with the gradient
            used g and the exact one e, ``g·e/|g||e|``, ``|g-e|/|e|``, ``|g|/|e|``.
    """

    def __init__(self, engine: DecoupledPipelineEngine, every: int) -> None:
        self.engine = engine
        self.every = every
        self.results: list[dict[str, float]] = []
        self._batches: dict[int, tuple[Tensors, Tensors | None]] = {}
        self._used: dict[tuple[int, int], list[Tensor | None]] = {}
        self._accumulated: list[Tensor | None] = []
        self._next = 0

    def loaded(self, micro_batch: int, inputs: Tensors, labels: Tensors | None) -> None:
        """Keep the raw batch of a micro-batch that is followed."""
        if micro_batch % self.every == 0:
            self._batches[micro_batch] = (detach(inputs), labels)

    def begin(self, stage: int, micro_batch: int) -> None:
        """The stage's backward of ``micro_batch`` follows: set aside what has been accumulated."""
        if micro_batch % self.every == 0:
            parameters = self.engine.stages[stage].trainable
            self._accumulated = [p.grad for p in parameters]
            for p in parameters:
                p.grad = None

    def end(self, stage: int, micro_batch: int) -> None:
        """All gradients of the micro-batch are in ``.grad``: note them, and add what was set aside."""
        if micro_batch % self.every == 0:
            parameters = self.engine.stages[stage].trainable
            self._used[micro_batch, stage] = [None if p.grad is None else p.grad.detach().clone() for p in parameters]
            for p, before in zip(parameters, self._accumulated):
                if before is not None:
                    p.grad = before if p.grad is None else before.add_(p.grad)

    def forget(self, micro_batch: int) -> None:
        """Training resumes from a checkpoint with ``micro_batch`` as the next new one: follow none before it."""
        self._batches.clear()
        self._used.clear()
        self._next = -(-micro_batch // self.every) * self.every

    def after_ticks(self) -> None:
        """Compare every followed micro-batch that has left stage 0."""
        engine = self.engine
        done = engine._first_micro_batch + min(engine._fed, engine._tick - engine.plan.ticks.drain)
        while self._next < done:
            self._compare(self._next)
            self._next += self.every

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
        engine = self.engine
        forward, backward = engine.network.chain("exact forward"), engine.network.chain("exact backward")
        what = f"pipe rank {engine.stage_id}, exact gradient of micro-batch {micro_batch}"
        if forward.receiver is None:
            x, labels = self._batches.pop(micro_batch)
        else:
            forward.receiver.expect([micro_batch])
            message = forward.receiver.recv(micro_batch, what)
            assert message is not None
            x, labels = message.parts
        ends: list[tuple[int, Tensors, Tensors]] = []
        for index, stage in engine.stages.items():
            inputs = leaves(x, index > 0)
            with torch.enable_grad(), stage.buffers.held():
                outputs = stage.plain_forward(micro_batch, inputs)
            ends.append((index, inputs, outputs))
            x = detach(outputs)
        if forward.sender is not None:
            forward.sender.send(Message(micro_batch, (x, labels)))
            assert backward.receiver is not None
            backward.receiver.expect([micro_batch])
            message = backward.receiver.recv(micro_batch, what)
            assert message is not None
            grads = message.parts[0]
        else:
            index, inputs, outputs = ends[-1]
            with torch.enable_grad():
                loss = engine.stages[index].loss(outputs, labels) / engine.plan.k
            ends[-1] = (index, inputs, loss)
            grads = (torch.ones_like(loss),)
        exact: dict[int, list[Tensor | None]] = {}
        for index, inputs, outputs in reversed(ends):
            parameters = engine.stages[index].trainable
            wanted = [t for t in (*parameters, *as_tuple(inputs)) if t.requires_grad]
            pairs = [(y, dy.to(y.dtype)) for y, dy in zip(as_tuple(outputs), grads) if y.requires_grad and dy is not None]
            found = iter(torch.autograd.grad([y for y, _ in pairs], wanted, [dy for _, dy in pairs], allow_unused=True)
                         if pairs and wanted else [None] * len(wanted))
            exact[index] = [next(found) for _ in parameters]
            grads = tuple(next(found) if t.requires_grad else None for t in as_tuple(inputs))
        if backward.sender is not None:
            backward.sender.send(Message(micro_batch, (grads,)))
        return exact
