"""What the optimizer is given: groups of parameters, the peak learning rate, and how it rises and falls."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    """At most two optimizer groups: weights, and what should not decay (biases and norms: parameters of one dimension)."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.ndim > 1]},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def set_peak_lr(config: dict[str, Any], lr: float | None, rule: float) -> float:
    """Write the peak learning rate into the optimizer's block: ``lr``, else the JSON's own, else ``rule``."""
    params = config.setdefault("optimizer", {"type": "SGD"}).setdefault("params", {})
    if lr is not None:
        params["lr"] = lr
    elif params.get("lr", "auto") == "auto":
        params["lr"] = rule
    return float(params["lr"])


def lr_schedule(kind: str, updates: int, warmup: int, steps: Sequence[float] = ()) -> Callable[[Optimizer], LambdaLR]:
    """A scheduler, counted in updates, for each optimizer that it is given.

    The warm-up of ``transformers.get_cosine_schedule_with_warmup`` begins at 0, so that its first update changes nothing; this
    one's begins above it.

    Args:
        kind: ``cosine`` to zero, or ``steps``: times 0.1 at each of ``steps``, shares of all updates.
        updates: how many there will be.
        warmup: over so many the rate grows linearly to its peak.
    """

    def factor(update: int) -> float:
        if update < warmup:
            return (update + 1) / warmup
        if kind == "cosine":
            done = (update - warmup) / max(1, updates - warmup)
            return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
        return 0.1 ** sum(update >= share * updates for share in steps)

    return lambda optimizer: LambdaLR(optimizer, factor)
