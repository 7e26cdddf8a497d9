"""Evaluating micro-batches with the weights as they are, at any time; what is in flight is left untouched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ds_decoupled.feed import MicroBatch
from ds_decoupled.nn.heads import add_up, ensemble
from ds_decoupled.passes import NoBatch, Passes
from ds_decoupled.stages.stage import Stage
from ds_decoupled.tensors import Tensors


def evaluate(passes: Passes, count: int, source: Callable[[], MicroBatch], *, ask_heads: bool,
             compute_loss: bool, from_stage: int = 0) -> tuple[list[tuple[Any, Tensors]], Exception | None]:
    """Take ``count`` micro-batches through all stages; every rank must call it.

    Args:
        passes: the way through this rank's stages.
        count: micro-batches, of any size.
        source: gives the next one on the first rank.
        ask_heads: take the mean of all heads' probabilities.
        from_stage: the first stage that acts itself; what those below it give is generated.
        compute_loss: whether losses are wanted, or the outputs in their place.

    Returns:
        On the last rank a ``(loss, outputs)`` of each micro-batch, else nothing; and why there are fewer than ``count``: the
        data ended (StopIteration), or failed.
    """
    results: list[tuple[Any, Tensors]] = []
    error: Exception | None = None
    last = next((stage for stage in passes.stages.values() if stage.is_last), None)

    def through(stage: Stage, x: Tensors, beside: list[Any]) -> Tensors:
        if stage.index < from_stage:
            return stage.generate(number, x)
        outputs = stage.plain_forward(number, x)
        if ask_heads:
            beside[1:] = [*beside[1:], *stage.votes(outputs)]
        if stage.index == top and not stage.is_last:
            beside[1:] = add_up(beside[1:])  # one tensor goes on, however many heads there were
        return outputs

    top = max(passes.stages)
    with torch.no_grad():
        passes.expect("evaluation", count)
        for number in range(count):  # noqa: B007  (through reads it)
            try:
                x, (labels, *votes) = passes.forward("evaluation", number, source, through)
            except NoBatch as missing:
                if isinstance(missing.error, StopIteration):
                    error = StopIteration(f"the evaluation data ended before micro-batch {number}")
                else:
                    error = missing.error
                break
            if last is not None:
                x = ensemble(votes, x) if votes and isinstance(x, Tensor) else x
                results.append((last.loss(x, labels) if compute_loss else x, x))
    passes.network.wait_until_taken("evaluation")  # this may be the last that the process does
    return results, error
