"""Image data and micro-batches: every kind of data, on small copies made here; nothing is downloaded."""

from __future__ import annotations

import io
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from data.augmentation import crop_and_flip, random_box
from data.images import load_images
from data.micro_batches import DRAWS, MicroBatches, in_order
from data.samples import EncodedImages, TensorImages, split_by_class
from ds_decoupled.errors import ConfigError


def picture(number: int, size: int = 12) -> Image.Image:
    pixels = np.random.default_rng(number).integers(0, 256, (size, size, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def encoded(number: int, size: int = 12) -> bytes:
    buffer = io.BytesIO()
    picture(number, size).save(buffer, "PNG")
    return buffer.getvalue()


def class_folders(path: Path, classes: dict[str, int], size: int = 12) -> None:
    for name, count in classes.items():
        (path / name).mkdir(parents=True)
        for number in range(count):
            picture(number, size).save(path / name / f"{number:03d}.png")


def tensor_images(count: int, *, flip: bool = True, size: int = 8) -> TensorImages:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 3, size, size), generator=generator).to(torch.uint8)
    return TensorImages(images, torch.arange(count), torch.full((3,), 0.5), torch.ones(3), flip=flip)


# The data


def test_digits() -> None:
    data = load_images("digits", image_size=32)
    train, test = data.train, data.test
    assert (len(train.labels), len(test.labels), data.num_classes, data.form) == (1442, 355, 10, "cifar10")
    assert test.labels.bincount().min() >= 34
    assert isinstance(train, TensorImages) and not train.flip and train.padding == 4
    images = train.batch(torch.arange(1442), None)
    assert images.shape == (1442, 3, 32, 32) and images.dtype == torch.float32
    torch.testing.assert_close(images.mean(), torch.tensor(0.0), atol=1e-3, rtol=0)
    torch.testing.assert_close(images.std(), torch.tensor(1.0), atol=1e-3, rtol=0)
    assert load_images("digits").train.batch(torch.tensor([0]), None).shape == (1, 3, 16, 16)


def test_folder_of_small_images(tmp_path: Path) -> None:
    class_folders(tmp_path / "train", {"cat": 3, "dog": 4})
    class_folders(tmp_path / "val", {"dog": 2})
    data = load_images(str(tmp_path))
    assert (data.image_size, data.form, data.num_classes) == (12, "cifar10", 2)
    assert data.train.labels.tolist() == [0, 0, 0, 1, 1, 1, 1] and data.test.labels.tolist() == [1, 1]
    assert isinstance(data.train, TensorImages)
    assert torch.equal(data.train.images[4], torch.from_numpy(np.array(picture(1))).permute(2, 0, 1))


def test_folder_without_test_part_is_split(tmp_path: Path) -> None:
    class_folders(tmp_path, {"a": 10, "b": 7, "c": 2})
    data = load_images(str(tmp_path))
    assert data.train.labels.bincount().tolist() == [8, 6, 2]
    assert data.test.labels.bincount().tolist() == [2, 1]


def test_folder_of_large_images(tmp_path: Path) -> None:
    class_folders(tmp_path / "train", {"a": 3, "b": 3}, size=80)
    class_folders(tmp_path / "test", {"a": 1}, size=80)
    data = load_images(str(tmp_path), image_size=72)
    assert data.form == "imagenet" and isinstance(data.train, EncodedImages)
    draws = torch.rand(4, DRAWS)
    first, again = (data.train.batch(torch.tensor([0, 5, 1, 2]), draws) for _ in range(2))
    assert first.shape == (4, 3, 72, 72) and torch.equal(first, again)
    assert load_images(str(tmp_path)).image_size == 224
    loader = MicroBatches(data.train, 2, seed=0)
    ahead = [next(loader) for _ in range(7)]
    loader.seek(4)
    assert torch.equal(next(loader)[0], ahead[4][0])


