"""The losses that a rank has dealt with in a call, and their mean."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class Losses:
    """Losses of one call.

    Args:
        device: where they live.
        group: the data-parallel replicas that they are averaged over; None for one replica.
        names: of the additional losses that follow each loss.

    Attributes:
        additional: the means of the additional losses at the last :meth:`mean`, by name.
    """

    def __init__(self, device: torch.device, group: Any, names: Callable[[], Iterable[str] | None]) -> None:
        self.device, self.group, self.names = device, group, names
        self.additional: OrderedDict[str, Tensor] | None = None
        self._told: list[Tensor] = []

    def __bool__(self) -> bool:
        return bool(self._told)

    def add(self, loss: Tensor) -> None:
        """A micro-batch's loss; or a vector of it and the additional ones."""
        self._told.append(loss)

    def clear(self) -> None:
        """A new call begins."""
        self._told.clear()

    def mean(self) -> Tensor:
        """Over micro-batches and replicas; NaN where there were none. A collective call of replicas."""
        if not self._told:
            return torch.full((), float("nan"), device=self.device)
        losses = torch.stack([value.float().reshape(-1) for value in self._told]).mean(0)
        if self.group is not None:
            dist.all_reduce(losses, group=self.group)
            losses /= dist.get_world_size(self.group)
        loss, *additional = losses.unbind()
        if additional:
            self.additional = OrderedDict(zip(self.names() or (), additional))
        return loss
