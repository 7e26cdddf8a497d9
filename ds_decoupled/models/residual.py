"""The convolutions that ResNet and RevNet share, so that the two differ in their wiring alone.

Unlike torchvision's ResNet every convolution has a bias and PyTorch's default initialisation, as in PETRA's code
(arXiv 2406.02052), whose parameter counts are met exactly.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchvision.ops import Conv2dNormActivation

BOTTLENECK_EXPANSION = 4


@dataclass(frozen=True)
class Architecture:
    """How many blocks each of the four groups has, and of which kind."""

    depths: tuple[int, int, int, int]
    bottleneck: bool


ARCHITECTURES = {
    "18": Architecture((2, 2, 2, 2), bottleneck=False),
    "34": Architecture((3, 4, 6, 3), bottleneck=False),
    "50": Architecture((3, 4, 6, 3), bottleneck=True),
}


@dataclass(frozen=True)
class BlockShape:
    """One residual block: channels in, channels out, stride."""

    in_channels: int
    out_channels: int
    stride: int

    @property
    def changes_shape(self) -> bool:
        """Whether the block's output differs in shape from its input, so that it needs a projection."""
        return self.stride != 1 or self.in_channels != self.out_channels


def block_shapes(architecture: Architecture, width: int) -> list[BlockShape]:
    """The blocks in order: groups of ``width * (1, 2, 4, 8)`` planes; all but the first start with stride 2."""
    shapes: list[BlockShape] = []
    channels = width
    for group, depth in enumerate(architecture.depths):
        out_channels = (width << group) * (BOTTLENECK_EXPANSION if architecture.bottleneck else 1)
        for block in range(depth):
            # The first group keeps the stem's resolution, as in torchvision's ResNet.
            shapes.append(BlockShape(channels, out_channels, 2 if group > 0 and block == 0 else 1))
            channels = out_channels
    return shapes


def conv_bn(in_channels: int, out_channels: int, kernel: int, stride: int = 1, *, relu: bool = True) -> nn.Module:
    """Convolution with bias, batch norm and, if ``relu``, an in-place ReLU on the batch norm's output."""
    activation = nn.ReLU if relu else None
    return Conv2dNormActivation(in_channels, out_channels, kernel, stride, activation_layer=activation, bias=True)


def basic_branch(shape: BlockShape, *, last_relu: bool) -> nn.Sequential:
    """3x3 conv, BN, ReLU, 3x3 conv, BN(, ReLU); the stride is in the first convolution."""
    return nn.Sequential(
        conv_bn(shape.in_channels, shape.out_channels, 3, shape.stride),
        conv_bn(shape.out_channels, shape.out_channels, 3, relu=last_relu),
    )


def bottleneck_branch(shape: BlockShape, *, last_relu: bool) -> nn.Sequential:
    """1x1, 3x3, 1x1 conv, each with BN and ReLU (the last ReLU by choice); the stride is in the 3x3 one.

    That is torchvision's place for it; the parameter count does not tell which one PETRA's authors chose.
    """
    planes = shape.out_channels // BOTTLENECK_EXPANSION
    return nn.Sequential(
        conv_bn(shape.in_channels, planes, 1),
        conv_bn(planes, planes, 3, shape.stride),
        conv_bn(planes, shape.out_channels, 1, relu=last_relu),
    )


def stem_conv(out_channels: int, *, imagenet: bool, in_channels: int = 3) -> nn.Module:
    """First convolution with BN and ReLU.

    CIFAR form: 3x3, ``(N, in, H, W) -> (N, out, H, W)``. ImageNet form: 7x7 stride 2 and 3x3 max-pool stride 2,
    ``(N, in, H, W) -> (N, out, H/4, W/4)``.
    """
    if not imagenet:
        return conv_bn(in_channels, out_channels, 3)
    return nn.Sequential(conv_bn(in_channels, out_channels, 7, 2), nn.MaxPool2d(kernel_size=3, stride=2, padding=1))


def as_dtype_of(module: nn.Module, x: Tensor) -> Tensor:
    """``x`` in the type of ``module``'s parameters, if both are floating point.

    In bf16 the streams of reversible blocks stay float32, so the next layer that is not reversible has to cast.
    """
    dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)
    return x.to(dtype) if x.is_floating_point() and x.dtype != dtype else x
