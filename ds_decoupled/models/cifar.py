"""The residual networks of small images: ResNet-20 to 110 (He et al., arXiv 1512.03385, section 4.2) and WideResNet (Zagoruyko
and Komodakis, arXiv 1605.07146), as lists of layers for a pipeline.

Three groups of blocks at full, half and quarter resolution; no convolution has a bias::

    ResNet-(6n+2)        stem  x n blocks  relu(x' + bn(conv(relu(bn(conv(x))))))      width, 2 width, 4 width; width 16
    WideResNet-(6n+4)-k  stem  x n blocks  x' + conv(relu(bn(conv(relu(bn(x))))))      width, 2 width, 4 width; width 16 k

Where the shape changes, x' is every other pixel with channels of zeros (ResNet, so that it has no weights: "option A"), or a
1x1 convolution of ``relu(bn(x))`` (WideResNet).
"""

from __future__ import annotations

from deepspeed.pipe import LayerSpec
from torch import Tensor, nn
from torch.nn import functional as F

from ds_decoupled.models.residual import as_dtype_of

WIDE_STEM = 16
"""Channels of a WideResNet's stem, whatever its width."""


def _conv(inputs: int, outputs: int, stride: int = 1, kernel: int = 3) -> nn.Conv2d:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return conv


class CifarStem(nn.Module):
    """``(N, 3, H, W) -> (N, channels, H, W)``; batch norm and ReLU follow in a ResNet, not in a WideResNet."""

    def __init__(self, channels: int, normed: bool) -> None:
        super().__init__()
        self.conv = _conv(3, channels)
        self.norm: nn.Module = nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU(inplace=True)) if normed else nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        y: Tensor = self.norm(self.conv(as_dtype_of(self, images)))
        return y


class CifarBlock(nn.Module):
    """A ResNet's: ``(N, in, H, W) -> (N, out, H/stride, W/stride)``."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.stride, self.zeros = stride, outputs - inputs
        self.branch = nn.Sequential(_conv(inputs, outputs, stride), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True),
                                    _conv(outputs, outputs), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        x = as_dtype_of(self, x)
        kept = x[:, :, ::self.stride, ::self.stride] if self.stride > 1 else x
        if self.zeros:
            before = self.zeros // 2
            kept = F.pad(kept, (0, 0, 0, 0, before, self.zeros - before))
        return F.relu(self.branch(x) + kept, inplace=True)


class WideBlock(nn.Module):
    """A WideResNet's: ``(N, in, H, W) -> (N, out, H/stride, W/stride)``."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.BatchNorm2d(inputs), nn.ReLU(inplace=True))
        self.branch = nn.Sequential(_conv(inputs, outputs, stride), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True),
                                    _conv(outputs, outputs))
        self.projection = _conv(inputs, outputs, stride, kernel=1) if stride > 1 or inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        x = as_dtype_of(self, x)
        active = self.first(x)
        y: Tensor = self.branch(active) + (x if self.projection is None else self.projection(active))
        return y


class CifarHead(nn.Module):
    """Average pool and linear, behind batch norm and ReLU in a WideResNet: ``(N, channels, H, W) -> (N, num_classes)``."""

    def __init__(self, channels: int, num_classes: int, normed: bool) -> None:
        super().__init__()
        self.norm: nn.Module = nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU(inplace=True)) if normed else nn.Identity()
        self.linear = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.linear(self.norm(as_dtype_of(self, x)).mean(dim=(2, 3)))
        return logits


def cifar_layers(depth: int, wide: bool, *, num_classes: int, width: int) -> list[LayerSpec]:
    """Stem, ``3 n`` blocks, head.

    Args:
        depth: ``6n + 2``, or ``6n + 4`` of a WideResNet.
        wide: which of the two.
        width: channels of the first group; 16 k of a WideResNet-k.
    """
    count, channels = (depth - (4 if wide else 2)) // 6, WIDE_STEM if wide else width
    layers = [LayerSpec(CifarStem, channels, not wide)]
    for group in range(3):
        for block in range(count):
            kind, stride = WideBlock if wide else CifarBlock, 2 if group and not block else 1
            layers.append(LayerSpec(kind, channels, width << group, stride))
            channels = width << group
    return [*layers, LayerSpec(CifarHead, channels, num_classes, wide)]
