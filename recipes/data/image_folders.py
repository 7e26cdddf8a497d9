"""A folder of images: by class, with or without a test part, or in parquet files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from data.parquet import read_parts
from data.pictures import Source
from data.samples import TEST_SHARE, ImageData, from_sources, sources_of, split_by_class
from ds_decoupled.errors import ConfigError


def from_folder(path: Path, size: int | None) -> ImageData:
    """Its training and test images.

    Args:
        size: pixels a side; by default what the images have, if they are small.

    Raises:
        ConfigError: where a part, a class or every image is missing, or a parquet file cannot be read.
    """
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
        return from_sources(parts[0], parts[1], len(classes), size)
    classes = _classes(path)
    sources, labels = _class_folders(path, classes)
    train, rest = split_by_class(labels)
    if not len(rest):
        raise ConfigError("--data", str(path), f"no class has {TEST_SHARE} images, so none are left for testing")
    halves = [([sources[i] for i in part.tolist()], labels[part]) for part in (train, rest)]
    return from_sources(halves[0], halves[1], len(classes), size)


def _parquet_folder(path: Path, size: int | None) -> ImageData:
    train, test, classes = read_parts(path)
    return from_sources((list(train.pictures), train.labels), (list(test.pictures), test.labels), classes, size)


def _classes(path: Path) -> list[str]:
    classes = sorted(entry.name for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not classes:
        raise ConfigError("--data", str(path), "it is empty: no folder of a class and no parquet file in it")
    return classes


def _class_folders(path: Path, classes: Sequence[str]) -> tuple[list[Source], Tensor]:
    # Of ImageFolder no more than this: it takes hidden folders for classes, and numbers those of the test part anew.
    from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

    numbers = {name: number for number, name in enumerate(classes)}
    samples = make_dataset(str(path), numbers, extensions=IMG_EXTENSIONS, allow_empty=True)
    if not samples:
        raise ConfigError("--data", str(path), f"it is empty: no image ({', '.join(IMG_EXTENSIONS)}) in its folders")
    return sources_of(samples)
