"""Random crops and flips, where numbers drawn beforehand put them.

Not torchvision's transforms, which draw for themselves: here a sample's numbers are a function of (seed, epoch, sample), so
that a run that is resumed, or placed on other ranks, sees the same changes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional


def crop_and_flip(images: Tensor, draws: Tensor, *, padding: int, flip: bool) -> Tensor:
    """Crop each image at its own place from its zero-padded self, and mirror half of them.

    Args:
        images: ``(n, C, S, S)``, any type.
        draws: ``(n, >=3)`` in [0, 1): the crop's row and column, and the flip.
    """
    count, channels, size, _ = images.shape
    if padding:
        padded = functional.pad(images, (padding,) * 4)
        places = (draws[:, :2] * (2 * padding + 1)).long()
        rows = (places[:, :1] + torch.arange(size)).view(count, 1, size, 1)
        columns = (places[:, 1:] + torch.arange(size)).view(count, 1, 1, size)
        images = padded[torch.arange(count).view(-1, 1, 1, 1), torch.arange(channels).view(1, -1, 1, 1), rows, columns]
    if flip:
        images = torch.where((draws[:, 2] < 0.5).view(-1, 1, 1, 1), images.flip(-1), images)
    return images


def random_box(width: int, height: int, draws: Sequence[float]) -> tuple[float, float, float, float]:
    """A box of 8 to 100 % of the area and a side ratio of 3/4 to 4/3, where four numbers in [0, 1) put it."""
    area = width * height * (0.08 + 0.92 * draws[0])
    ratio = (3 / 4) * (16 / 9) ** draws[1]
    box_width, box_height = min(width, (area * ratio) ** 0.5), min(height, (area / ratio) ** 0.5)
    left, top = draws[2] * (width - box_width), draws[3] * (height - box_height)
    return left, top, left + box_width, top + box_height
