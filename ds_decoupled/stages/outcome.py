"""What an action of a stage leaves, for whoever needs it next."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ds_decoupled.schedules import Slot
from ds_decoupled.tensors import Tensors


@dataclass(frozen=True)
class Outcome:
    """What one action leaves.

    Attributes:
        given: by slot, the parts of the message that goes there. Activations are ``(output, labels)``, gradients
            ``(gradients, input or None, loss)``: the input where the stage below reconstructs from it, and the loss rides
            down with its gradient. A slot that is left out gets nothing.
        loss: of the micro-batch, not scaled, where the action made it or learned of it.
        complete: whether all gradients of the micro-batch are in ``.grad`` now.
        steps: whether the stage's optimizer is to step now.
        inputs: the stage's input, kept or rebuilt, where the action has it; for watchers.
    """

    given: Mapping[Slot, tuple[Any, ...]] = field(default_factory=dict)
    loss: Tensor | None = None
    complete: bool = False
    steps: bool = False
    inputs: Tensors | None = None
