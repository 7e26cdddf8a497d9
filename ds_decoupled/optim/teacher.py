"""What an AuxNet learns with: Adam of its own, beside the stage's optimizer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn


class Teacher:
    """Adam (arXiv 1412.6980) for a few parameters; those of another type have copies in float32, which it steps.

    Args:
        parameters: that learn.
        lr: the rate, at the peak of the schedule.
        average: over data-parallel replicas, in place; None for one.

    Attributes:
        schedule: where the rate is, as a part of its peak; at first the peak.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], lr: float, average: Callable[[Tensor], None] | None) -> None:
        self.parameters, self.lr, self.average = list(parameters), lr, average
        self.schedule: Callable[[], float] = lambda: 1.0
        # Steps of a small rate are lost in the bits of bfloat16.
        self._stepped = [p if p.dtype == torch.float32 else p.detach().float() for p in self.parameters]
        # The user's trunk may want SGD; what learns to reproduce a moving target wants Adam (docs/auxnet.md).
        self._adam = torch.optim.Adam(self._stepped, lr=lr) if self.parameters else None

    def step(self) -> None:
        """The k-th gradient is there."""
        if self._adam is None:
            return
        copied = [(own, p) for own, p in zip(self._stepped, self.parameters) if own is not p]
        if self.average is not None:
            for parameter in self.parameters:
                if parameter.grad is not None:
                    self.average(parameter.grad)
        for own, parameter in copied:
            own.grad = None if parameter.grad is None else parameter.grad.float()
        for group in self._adam.param_groups:
            group["lr"] = self.lr * self.schedule()
        self._adam.step()
        self._adam.zero_grad()
        for own, parameter in copied:
            parameter.grad = None
            with torch.no_grad():
                parameter.copy_(own)

    def state_dict(self) -> dict[str, Any]:
        """Its moments, what has been accumulated, and the copies."""
        return {"adam": None if self._adam is None else self._adam.state_dict(),
                "grads": [p.grad for p in self.parameters],
                "copies": [None if own is p else own for own, p in zip(self._stepped, self.parameters)]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        if self._adam is not None:
            self._adam.load_state_dict(state["adam"])
        for parameter, grad in zip(self.parameters, state["grads"]):
            parameter.grad = None if grad is None else grad.to(parameter.device)
        for own, saved in zip(self._stepped, state.get("copies", ())):
            if saved is not None:
                own.copy_(saved)
