"""Images to classify, by a name or a path: what they come to, and whether their labels can be trained on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from data.image_folders import from_folder
from data.named_images import cifar10, digits, imagenet, imagenet32
from data.samples import SMALLEST, ImageData
from ds_decoupled.errors import ConfigError

NAMED = ("digits", "cifar10", "imagenet32", "imagenet")
MOST_CLASSES_UNASKED = 1000
"""More classes than this and than training images are labels gone wrong, unless ``--num_classes`` says so."""


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
        "digits": lambda: digits(image_size or 16),
        "cifar10": lambda: cifar10(root, image_size or 32),
        "imagenet32": lambda: imagenet32(root, image_size or 32),
        "imagenet": lambda: imagenet(root, image_size or 224),
    }

    def from_path() -> ImageData:
        if not Path(data).is_dir():
            raise ConfigError("--data", data, f"it is no folder, nor one of {', '.join(NAMED)}", "Check the path")
        return from_folder(Path(data), image_size)

    try:
        found = loaders.get(data, from_path)()
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
