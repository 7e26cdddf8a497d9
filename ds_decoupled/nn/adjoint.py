"""What predicts the multipliers of layer-parallel training (arXiv 2112.05387), from a stage's output and the labels.

The multiplier of a stage's output stands for the loss's gradient there. Of the output alone there is little to predict: where
the model is calibrated, the mean of that gradient over the labels that an input may have is zero. With the label it is what a
small network can learn, as in conditional decoupled neural interfaces (arXiv 1608.05343, "cDNI"): on CIFAR-10 the cosine of
the lowest stage's gradient to the exact one goes from 0.1 to 0.4 (docs/auxnet.md). Labels travel with the inputs anyhow.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ds_decoupled.tensors import Tensors, as_tuple, channel_dim

_MOST = 16
"""Numbers that stand for a label before they are spread over channels, so that a large vocabulary costs little."""


class Adjoint(nn.Module):
    """Of one stage.

    Args:
        body: from what the stage gives to as much (:class:`ds_decoupled.nn.auxnet.Step`).
        outputs: what the stage gives, of a blank sample.
        classes: labels are below it; 1 or fewer where they are not ids.
    """

    def __init__(self, body: nn.Module, outputs: Tensors, classes: int) -> None:
        super().__init__()
        self.body, self.classes = body, classes
        self._sizes = [t.shape[channel_dim(t.shape) or 1] for t in as_tuple(outputs)]
        self.label: nn.Embedding | None = None
        if classes > 1:
            self.label = nn.Embedding(classes, min(_MOST, classes))
            self.spread = nn.Linear(self.label.embedding_dim, sum(self._sizes), bias=False)

    def forward(self, outputs: Tensors, labels: Any = None) -> Tensors:
        """The multipliers of ``outputs``, of their shapes.

        Args:
            outputs: what the stage gives.
            labels: of the micro-batch: ids ``(N,)``, or ``(N, T)`` of a token stream, of which those below 0 or too large count
                for nothing; whatever else they are is not looked at.
        """
        parts = as_tuple(outputs)
        if self.label is not None and self._are_ids(labels, parts[0]):
            known = (labels >= 0) & (labels < self.classes)
            code = self.spread(self.label(labels.clamp(0, self.classes - 1))) * known.unsqueeze(-1)
            parts = tuple(part + _beside(added, part) for part, added in zip(parts, code.split(self._sizes, dim=-1)))
        made: Tensors = self.body(parts[0] if isinstance(outputs, Tensor) else parts)
        return made

    def _are_ids(self, labels: Any, output: Tensor) -> bool:
        if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.dtype is torch.bool:
            return False
        return labels.shape == output.shape[:1] or output.dim() == 3 and labels.shape == output.shape[:2]


def _beside(added: Tensor, part: Tensor) -> Tensor:
    """``(N, C)``, or ``(N, T, C)``, as it is added to ``part``."""
    if part.dim() == 4:
        added = added[:, :, None, None]
    elif part.dim() == 3 and added.dim() == 2:
        added = added[:, None]
    return added.to(part.dtype)


__all__ = ["Adjoint"]
