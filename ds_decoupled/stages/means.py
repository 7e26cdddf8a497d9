"""What a stage reports of its micro-batches: means since the last report, without waiting for the device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from torch import Tensor


def mean_by_name(found: Sequence[Mapping[str, float] | None]) -> dict[str, float] | None:
    """Of several, by name, each over those that have it; None where there is nothing but None.

    >>> mean_by_name([{"loss": 1.0}, {"loss": 3.0, "accuracy": 0.5}, None]), mean_by_name([None])
    ({'loss': 2.0, 'accuracy': 0.5}, None)
    """
    known = [one for one in found if one is not None]
    names = dict.fromkeys(name for one in known for name in one)
    return {name: fmean(one[name] for one in known if name in one) for name in names} if known else None


class Means:
    """Sums and counts by name."""

    def __init__(self) -> None:
        self._sums: dict[str, Any] = {}
        self._counts: dict[str, Any] = {}

    def add(self, name: str, value: Tensor, count: Any = 1) -> None:
        """``value`` is a sum over ``count``."""
        self._sums[name] = self._sums.get(name, 0) + value
        self._counts[name] = self._counts.get(name, 0) + count

    def add_loss(self, outputs: Any, labels: Any, loss: Tensor) -> None:
        """A micro-batch's ``loss``; and its ``accuracy``, where the outputs are logits ``(..., classes)`` and the labels ids,
        of which those below 0 do not count."""
        self.add("loss", loss.detach().float().reshape(()))
        if isinstance(outputs, Tensor) and isinstance(labels, Tensor) and labels.shape == outputs.shape[:-1]:
            known = labels >= 0
            self.add("accuracy", ((outputs.detach().argmax(-1) == labels) & known).sum(), known.sum())

    def take(self) -> dict[str, float]:
        """The means, and begin anew."""
        means = {name: float(value) / float(self._counts[name]) for name, value in self._sums.items() if self._counts[name]}
        self._sums.clear()
        self._counts.clear()
        return means
