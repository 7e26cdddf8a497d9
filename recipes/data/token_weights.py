"""Every token of an update weighs the same, whichever micro-batch it is in: as ``transformers``' Trainer has it since 4.46.

Means over micro-batches would give the tokens of one with few of them more weight
(https://huggingface.co/blog/gradient_accumulation).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from data.examples import NOT_ASKED

Weighted = tuple[Tensor, tuple[Tensor, Tensor]]


class TokenWeights(Iterator[Weighted]):
    """Micro-batches ``(ids, (targets, tokens))``, for :func:`ds_decoupled.models.next_token_loss`.

    Args:
        whole: the micro-batches of all replicas together, ``(ids, targets)``.
        k: of them in an update.
        replica, replicas: whose rows are given.

    ``tokens (1,)`` is the number of targets that are asked for in a replica's micro-batch, the mean over the whole update.
    """

    def __init__(self, whole: Any, k: int, replica: int, replicas: int) -> None:
        self.whole, self.k, self.replica, self.replicas = whole, k, replica, replicas
        self._ahead: list[Weighted] = []

    def seek(self, position: int) -> None:
        """Go to the micro-batch ``position``, the first of an update."""
        self.whole.seek(position)
        self._ahead = []

    def __next__(self) -> Weighted:
        if not self._ahead:
            batches = [next(self.whole) for _ in range(self.k)]
            asked = sum(int((targets != NOT_ASKED).sum()) for _, targets in batches)
            tokens = torch.tensor([asked / (self.k * self.replicas)])
            self._ahead = [(ids.chunk(self.replicas)[self.replica], (targets.chunk(self.replicas)[self.replica], tokens))
                           for ids, targets in batches]
        return self._ahead.pop(0)
