"""The six-layer CNN on which decoupled greedy learning was measured (arXiv 2106.06401), as a list of layers for a pipeline.

Each layer is a 3x3 convolution with batch norm and ReLU; the second and the fourth, where the channels double, halve the
picture by a 2x2 max-pool. Channels are ``width * (1, 2, 2, 4, 4, 4)``, 128 to 512 in the paper.
"""

from __future__ import annotations

from deepspeed.pipe import LayerSpec
from torch import Tensor, nn

from ds_decoupled.models.residual import as_dtype_of, conv_bn

MULTIPLES = (1, 2, 2, 4, 4, 4)
"""Channels of each layer, in widths."""

POOLED = (1, 3)
"""Layers, from 0, that halve the picture."""

WIDTH = 128
"""Of the paper."""


class ConvLayer(nn.Module):
    """``(N, in, H, W) -> (N, out, H, W)``, or half as high and wide."""

    def __init__(self, in_channels: int, out_channels: int, halves: bool) -> None:
        super().__init__()
        self.conv = conv_bn(in_channels, out_channels, 3)
        self.pool: nn.Module = nn.MaxPool2d(2) if halves else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.pool(self.conv(as_dtype_of(self, x)))
        return y


class Classifier(nn.Module):
    """Pool to 2x2 and linear: ``(N, channels, H, W) -> (N, num_classes)``."""

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(2)
        self.linear = nn.Linear(4 * channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.linear(self.pool(as_dtype_of(self, x)).flatten(1))
        return logits


def cnn_layers(*, num_classes: int, width: int) -> list[LayerSpec]:
    """Six convolutions and the classifier, which belongs to the last of them."""
    channels = [3, *(width * multiple for multiple in MULTIPLES)]
    layers = [LayerSpec(ConvLayer, channels[i], channels[i + 1], i in POOLED) for i in range(len(MULTIPLES))]
    return [*layers, LayerSpec(Classifier, channels[-1], num_classes)]
