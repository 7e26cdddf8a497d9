"""Images by their index: small ones in memory as bytes, large ones decoded when they are needed.

Those in memory are augmented a micro-batch at a time (crop with padding and flip, as in the PETRA paper), the others one by one
(random resized crop and flip, torchvision's custom for ImageNet).
"""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional

from data.augmentation import crop_and_flip, random_box
from data.micro_batches import Samples
from data.pictures import Source, as_tensor, open_image
from run.options import refuse_beyond_memory

IN_MEMORY_SIZE = 64
"""Images up to this many pixels a side are decoded once and kept."""
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SMALLEST = 8
"""Pixels a side that the models need."""
TEST_SHARE = 5
"""Where the data have no test part, one image in so many of each class becomes it."""


@dataclass(frozen=True)
class ImageData:
    """Training and test images; ``form`` is the model's form, ``cifar10`` (small images) or ``imagenet`` (large)."""

    train: Samples
    test: Samples
    num_classes: int
    image_size: int
    form: str


class TensorImages:
    """Images in memory.

    Args:
        images: uint8 ``(N, 3, S, S)``.
        labels: int64 ``(N,)``.
        mean, std: per channel, of pixels in [0, 1].
        flip: whether a mirrored image is as good as the image.
        padding: the random crop moves by up to this many pixels; by default an eighth of the side, the paper's 4 of 32.
    """

    slow = False

    def __init__(
        self, images: Tensor, labels: Tensor, mean: Tensor, std: Tensor, *, flip: bool, padding: int | None = None
    ) -> None:
        self.images = images
        self.labels = labels
        self.flip = flip
        self.padding = images.shape[-1] // 8 if padding is None else padding
        self._shift = 255 * mean.view(1, -1, 1, 1)
        self._scale = 1 / (255 * std.view(1, -1, 1, 1))

    def first(self, count: int) -> TensorImages:
        """The first ``count`` of them, normalised alike."""
        part = copy.copy(self)
        part.images, part.labels = self.images[:count], self.labels[:count]
        return part

    def batch(self, indices: Tensor, draws: Tensor | None) -> Tensor:
        """Normalised float32 ``(n, 3, S, S)``."""
        images = self.images[indices]
        if draws is not None:
            images = crop_and_flip(images, draws, padding=self.padding, flip=self.flip)
        return images.float().sub_(self._shift).mul_(self._scale)


class EncodedImages:
    """Images decoded when they are needed, on threads.

    Args:
        sources: files, or rows of tables.
        labels: int64 ``(N,)``.
        size: pixels a side of what ``batch`` gives.
    """

    slow = True

    def __init__(self, sources: Sequence[Source], labels: Tensor, size: int) -> None:
        self.sources = sources
        self.labels = labels
        self.size = size
        self._threads = ThreadPoolExecutor(min(16, os.cpu_count() or 1))
        self._mean = 255 * torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1)
        self._scale = 1 / (255 * torch.tensor(IMAGENET_STD).view(1, 3, 1, 1))

    def batch(self, indices: Tensor, draws: Tensor | None) -> Tensor:
        """Normalised float32 ``(n, 3, size, size)``: random resized crops and flips, or centre crops."""
        rows = [None] * len(indices) if draws is None else draws.tolist()
        images = self._threads.map(self._image, indices.tolist(), rows)
        return torch.stack(list(images)).float().sub_(self._mean).mul_(self._scale)

    def _image(self, index: int, draws: list[float] | None) -> Tensor:
        image = open_image(self.sources[index])
        if draws is None:
            # torchvision's evaluation: the short side resized to 8/7 of the size, then the centre.
            return as_tensor(ImageOps.fit(image, (self.size, self.size), Image.Resampling.BILINEAR, bleed=1 / 16))
        box = random_box(image.width, image.height, draws)
        image = image.resize((self.size, self.size), Image.Resampling.BILINEAR, box=box)
        return as_tensor(ImageOps.mirror(image) if draws[4] < 0.5 else image)


def in_memory(train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], classes: int, *, flip: bool) -> ImageData:
    """``(images, labels)`` of both parts, normalised by the mean and deviation of the training images."""
    images = train[0]
    sample = images[:: max(1, len(images) // 10_000)].float() / 255
    mean, std = sample.mean(dim=(0, 2, 3)), sample.std(dim=(0, 2, 3)).clamp_(min=1 / 255)
    parts = [TensorImages(x, y, mean, std, flip=flip) for x, y in (train, test)]
    return ImageData(parts[0], parts[1], classes, images.shape[-1], "cifar10")


def from_sources(
    train: tuple[list[Source], Tensor], test: tuple[list[Source], Tensor], classes: int, size: int | None
) -> ImageData:
    """Small images decoded into memory, large ones left encoded; the first image tells which they are."""
    if size is None:
        first = max(open_image(train[0][0]).size)
        size = max(first, SMALLEST) if first <= IN_MEMORY_SIZE else 224
    if size > IN_MEMORY_SIZE:
        parts = [EncodedImages(sources, labels, size) for sources, labels in (train, test)]
        return ImageData(parts[0], parts[1], classes, size, "imagenet")
    tensors = [(_decode(sources, size), labels) for sources, labels in (train, test)]
    return in_memory(tensors[0], tensors[1], classes, flip=True)


def sources_of(samples: Sequence[tuple[str, int]]) -> tuple[list[Source], Tensor]:
    """Files and labels ``(N,)`` of torchvision's pairs."""
    return [Path(file) for file, _ in samples], torch.tensor([label for _, label in samples])


def split_by_class(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Indices of a training and a test part, the same in every run: of each class, every fifth sample is for tests."""
    is_test = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        is_test[(labels == label).nonzero().flatten()[TEST_SHARE - 1 :: TEST_SHARE]] = True
    return (~is_test).nonzero().flatten(), is_test.nonzero().flatten()


def resized(images: Tensor, size: int) -> Tensor:
    """uint8 ``(N, C, H, W)`` to uint8 ``(N, C, size, size)``."""
    if images.shape[-2:] == (size, size):
        return images
    refuse_beyond_memory("--image_size", size, 15.0 * len(images) * size**2, "all images in memory")  # as floats, and as bytes
    # In floats: torchvision's resize has another kernel for bytes, with other roundings.
    found = functional.interpolate(images.float(), (size, size), mode="bilinear", antialias=True)
    return found.round_().clamp_(0, 255).to(torch.uint8)


def _decode(sources: Sequence[Source], size: int) -> Tensor:
    """uint8 ``(N, 3, size, size)``; images of another size are resized and cropped at the centre."""
    refuse_beyond_memory("--image_size", size, 3.0 * len(sources) * size**2, "all images in memory")
    images = torch.empty(len(sources), 3, size, size, dtype=torch.uint8)

    def decode(index: int) -> None:
        image = open_image(sources[index])
        if image.size != (size, size):
            image = ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR)
        images[index] = as_tensor(image)

    with ThreadPoolExecutor() as threads:
        list(threads.map(decode, range(len(sources))))
    return images
