"""How a ``PipelineModule`` seeds its layers, where the user asked it to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from deepspeed.pipe import PipelineModule
from deepspeed.runtime.utils import set_random_seed


def layer_seeding(module: PipelineModule) -> Callable[[int, int], None] | None:
    """How ``module`` seeds a layer for a micro-batch where the user asked for it (``seed_layers``); None where nobody did.

    The number is that of ``PipelineModule.forward``, whose first micro-batch has the offset 2.
    """
    if not module.seed_layers:
        return None
    seed: Callable[[int], Any] = module.seed_fn or set_random_seed

    def seed_layer(layer: int, micro_batch: int) -> None:
        seed(module.base_seed * (micro_batch + 2) + layer)

    return seed_layer