def test_parquet_folder(tmp_path: Path) -> None:
    from datasets import ClassLabel, Dataset, Features
    from datasets import Image as ImageFeature

    features = Features({"img": ImageFeature(), "label": ClassLabel(names=["x", "y", "z"])})
    for name, count in (("train-00000-of-00001", 6), ("test", 3)):
        images = [{"bytes": encoded(i), "path": None} for i in range(count)]
        rows = {"img": images, "label": [i % 2 for i in range(count)]}
        Dataset.from_dict(rows, features=features).to_parquet(str(tmp_path / f"{name}.parquet"))
    data = load_images(str(tmp_path))
    assert data.num_classes == 3 and data.train.labels.tolist() == [0, 1, 0, 1, 0, 1]
    assert isinstance(data.train, TensorImages)
    assert torch.equal(data.train.images[2], torch.from_numpy(np.array(picture(2))).permute(2, 0, 1))


def test_cifar10_from_torchvision_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torchvision.datasets

    class Fake:
        def __init__(self, root: str, train: bool, download: bool) -> None:
            self.data = np.zeros((4 if train else 2, 32, 32, 3), dtype=np.uint8)
            self.targets = [0, 9, 3, 1] if train else [2, 2]

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", Fake)
    data = load_images("cifar10", root=str(tmp_path))
    assert data.train.batch(torch.tensor([1, 2]), None).shape == (2, 3, 32, 32)
    assert data.train.labels.tolist() == [0, 9, 3, 1]


def test_imagenet32_batches(tmp_path: Path) -> None:
    (tmp_path / "imagenet32").mkdir()
    pixels = np.arange(2 * 3072).reshape(2, 3072).astype(np.uint8)
    (tmp_path / "imagenet32" / "train_data_batch_1").write_bytes(pickle.dumps({"data": pixels, "labels": [1, 1000]}))
    np.savez(tmp_path / "imagenet32" / "val_data.npz", data=pixels, labels=[7, 8])
    data = load_images("imagenet32", root=str(tmp_path))
    assert (data.num_classes, data.form) == (1000, "cifar10")
    assert data.train.labels.tolist() == [0, 999] and data.test.labels.tolist() == [6, 7]


# Errors


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "it is empty: no folder of a class"),
        ({"a/note.txt": b""}, "it is empty: no image"),
        ({"train/a/1.png": encoded(1)}, "no test/ or val/"),
        ({"train/a/1.png": encoded(1), "test/b/1.png": encoded(1)}, r"classes \['b'\] are not in"),
        ({"a/1.png": encoded(1)}, "none are left for testing"),
        ({"train/a/1.png": b"text", "test/a/1.png": encoded(1)}, "cannot be read as an image"),
    ],
)
def test_bad_folders(tmp_path: Path, files: dict[str, bytes], message: str) -> None:
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=message) as error:
        load_images(str(tmp_path))
    assert '"--data"' in str(error.value) and str(tmp_path) in str(error.value)


