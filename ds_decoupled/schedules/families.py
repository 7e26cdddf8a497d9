"""Families of plans: how the methods of one kind of gradient order a rank's computation within a tick. One file a family.

A new family is a file beside :mod:`ds_decoupled.schedules.global_gradient`, and a line in :data:`FAMILIES`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from ds_decoupled.schedules import auxiliary, global_gradient, local_losses
from ds_decoupled.schedules.actions import Action
from ds_decoupled.schedules.kinds import Kind
from ds_decoupled.schedules.outline import Outline


class Family(Protocol):
    """What a family's file defines."""

    def compute(self, plan: Outline, rank: int, tick: int, micro_batches: int) -> Iterator[Action]:
        """What ``rank`` computes in one tick of ``micro_batches``, in order."""

    def sends_gradient(self, plan: Outline, action: Action) -> bool:
        """Whether an action that can give the stage below a gradient does."""

    def gradient_kind(self, plan: Outline, below: int, action: Action) -> Kind:
        """How a gradient is sent to stage ``below``: the one that ``action`` there takes, or that ``action`` above it gives."""


#: By the value of the ``gradient`` axis.
FAMILIES: dict[str, Family] = {"global": global_gradient, "local": local_losses, "auxiliary": auxiliary}
