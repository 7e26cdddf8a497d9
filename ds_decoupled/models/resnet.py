"""ResNet-18/34/50 (He et al., arXiv 1512.03385) as a list of layers for a pipeline."""

from __future__ import annotations

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


class ResNetStem(nn.Module):
    """Images ``(N, 3, H, W)`` to features ``(N, channels, H', W')``; see :func:`residual.stem_conv` for H' and W'."""

    def __init__(self, channels: int, imagenet: bool) -> None:
        super().__init__()
        self.conv = stem_conv(channels, imagenet=imagenet)

    def forward(self, images: Tensor) -> Tensor:
        return self.conv(as_dtype_of(self, images))


class ResNetBlock(nn.Module):
    """``x -> relu(branch(x) + projection(x))``: ``(N, in, H, W) -> (N, out, H/stride, W/stride)``.

    The projection is a 1x1 convolution with BN where the shape changes, else the identity.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, bottleneck: bool) -> None:
        super().__init__()
        shape = BlockShape(in_channels, out_channels, stride)
        self.branch = (bottleneck_branch if bottleneck else basic_branch)(shape, last_relu=False)
        self.projection: nn.Module = nn.Identity()
        if shape.changes_shape:
            self.projection = conv_bn(in_channels, out_channels, 1, stride, relu=False)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = as_dtype_of(self, x)
        return self.relu(self.branch(x) + self.projection(x))


class ResNetHead(nn.Module):
    """Average pool and linear: ``(N, channels, H, W) -> (N, num_classes)``."""

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(as_dtype_of(self, x).mean(dim=(2, 3)))


def resnet_layers(architecture: Architecture, *, imagenet: bool, num_classes: int, width: int) -> list[LayerSpec]:
    """Stem, residual blocks, head."""
    shapes = block_shapes(architecture, width)
    return [
        LayerSpec(ResNetStem, width, imagenet),
        *(
            LayerSpec(ResNetBlock, shape.in_channels, shape.out_channels, shape.stride, architecture.bottleneck)
            for shape in shapes
        ),
        LayerSpec(ResNetHead, shapes[-1].out_channels, num_classes),
    ]