def test_bad_settings(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'no/such/folder'.*nor one of digits, cifar10, imagenet32, imagenet"):
        load_images("no/such/folder")
    with pytest.raises(ConfigError, match='"--num_classes": 5.*run from 0 to 9.*at least 10'):
        load_images("digits", num_classes=5)
    with pytest.raises(ConfigError, match='"--image_size": 4.*at least 8'):
        load_images("digits", image_size=4)
    with pytest.raises(ConfigError, match="no train_data_batch_.*image-net.org"):
        load_images("imagenet32", root=str(tmp_path))
    with pytest.raises(ConfigError, match="not under --data_root"):
        load_images("imagenet", root=str(tmp_path))


def test_bad_parquet(tmp_path: Path) -> None:
    from datasets import Dataset

    Dataset.from_dict({"text": ["a"], "label": [0]}).to_parquet(str(tmp_path / "train.parquet"))
    with pytest.raises(ConfigError, match=r"needs columns 'img' or 'image', and 'label', and has \['text', 'label'\]"):
        load_images(str(tmp_path))
    (tmp_path / "train.parquet").rename(tmp_path / "other.parquet")
    with pytest.raises(ConfigError, match=r"no train\*.parquet"):
        load_images(str(tmp_path))


def test_fewer_samples_than_a_micro_batch() -> None:
    with pytest.raises(ConfigError, match='"train_micro_batch_size_per_gpu": 4.*needs 8 samples.*have 7'):
        MicroBatches(tensor_images(7), 4, seed=0, replicas=2)
    with pytest.raises(ConfigError, match='"train_micro_batch_size_per_gpu": 0'):
        MicroBatches(tensor_images(7), 0, seed=0)


# Augmentation


def test_crop_and_flip_against_a_loop() -> None:
    images = torch.randint(0, 256, (16, 3, 8, 8)).to(torch.uint8)
    draws = torch.rand(16, DRAWS)
    result = crop_and_flip(images, draws, padding=2, flip=True)
    for image, (row, column, mirror, *_), got in zip(images, draws.tolist(), result, strict=True):
        padded = torch.zeros(3, 12, 12, dtype=torch.uint8)
        padded[:, 2:10, 2:10] = image
        top, left = int(row * 5), int(column * 5)
        want = padded[:, top : top + 8, left : left + 8]
        assert torch.equal(got, want.flip(-1) if mirror < 0.5 else want)


def test_no_flip_without_leave() -> None:
    images = torch.randint(0, 256, (4, 3, 8, 8)).to(torch.uint8)
    assert torch.equal(crop_and_flip(images, torch.zeros(4, DRAWS), padding=0, flip=False), images)


def test_random_box_stays_inside() -> None:
    for draws in torch.rand(200, DRAWS).tolist():
        left, top, right, bottom = random_box(50, 30, draws)
        assert 0 <= left < right <= 50 + 1e-9 and 0 <= top < bottom <= 30 + 1e-9


# Micro-batches


def take(loader: MicroBatches, count: int) -> tuple[Tensor, Tensor]:
    images, labels = zip(*(next(loader) for _ in range(count)), strict=True)
    return torch.cat(images), torch.cat(labels)


def test_an_epoch_has_every_sample_once_and_drops_the_rest() -> None:
    loader = MicroBatches(tensor_images(11), 3, seed=0)
    assert len(loader) == 3
    first, second = take(loader, 3)[1], take(loader, 3)[1]
    assert len(set(first.tolist())) == len(set(second.tolist())) == 9
    assert first.tolist() != second.tolist()


def test_content_depends_on_seed_and_position_alone() -> None:
    samples = tensor_images(12)
    one = MicroBatches(samples, 4, seed=3)
    images, labels = take(one, 7)
    torch.manual_seed(99)
    state = torch.get_rng_state()
    other = MicroBatches(samples, 4, seed=3)
    other.seek(5)
    later, later_labels = take(other, 2)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(later, images[20:]) and torch.equal(later_labels, labels[20:])
    assert not torch.equal(take(MicroBatches(samples, 4, seed=4), 7)[1], labels)


def test_replicas_share_what_one_would_see() -> None:
    samples = tensor_images(20)
    whole_images, whole_labels = take(MicroBatches(samples, 4, seed=1), 10)
    loaders = [MicroBatches(samples, 2, seed=1, replica=r, replicas=2) for r in range(2)]
    pairs = [next(loader) for _ in range(10) for loader in loaders]
    assert torch.equal(torch.cat([labels for _, labels in pairs]), whole_labels)
    assert torch.equal(torch.cat([images for images, _ in pairs]), whole_images)


def test_in_order_pads_the_last_micro_batch() -> None:
    samples = tensor_images(7)
    batches = list(in_order(samples, 3))
    assert [labels.tolist() for _, labels in batches] == [[0, 1, 2], [3, 4, 5], [6, 6, 6]]
    assert torch.equal(torch.cat([images for images, _ in batches])[:7], samples.batch(torch.arange(7), None))


def test_split_by_class_is_stratified_and_complete() -> None:
    labels = torch.tensor([0, 1] * 50)
    train, test = split_by_class(labels)
    assert sorted([*train.tolist(), *test.tolist()]) == list(range(100))
    assert labels[test].bincount().tolist() == [10, 10]
