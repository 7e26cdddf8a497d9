"""How far what is rebuilt is from what was there, looked at from outside of the engine."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class ReconstructionProbe:
    """How far the lowest coupling's rebuilt input is from the one it was given; the engine knows nothing of it.

    A coupling sees micro-batches in order in both directions, so a queue of remembered inputs is enough.

    Attributes:
        every: micro-batches from one that is looked at to the next.
        errors: ``|rebuilt - true| / |true|`` over both streams, of those looked at.
    """

    every: int
    errors: list[float] = field(default_factory=list)

    def watch(self, coupling: Any) -> None:
        """Look on at ``coupling``'s own ``forward`` and ``reverse``."""
        forward, reverse = coupling.forward, coupling.reverse
        remembered: deque[tuple[Tensor, ...]] = deque()
        seen, rebuilt = 0, 0

        def forward_seen(streams: tuple[Tensor, ...]) -> Any:
            nonlocal seen
            if coupling.training:
                if seen % self.every == 0:
                    remembered.append(tuple(x.detach() for x in streams[:2]))
                seen += 1
            return forward(streams)

        def reverse_seen(outputs: Any, grads: Any) -> Any:
            nonlocal rebuilt
            inputs, input_grads = reverse(outputs, grads)
            if rebuilt % self.every == 0:
                true, found = (torch.stack(pair) for pair in (remembered.popleft(), inputs[:2]))
                self.errors.append(((found - true).norm() / true.norm()).item())
            rebuilt += 1
            return inputs, input_grads

        coupling.forward, coupling.reverse = forward_seen, reverse_seen
