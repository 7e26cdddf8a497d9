"""What the last stage makes of micro-batches that are not trained on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor


def evaluate(engine: Any, batches: Iterator[Any] | None, count: int, compute_loss: bool = True,
             **options: Any) -> list[Tensor] | None:
    """What the last stage makes of ``count`` micro-batches: losses, or outputs; a collective call.

    Args:
        batches: on the ranks of the first and the last stage.
        options: of a decoupled engine's ``eval_batch``.

    Returns:
        One value a micro-batch on the ranks of the last stage, None elsewhere.
    """
    # DeepSpeed adds what the last stage gives to the loss that the last train_batch left there, and the shapes may differ.
    engine.total_loss = None
    engine.reset_activation_shape()  # DeepSpeed's ranks tell each other shapes with the first message alone
    results = engine.eval_batch(batches, compute_loss=compute_loss, reduce_output=None, bcast_loss=False,
                                num_micro_batches=count, **options)
    engine.reset_activation_shape()
    return None if results is None else list(results)
