"""What an AuxNet learns with: Adam of its own, beside the stage's optimizer and by its schedule."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn


class Teacher:
    """Adam (arXiv 1412.6980) for a few parameters.

    Args:
        parameters: that learn.
        lr: the rate, at the peak of the stage's schedule.
        average: over data-parallel replicas, in place; None for one.

    Attributes:
        schedule: where the stage's schedule is, as a part of its peak.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], lr: float, average: Callable[[Tensor], None] | None) -> None:
        self.parameters, self.lr, self.average = list(parameters), lr, average
        self.schedule: Callable[[], float] = lambda: 1.0
        # The user's trunk may want SGD; what learns to reproduce a moving target wants Adam (docs/auxnet.md).
        self._adam = torch.optim.Adam(self.parameters, lr=lr) if self.parameters else None

    def step(self) -> None:
        """The k-th gradient is there."""
        if self._adam is None:
            return
        if self.average is not None:
            for parameter in self.parameters:
                if parameter.grad is not None:
                    self.average(parameter.grad)
        for group in self._adam.param_groups:
            group["lr"] = self.lr * self.schedule()
        self._adam.step()
        self._adam.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        """Its moments, and what has been accumulated."""
        return {"adam": None if self._adam is None else self._adam.state_dict(),
                "grads": [p.grad for p in self.parameters]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        if self._adam is not None:
            self._adam.load_state_dict(state["adam"])
        for parameter, grad in zip(self.parameters, state["grads"]):
            parameter.grad = None if grad is None else grad.to(parameter.device)
