"""What the head of one stage is taught before the stage may learn from it; and how far it is."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ds_decoupled.optim.teacher import Teacher
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


def divergence(logits: Tensor, said: Tensor) -> Tensor:
    """KL(said || logits), both ``(..., classes)``, ``said`` as log-probabilities; the mean over all but the classes."""
    return nn.functional.kl_div(logits.float().log_softmax(-1), said, reduction="none", log_target=True).sum(-1).mean()


class Lesson:
    """A head's lesson.

    Args:
        settings: of all lessons.
        parameters: of the head; none where the stage has none.
        average: over data-parallel replicas, in place; None for one.

    Attributes:
        done: updates made.
        losses: the mean of each of them, by what is taught.
    """

    def __init__(self, settings: TeachingSettings, parameters: Sequence[nn.Parameter],
                 average: Callable[[Tensor], None] | None) -> None:
        self.settings, self.parameters, self.average = settings, parameters, average
        self.done = 0
        self.losses: list[float] = []
        self._told: list[Tensor] = []
        self.teacher: Teacher | None = self._make_teacher()

    def _make_teacher(self) -> Teacher | None:
        """None where the stage may learn: its moments are needed no more."""
        if self.over:
            return None
        teacher = Teacher(self.parameters, self.settings.lr, self.average)
        teacher.schedule = lambda: part_of_peak(self.done, self.settings.updates, self.settings.warmup)
        return teacher

    @property
    def over(self) -> bool:
        """Whether the stage may learn."""
        return self.done >= self.settings.updates

    def tell(self, loss: Tensor) -> None:
        """A micro-batch's loss; its gradients are in ``.grad``."""
        self._told.append(loss)

    def update(self) -> None:
        """The k-th gradient is there."""
        assert self.teacher is not None
        self.teacher.step()
        if self._told:
            loss = torch.stack(self._told).float().mean()
            if self.average is not None:
                self.average(loss)
            self.losses.append(loss.item())
        self._told.clear()
        self.done += 1
        if self.over:
            self.teacher = None

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds of it."""
        return {"done": self.done, "losses": list(self.losses),
                "teacher": None if self.teacher is None else self.teacher.state_dict()}

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """The inverse of :meth:`state_dict`; None is of a run without lessons, whose heads are as far as they are."""
        told = {"done": 0, "losses": [], "teacher": None} if state is None else state
        # It may have been over after fewer updates than are asked for here: the stage has learned from the head since.
        self.done = told["done"] if told["teacher"] is not None else max(told["done"], self.settings.updates)
        self.losses = list(told["losses"])
        self.teacher = self._make_teacher()
        if self.teacher is not None:
            self.teacher.load_state_dict(told["teacher"])
