"""Data sets that have a name: scikit-learn's digits, and those that torchvision or their authors hand out."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data.samples import ImageData, from_sources, in_memory, resized, sources_of, split_by_class
from ds_decoupled.errors import ConfigError


def digits(size: int) -> ImageData:
    """scikit-learn's 1,797 handwritten digits, 8 x 8, which are not mirrored in training."""
    # joblib, which scikit-learn loads, makes a named semaphore that a killed process leaves in shared memory; no process of its
    # own is wanted here (https://joblib.readthedocs.io/en/stable/parallel.html).
    os.environ.setdefault("JOBLIB_MULTIPROCESSING", "0")
    from sklearn.datasets import load_digits

    bunch = load_digits()
    grey = torch.from_numpy(bunch.images).unsqueeze(1) * (255 / 16)
    images = resized(grey.to(torch.uint8), size).expand(-1, 3, -1, -1)
    labels = torch.from_numpy(bunch.target).long()
    train, test = split_by_class(labels)
    return in_memory((images[train], labels[train]), (images[test], labels[test]), 10, flip=False)


def cifar10(root: str, size: int) -> ImageData:
    """CIFAR-10 by torchvision, downloaded to ``root`` where it is not there."""
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
        parts.append((resized(images, size), torch.tensor(part.targets)))
    return in_memory(parts[0], parts[1], 10, flip=True)


def imagenet32(root: str, size: int) -> ImageData:
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
        parts.append((resized(images, size), labels))
    return in_memory(parts[0], parts[1], 1000, flip=True)


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


def imagenet(root: str, size: int) -> ImageData:
    """ILSVRC2012 by torchvision, in ``root``."""
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
    return from_sources(sources_of(parts[0]), sources_of(parts[1]), 1000, size)
