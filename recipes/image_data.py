"""Images to classify: scikit-learn's digits, torchvision's data sets, a folder of images or of parquet files.

Small images live in memory as bytes and are augmented a micro-batch at a time (crop with padding and flip, as in the
PETRA paper); large ones are decoded when needed (random resized crop and flip, torchvision's custom for ImageNet).
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from micro_batches import Samples
from options import refuse_beyond_memory
from parquet_images import read_parts
from pictures import Source, as_tensor, open_image
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional

from ds_decoupled.errors import ConfigError

NAMED = ("digits", "cifar10", "imagenet32", "imagenet")
IN_MEMORY_SIZE = 64
"""Images up to this many pixels a side are decoded once and kept."""
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SMALLEST = 8
"""Pixels a side that the models need."""
MOST_CLASSES_UNASKED = 1000
"""More classes than this and than training images are labels gone wrong, unless ``--num_classes`` says so."""
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


def load_images(
    data: str, *, root: str = "data", image_size: int | None = None, num_classes: int | None = None
) -> ImageData:
    """Training and test images by name or path.

    Args:
        data: one of ``NAMED``, or a folder: ``train*.parquet`` and ``test*.parquet`` with columns ``img`` or ``image``,
            and ``label``; or ``train/CLASS/*`` and ``test/CLASS/*`` (or ``val``); or ``CLASS/*``, of which one image in
            five becomes the test part.
        root: where torchvision's data sets are or are downloaded to.
        image_size: pixels a side; by default 16 for ``digits``, the data's own for small images, 224 for large.
        num_classes: outputs of the model, where it should have more than the data have classes.

    Raises:
        ConfigError: unknown, missing, empty or unreadable data, or labels outside of ``num_classes``. Of images that are
            decoded when they are needed, broken ones show then.
    """
    if image_size is not None and image_size < SMALLEST:
        raise ConfigError("--image_size", image_size, f"the models need at least {SMALLEST} pixels a side")
    loaders: dict[str, Callable[[], ImageData]] = {
        "digits": lambda: _digits(image_size or 16),
        "cifar10": lambda: _cifar10(root, image_size or 32),
        "imagenet32": lambda: _imagenet32(root, image_size or 32),
        "imagenet": lambda: _imagenet(root, image_size or 224),
    }
    try:
        found = loaders[data]() if data in loaders else _folder(Path(data), image_size)
    except OSError as error:  # a folder or file that may not be read, or that is gone since it was listed
        raise ConfigError("--data", data, f"it cannot be read ({error})", "Is the path right, and may you read it?") from error
    classes = found.num_classes if num_classes is None else num_classes
    _check_labels(data, found, classes, given=num_classes is not None)
    return ImageData(found.train, found.test, classes, found.image_size, found.form)


def _check_labels(data: str, found: ImageData, classes: int, given: bool) -> None:
    for part, labels in (("training", found.train.labels), ("test", found.test.labels)):
        lowest, highest = int(labels.min()), int(labels.max())
        if given and highest >= classes:
            raise ConfigError("--num_classes", classes, f"the {part} labels of --data {data} run from {lowest} to {highest}",
                              f"Labels must lie in 0 to num_classes - 1: give at least {highest + 1}, or mend the labels")
        if lowest < 0 or highest >= classes:
            raise ConfigError("--data", data, f"its {part} labels run from {lowest} to {highest}, and its names or its "
                              f"training labels make {classes} classes",
                              f"Labels must lie in 0 to classes - 1: mend them, or give --num_classes {highest + 1}")
    count = len(found.train.labels)
    if not given and found.num_classes > max(count, MOST_CLASSES_UNASKED):
        raise ConfigError("--data", data, f"its labels run to {found.num_classes - 1}, and it has {count} training images",
                          "Number the classes from 0 without gaps, or give --num_classes")


def split_by_class(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Indices of a training and a test part, the same in every run: of each class, every fifth sample is for tests."""
    is_test = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        is_test[(labels == label).nonzero().flatten()[TEST_SHARE - 1 :: TEST_SHARE]] = True
    return (~is_test).nonzero().flatten(), is_test.nonzero().flatten()


def _in_memory(train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], classes: int, *, flip: bool) -> ImageData:
    """``(images, labels)`` of both parts, normalised by the mean and deviation of the training images."""
    images = train[0]
    sample = images[:: max(1, len(images) // 10_000)].float() / 255
    mean, std = sample.mean(dim=(0, 2, 3)), sample.std(dim=(0, 2, 3)).clamp_(min=1 / 255)
    parts = [TensorImages(x, y, mean, std, flip=flip) for x, y in (train, test)]
    return ImageData(parts[0], parts[1], classes, images.shape[-1], "cifar10")


def _resized(images: Tensor, size: int) -> Tensor:
    """uint8 ``(N, C, H, W)`` to uint8 ``(N, C, size, size)``."""
    if images.shape[-2:] == (size, size):
        return images
    refuse_beyond_memory("--image_size", size, 15.0 * len(images) * size**2, "all images in memory")  # as floats, and as bytes
    resized = functional.interpolate(images.float(), (size, size), mode="bilinear", antialias=True)
    return resized.round_().clamp_(0, 255).to(torch.uint8)


def _digits(size: int) -> ImageData:
    # joblib, which scikit-learn loads, makes a named semaphore that a killed process leaves in shared memory; no process of its
    # own is wanted here (https://joblib.readthedocs.io/en/stable/parallel.html).
    os.environ.setdefault("JOBLIB_MULTIPROCESSING", "0")
    from sklearn.datasets import load_digits

    bunch = load_digits()
    grey = torch.from_numpy(bunch.images).unsqueeze(1) * (255 / 16)
    images = _resized(grey.to(torch.uint8), size).expand(-1, 3, -1, -1)
    labels = torch.from_numpy(bunch.target).long()
    train, test = split_by_class(labels)
    return _in_memory((images[train], labels[train]), (images[test], labels[test]), 10, flip=False)


def _cifar10(root: str, size: int) -> ImageData:
    from torchvision.datasets import CIFAR10

    parts = []
    for train in (True, False):
        try:
            part = CIFAR10(root, train=train, download=True)
        except Exception as error:  # torchvision unpickles what lies there
            raise ConfigError(
                "--data",
                "cifar10",
                f"it is not under --data_root {root} and the download failed ({error})",
                "Put cifar-10-python.tar.gz there, or give the path of a folder of images or parquet files",
            ) from error
        images = torch.from_numpy(part.data).permute(0, 3, 1, 2)
        parts.append((_resized(images, size), torch.tensor(part.targets)))
    return _in_memory(parts[0], parts[1], 10, flip=True)


def _imagenet32(root: str, size: int) -> ImageData:
    """The downsampled ImageNet of Chrabaszcz et al. (arXiv 1707.08819), in its authors' pickled or npz batches."""
    parts = []
    for pattern in ("train_data_batch_*", "val_data*"):
        files = sorted((Path(root) / "imagenet32").glob(pattern))
        if not files:
            raise ConfigError(
                "--data",
                "imagenet32",
                f"no {pattern} under {Path(root) / 'imagenet32'}",
                "Download the 32x32 batches from image-net.org (it asks for a login) and unpack them there",
            )
        batches = [_imagenet32_batch(file) for file in files]
        images, labels = (torch.cat([batch[i] for batch in batches]) for i in (0, 1))
        parts.append((_resized(images, size), labels))
    return _in_memory(parts[0], parts[1], 1000, flip=True)


def _imagenet32_batch(file: Path) -> tuple[Tensor, Tensor]:
    """Images uint8 ``(N, 3, 32, 32)`` and labels from 0 ``(N,)`` of one file."""
    try:
        if file.suffix == ".npz":
            with np.load(file) as arrays:
                held = {name: arrays[name] for name in arrays.files}
        else:
            held = pickle.loads(file.read_bytes())
    except Exception as error:  # what unpickling raises depends on the bytes
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise _bad_batch(file, f"cannot be read ({reason})") from error
    if not isinstance(held, dict) or not {"data", "labels"} <= held.keys():
        found = sorted(map(str, held)) if isinstance(held, dict) else type(held).__name__
        raise _bad_batch(file, f"must hold 'data' and 'labels', and holds {found}")
    try:
        data, labels = np.asarray(held["data"]), np.asarray(held["labels"])
    except ValueError as error:  # rows of several lengths
        raise _bad_batch(file, f"holds no table ({error})") from error
    rows = len(data) if data.ndim else 0
    pixels = rows > 0 and data.dtype == np.uint8 and data.size == rows * 3072
    if not pixels or labels.shape != (rows,) or labels.dtype.kind not in "iu":
        raise _bad_batch(file, f"must hold bytes (N, 3072) and N whole numbers, and holds {data.dtype} {data.shape} and "
                         f"{labels.dtype} {labels.shape}")
    return torch.from_numpy(data).view(-1, 3, 32, 32), torch.from_numpy(labels.astype(np.int64)) - 1


def _bad_batch(file: Path, why: str) -> ConfigError:
    return ConfigError("--data", "imagenet32", f"{file} {why}", "Download and unpack it again")


def _imagenet(root: str, size: int) -> ImageData:
    from torchvision.datasets import ImageNet

    try:
        parts = [ImageNet(root, split).samples for split in ("train", "val")]
    except Exception as error:  # torchvision unpickles what lies there
        raise ConfigError(
            "--data",
            "imagenet",
            f"it is not under --data_root {root} ({error})",
            "Put the archives of ILSVRC2012 there (torchvision unpacks them), or give the path of a folder of images",
        ) from error
    return _from_sources(_sources(parts[0]), _sources(parts[1]), 1000, size)


def _folder(path: Path, size: int | None) -> ImageData:
    if not path.is_dir():
        raise ConfigError("--data", str(path), f"it is no folder, nor one of {', '.join(NAMED)}", "Check the path")
    if any(path.glob("*.parquet")):
        return _parquet_folder(path, size)
    if (path / "train").is_dir():
        classes = _classes(path / "train")
        test = next((path / name for name in ("test", "val", "validation") if (path / name).is_dir()), None)
        if test is None:
            raise ConfigError("--data", str(path), "it has train/ but no test/ or val/", "Add the test images")
        if unknown := set(_classes(test)) - set(classes):
            raise ConfigError("--data", str(test), f"classes {sorted(unknown)} are not in {path / 'train'}")
        parts = [_class_folders(part, classes) for part in (path / "train", test)]
        return _from_sources(parts[0], parts[1], len(classes), size)
    classes = _classes(path)
    sources, labels = _class_folders(path, classes)
    train, rest = split_by_class(labels)
    if not len(rest):
        raise ConfigError("--data", str(path), f"no class has {TEST_SHARE} images, so none are left for testing")
    halves = [([sources[i] for i in part.tolist()], labels[part]) for part in (train, rest)]
    return _from_sources(halves[0], halves[1], len(classes), size)


def _sources(samples: Sequence[tuple[str, int]]) -> tuple[list[Source], Tensor]:
    return [Path(file) for file, _ in samples], torch.tensor([label for _, label in samples])


def _classes(path: Path) -> list[str]:
    classes = sorted(entry.name for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not classes:
        raise ConfigError("--data", str(path), "it is empty: no folder of a class and no parquet file in it")
    return classes


def _class_folders(path: Path, classes: Sequence[str]) -> tuple[list[Source], Tensor]:
    from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

    numbers = {name: number for number, name in enumerate(classes)}
    samples = make_dataset(str(path), numbers, extensions=IMG_EXTENSIONS, allow_empty=True)
    if not samples:
        raise ConfigError("--data", str(path), f"it is empty: no image ({', '.join(IMG_EXTENSIONS)}) in its folders")
    return _sources(samples)


def _parquet_folder(path: Path, size: int | None) -> ImageData:
    train, test, classes = read_parts(path)
    return _from_sources((list(train.pictures), train.labels), (list(test.pictures), test.labels), classes, size)


def _from_sources(
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
    return _in_memory(tensors[0], tensors[1], classes, flip=True)


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
