"""What the head of one stage is taught before anybody learns from it.

A head that does not read its stage teaches it nonsense, and a pretrained stage has much to lose. So for the first updates a
head learns by a rate of its own, high at first, and the stages that would learn from it hold still. Stages that learn from the
model's own loss have no need to wait, so that none of these updates is lost on them. J = 4, ``"losses": "farthest"``, a window
of 2, and what learns while heads are taught::

    stage 0 <- L_1      stage 1 <- L_2      stage 2 <- L_3      stage 3 <- L_3
    still               still               learns              learns
                        head: taught        head: taught

A micro-batch belongs to the lesson from its way up on, however late its gradients come: every stage counts what goes up
through it, and all count alike.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ds_decoupled.settings.teaching import TeachingSettings


def part_of_peak(update: int, updates: int, warmup: float) -> float:
    """Where a rate is that rises over the first updates and then falls by a cosine to 0.

    Args:
        update: from 0.
        updates: in all.
        warmup: the part of them over which it rises.

    >>> [round(part_of_peak(update, 4, 0.5), 2) for update in range(4)]
    [0.5, 1.0, 1.0, 0.5]
    """
    rising = round(warmup * updates)
    if update < rising:
        return (update + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (update - rising) / max(1, updates - rising)))


class Lesson:
    """One stage's part in the lesson.

    Args:
        settings: of all lessons.
        still: whether the stage would learn from a head, its own or another's, and holds still meanwhile.
        has_head: whether it has a head that is taught.

    Attributes:
        losses: of the head, the mean of each update, on this data-parallel replica.
    """

    def __init__(self, settings: TeachingSettings, *, still: bool, has_head: bool) -> None:
        self.settings, self.still, self.has_head = settings, still, has_head
        self.losses: list[float] = []
        self._told: list[Tensor] = []
        self._updates, self._of_update = 0, 0  # that have gone up: whole ones, and micro-batches of the next
        self._in_flight: set[int] = set()

    # -- micro-batches --------------------------------------------------------------------------------------------------------

    def enter(self, micro_batch: int, k: int) -> bool:
        """A micro-batch goes up, the next of an update's ``k``. Whether it belongs to the lesson."""
        if self._updates >= self.settings.updates:
            return False
        self._in_flight.add(micro_batch)
        self._of_update += 1
        if self._of_update == k:
            self._updates, self._of_update = self._updates + 1, 0
        return True

    def holds(self, micro_batch: int) -> bool:
        """Whether the stage learns nothing from ``micro_batch``."""
        return self.still and micro_batch in self._in_flight

    def leave(self, micro_batch: int) -> None:
        """All of its gradients have come."""
        self._in_flight.discard(micro_batch)

    def tell(self, micro_batch: int, loss: Tensor) -> None:
        """The head's loss of a micro-batch, as it was before the update."""
        if micro_batch in self._in_flight:
            self._told.append(loss)

    # -- updates ------------------------------------------------------------------------------------------------------------

    def lasts(self, update: int) -> bool:
        """Whether the stage's update of this number, from 0, belongs to the lesson."""
        return update < self.settings.updates

    def rate(self, update: int) -> float:
        """The head's rate in such an update."""
        return self.settings.lr * part_of_peak(update, self.settings.updates, self.settings.warmup)

    def updated(self, k: int) -> None:
        """The k-th gradient is there. Losses of later micro-batches may have been told, whose gradients from above have not
        come."""
        if self._told:
            self.losses.append(torch.stack(self._told[:k]).float().mean().item())
        del self._told[:k]

    # -- what is kept -------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds of it."""
        return {"losses": list(self.losses), "told": list(self._told), "gone_up": (self._updates, self._of_update),
                "in_flight": sorted(self._in_flight)}

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """The inverse of :meth:`state_dict`; None is of a run without a lesson, whose stages have learned from their heads as
        they were: there is nothing to hold back any more."""
        told: dict[str, Any] = {"losses": [], "told": [], "gone_up": (self.settings.updates, 0), "in_flight": ()}
        if state is not None:
            told = state
        self.losses, self._told = list(told["losses"]), list(told["told"])
        self._updates, self._of_update = told["gone_up"]
        self._in_flight = set(told["in_flight"])
