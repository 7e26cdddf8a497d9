"""RevNet-18/34/50 as PETRA trains them (arXiv 2406.02052), as a list of layers for a pipeline.

Two streams of the ResNet's own widths; each block's residual function F acts on one of them, so that the parameters
stay close to the ResNet's::

    stem        images    ->  (x1, x2)                        one convolution of twice the width, split
    reversible  (x1, x2)  ->  (x2 + F(x1), x1)
    down        (x1, x2)  ->  (F(x1) + P(x2), F_first(x1))    P: 1x1 convolution, BN; F_first: F's first conv, BN, ReLU
    down, 50    (x1, x2)  ->  (F(x1) + P(x2), Q(x1))          P, Q: 1x1 convolutions, BN
    head        (x1, x2)  ->  linear(average pool([x1, x2]))
"""

from __future__ import annotations

import torch
from deepspeed.pipe import LayerSpec
from torch import Tensor, nn

from ds_decoupled.models.residual import (
    Architecture,
    BlockShape,
    as_dtype_of,
    basic_branch,
    block_shapes,
    bottleneck_branch,
    conv_bn,
    stem_conv,
)
from ds_decoupled.nn import ReversibleCoupling

Streams = tuple[Tensor, Tensor]


class RevNetStem(nn.Module):
    """Images ``(N, 3, H, W)`` to two streams ``(N, channels, H', W')``, the halves of one convolution's output."""

    def __init__(self, channels: int, imagenet: bool) -> None:
        super().__init__()
        self.conv = stem_conv(2 * channels, imagenet=imagenet)

    def forward(self, images: Tensor) -> Streams:
        x1, x2 = self.conv(as_dtype_of(self, images)).chunk(2, dim=1)
        # The halves are views with the stride of the whole: a sender would have to copy them, and each would keep both.
        return x1.contiguous(), x2.contiguous()


class RevBasicBlock(ReversibleCoupling):
    """Reversible block of two 3x3 convolutions; both streams ``(N, channels, H, W)``."""

    def __init__(self, channels: int) -> None:
        super().__init__(basic_branch(BlockShape(channels, channels, 1), last_relu=True))


class RevBottleneck(ReversibleCoupling):
    """Reversible block of 1x1, 3x3, 1x1 convolutions; both streams ``(N, channels, H, W)``."""

    def __init__(self, channels: int) -> None:
        super().__init__(bottleneck_branch(BlockShape(channels, channels, 1), last_relu=True))


class BasicDownsample(nn.Module):
    """``(x1, x2) -> (F(x1) + P(x2), h)``, with ``h`` the first activation of F.

    ``in -> out`` channels, H and W divided by the stride. Not reversible.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.f = basic_branch(BlockShape(in_channels, out_channels, stride), last_relu=True)
        self.projection = conv_bn(in_channels, out_channels, 1, stride, relu=False)

    def forward(self, streams: Streams) -> Streams:
        x1, x2 = (as_dtype_of(self, x) for x in streams)
        first, second = self.f
        hidden = first(x1)
        return second(hidden) + self.projection(x2), hidden


class BottleneckDownsample(nn.Module):
    """``(x1, x2) -> (F(x1) + P(x2), Q(x1))``.

    ``in -> out`` channels, H and W divided by the stride. Not reversible.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.f = bottleneck_branch(BlockShape(in_channels, out_channels, stride), last_relu=True)
        self.projection = conv_bn(in_channels, out_channels, 1, stride, relu=False)
        self.swap_projection = conv_bn(in_channels, out_channels, 1, stride, relu=False)

    def forward(self, streams: Streams) -> Streams:
        x1, x2 = (as_dtype_of(self, x) for x in streams)
        return self.f(x1) + self.projection(x2), self.swap_projection(x1)


class RevNetHead(nn.Module):
    """Concatenate, average pool, linear: two streams ``(N, channels, H, W)`` to ``(N, num_classes)``."""

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(2 * channels, num_classes)

    def forward(self, streams: Streams) -> Tensor:
        # Pooled first and joined after, which is the same and copies no feature map.
        pooled = torch.cat([as_dtype_of(self, x).mean(dim=(2, 3)) for x in streams], dim=1)
        return self.linear(pooled)


def revnet_layers(architecture: Architecture, *, imagenet: bool, num_classes: int, width: int) -> list[LayerSpec]:
    """Stem, blocks (reversible where the shape allows), head."""
    reversible = RevBottleneck if architecture.bottleneck else RevBasicBlock
    downsample = BottleneckDownsample if architecture.bottleneck else BasicDownsample
    shapes = block_shapes(architecture, width)
    layers = [LayerSpec(RevNetStem, width, imagenet)]
    for shape in shapes:
        if shape.changes_shape:
            layers.append(LayerSpec(downsample, shape.in_channels, shape.out_channels, shape.stride))
        else:
            layers.append(LayerSpec(reversible, shape.out_channels))
    layers.append(LayerSpec(RevNetHead, shapes[-1].out_channels, num_classes))
    return layers
