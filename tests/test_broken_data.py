"""Pictures and tables as they come: odd ones are read, broken ones are refused with a sentence that names file and row."""

from __future__ import annotations

import io
import os
import pickle
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest
import torch
from PIL import Image

from data.images import load_images
from data.pictures import as_tensor, open_image
from data.samples import EncodedImages, TensorImages
from ds_decoupled.errors import ConfigError

PIXELS = np.random.default_rng(0).integers(0, 256, (12, 12, 3), dtype=np.uint8)


def file_of(image: Image.Image, ending: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, ending, **options)
    return buffer.getvalue()


def rgb(number: int = 0, ending: str = "PNG", size: int = 12) -> bytes:
    return file_of(Image.fromarray(np.random.default_rng(number).integers(0, 256, (size, size, 3), dtype=np.uint8)), ending)


def png_of_size(width: int, height: int) -> bytes:
    """A header that promises so many pixels, and nothing behind it."""
    def chunk(kind: bytes, content: bytes) -> bytes:
        return len(content).to_bytes(4, "big") + kind + content + zlib.crc32(kind + content).to_bytes(4, "big")
    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, 0, 0, 0, 0])
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


# One picture


@pytest.mark.parametrize("image, options, tolerance", [
    (Image.fromarray(PIXELS).convert("CMYK"), {"format": "TIFF"}, 1),
    (Image.fromarray(PIXELS).convert("RGBA"), {"format": "PNG"}, 0),
    (Image.fromarray(PIXELS).quantize(), {"format": "PNG", "transparency": bytes(range(256))}, 60),
    (Image.fromarray(PIXELS), {"format": "PNG", "save_all": True, "append_images": [Image.new("RGB", (12, 12))]}, 0),
    (Image.fromarray(PIXELS), {"format": "TIFF", "save_all": True, "append_images": [Image.new("RGB", (5, 5))]}, 0),
], ids=["cmyk", "alpha", "palette", "animated", "pages"])
def test_odd_pictures_are_read(image: Image.Image, options: dict[str, Any], tolerance: int, tmp_path: Path) -> None:
    path = tmp_path / "picture"
    image.save(path, **options)
    difference = as_tensor(open_image(path)).int() - torch.from_numpy(PIXELS).permute(2, 0, 1).int()
    assert difference.abs().float().mean() <= tolerance


@pytest.mark.parametrize("ending", ["PNG", "PPM", "TIFF"])
def test_16_bits_are_scaled_and_not_cut_off(ending: str, tmp_path: Path) -> None:
    values = np.linspace(0, 65535, 144).reshape(12, 12).astype(np.uint16)
    path = tmp_path / "picture"
    Image.fromarray(values).save(path, ending)
    assert torch.equal(as_tensor(open_image(path))[1], torch.from_numpy((values // 256).astype(np.uint8)))


def damaged(content: bytes) -> bytes:
    """Whole, but with other bytes behind the header."""
    return content[:60] + bytes(b ^ 0x5A for b in content[60:])


@pytest.mark.parametrize("content, words", [
    (b"", "cannot be read as an image"),
    (rgb()[:300], "cannot be read as an image"),
    (damaged(rgb()), "cannot be read as an image"),
    (rgb(0, "JPEG")[:500], "(?i)truncated"),
    (rgb(0, "WEBP")[:-30], "cannot be read as an image"),
    (damaged(rgb(0, "TIFF")), "cannot be read as an image"),
    (png_of_size(20_000, 20_000), "more than 178 megapixels"),
    (png_of_size(2**30, 2**30), "more than 178 megapixels"),
    (png_of_size(12, 12), "cannot be read as an image"),
    (file_of(Image.fromarray(PIXELS[..., 0].astype(np.float32)), "TIFF"), "floating-point"),
    (file_of(Image.fromarray(PIXELS[..., 0].astype(np.int32)), "TIFF"), "32-bit"),
], ids=lambda value: value if isinstance(value, str) else str(len(value)))
def test_broken_pictures(content: bytes, words: str, tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=words) as error:
        open_image(path)
    assert str(error.value).startswith(f'"--data": {str(path)!r} cannot be used: ') and "\n" not in str(error.value)


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo, lambda path: path.symlink_to("nowhere"), lambda path: None],
                         ids=["folder", "pipe", "dangling", "nothing"])
def test_what_is_no_file(make: Callable[[Path], object], tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    make(path)
    with pytest.raises(ConfigError, match="no file that can be read"):
        open_image(path)


def test_a_folder_with_a_pictures_name_is_a_folder(tmp_path: Path) -> None:
    for name in ("train/a/1.png", "train/a/2.png/3.png", "test/a/1.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(rgb())
    assert len(load_images(str(tmp_path)).train.labels) == 2


def test_large_pictures_break_when_they_are_needed(tmp_path: Path) -> None:
    for part in ("train", "test"):
        (tmp_path / part / "a").mkdir(parents=True)
        for number in range(3):
            (tmp_path / part / "a" / f"{number}.png").write_bytes(rgb(number, size=80))
    (tmp_path / "train/a/2.png").write_bytes(png_of_size(30_000, 30_000))
    data = load_images(str(tmp_path))
    assert isinstance(data.train, EncodedImages)
    with pytest.raises(ConfigError, match=r"2\.png.*megapixels"):
        data.train.batch(torch.tensor([0, 2]), torch.rand(2, 5))


# Tables

BYTES = [rgb(i) for i in range(6)]
STRUCTS = [{"bytes": content, "path": None} for content in BYTES]
LABELS = [0, 1, 0, 1, 0, 1]


def tables(folder: Path, train: dict[str, Any], test: dict[str, Any] | None = None, name: str = "train") -> Path:
    parquet.write_table(arrow.table(train), folder / f"{name}.parquet")
    parquet.write_table(arrow.table(test or {"image": BYTES[:2], "label": [0, 1]}), folder / "test.parquet")
    return folder


@pytest.mark.parametrize("column", [BYTES, STRUCTS, arrow.array(BYTES, arrow.large_binary()), [{"bytes": b} for b in BYTES]],
                         ids=["bytes", "struct", "large", "no-path"])
def test_columns_that_hold_pictures(column: Any, tmp_path: Path) -> None:
    data = load_images(str(tables(tmp_path, {"image": column, "label": LABELS})))
    assert isinstance(data.train, TensorImages) and data.num_classes == 2 and data.train.labels.tolist() == LABELS
    assert torch.equal(data.train.images[3], as_tensor(Image.open(io.BytesIO(BYTES[3]))))


@pytest.mark.parametrize("train, words", [
    ({"image": BYTES, "label": list("ababab")}, "labels are of type string"),
    ({"image": BYTES, "label": [0.0, 1, 0, 1, 0, 1]}, "labels are of type double"),
    ({"image": BYTES, "label": [True, False] * 3}, "labels are of type bool"),
    ({"image": BYTES, "label": [[0], [1]] * 3}, "labels are of type list"),
    ({"image": BYTES, "label": [0, 1, None, 1, 0, 1]}, "label of row 2 is missing"),
    ({"image": BYTES, "label": [0, 1, 0, -1, 0, 1]}, "label of row 3 is -1"),
    ({"image": BYTES, "label": arrow.array([0, 1, 0, 2**64 - 1, 0, 1], arrow.uint64())}, "label of row 3 is 184467440"),
    ({"image": BYTES, "label": [0, 1, 0, 10**9, 0, 1]}, "labels run to 1000000000, and it has 6 training images"),
    ({"image": ["a.png"] * 6, "label": LABELS}, "pictures are of type string"),
    ({"image": [{"path": "a.png"}] * 6, "label": LABELS}, "pictures are of type struct"),
    ({"image": [[1, 2]] * 6, "label": LABELS}, "pictures are of type list"),
    ({"image": [*BYTES[:4], None, BYTES[5]], "label": LABELS}, "row 4 holds no picture's bytes"),
    ({"image": [*STRUCTS[:5], {"bytes": None, "path": "x.png"}], "label": LABELS}, "row 5 holds no picture's bytes"),
    ({"image": [*STRUCTS[:5], None], "label": LABELS}, "row 5 holds no picture's bytes"),
    ({"image": [None] * 6, "label": LABELS}, "row 0 holds no picture's bytes"),
    ({"image": [*BYTES[:4], b"", BYTES[5]], "label": LABELS}, "row 4 holds no picture's bytes"),
    ({"image": [*BYTES[:4], BYTES[4][:200], BYTES[5]], "label": LABELS}, "row 4 of .*cannot be read as an image"),
    ({"image": BYTES, "labels": LABELS}, r"has \['image', 'labels'\]"),
    ({"image": BYTES[:0], "label": arrow.array([], arrow.int64())}, "row|empty"),
], ids=lambda value: value if isinstance(value, str) else "")
def test_broken_tables(train: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=words) as error:
        load_images(str(tables(tmp_path, train)))
    assert '"--data"' in str(error.value) and str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_labels_of_one_part_beyond_the_others(tmp_path: Path) -> None:
    tables(tmp_path, {"image": BYTES, "label": LABELS}, {"image": BYTES[:2], "label": [0, 7]})
    with pytest.raises(ConfigError, match="its test labels run from 0 to 7.*make 2 classes.*--num_classes 8"):
        load_images(str(tmp_path))
    assert load_images(str(tmp_path), num_classes=8).num_classes == 8
    with pytest.raises(ConfigError, match='"--num_classes": 5.*test labels'):
        load_images(str(tmp_path), num_classes=5)


def test_files_of_one_part_that_differ(tmp_path: Path) -> None:
    tables(tmp_path, {"image": BYTES, "label": LABELS}, name="train-0")
    tables(tmp_path, {"img": BYTES, "label": LABELS}, name="train-1")
    assert len(load_images(str(tmp_path)).train.labels) == 12
    tables(tmp_path, {"picture": BYTES, "label": LABELS}, name="train-2")
    with pytest.raises(ConfigError, match=r"train-2\.parquet.*has \['picture', 'label'\]"):
        load_images(str(tmp_path))


def test_classes_that_are_named_otherwise(tmp_path: Path) -> None:
    from datasets import ClassLabel, Dataset, Features, Value

    for part, names in (("train", ["cat", "dog"]), ("test", ["dog", "cat"])):
        features = Features({"image": Value("binary"), "label": ClassLabel(names=names)})
        Dataset.from_dict({"image": BYTES, "label": LABELS}, features=features).to_parquet(str(tmp_path / f"{part}.parquet"))
    with pytest.raises(ConfigError, match="training files are cat, dog, those of the test files dog, cat"):
        load_images(str(tmp_path))


@pytest.mark.parametrize("spoil", [lambda path: path.write_bytes(b""), lambda path: path.write_bytes(b"no table"),
                                   lambda path: path.write_bytes(path.read_bytes()[:-40]),
                                   lambda path: path.write_bytes(damaged(path.read_bytes()[:-300]) + path.read_bytes()[-300:]),
                                   lambda path: (path.unlink(), path.mkdir()), lambda path: (path.unlink(), os.mkfifo(path))],
                         ids=["empty", "text", "cut", "damaged", "folder", "pipe"])
def test_what_is_no_parquet(spoil: Callable[[Path], object], tmp_path: Path) -> None:
    tables(tmp_path, {"image": BYTES, "label": LABELS})
    spoil(tmp_path / "train.parquet")
    with pytest.raises(ConfigError, match=r"train\.parquet' cannot be used: it cannot be read as parquet"):
        load_images(str(tmp_path))


# Batches of the downsampled ImageNet


@pytest.mark.parametrize("name, content, words", [
    ("train_data_batch_1", b"", "cannot be read"),
    ("train_data_batch_1", pickle.dumps({"data": PIXELS})[:20], "cannot be read"),
    ("train_data_batch_1", b"text, not a pickle", "cannot be read"),
    ("train_data_batch_1", pickle.dumps([1, 2]), "holds list"),
    ("train_data_batch_1", pickle.dumps({"data": PIXELS}), r"holds \['data'\]"),
    ("train_data_batch_1", pickle.dumps({"data": [[1, 2], [3]], "labels": [1, 2]}), "holds no table"),
    ("train_data_batch_1", pickle.dumps({"data": np.zeros((2, 3071), np.uint8), "labels": [1, 2]}), r"holds uint8 \(2, 3071\)"),
    ("train_data_batch_1", pickle.dumps({"data": np.zeros((2, 3072)), "labels": [1, 2]}), "holds float64"),
    ("train_data_batch_1", pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "labels": [1]}), r"int64 \(1,\)"),
    ("train_data_batch_1", pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "labels": ["a", "b"]}), "<U1"),
    ("train_data_batch_1", pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "labels": [0, 5]}), "labels run from -1"),
    ("train_data_batch_1", pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "labels": [1, 1001]}), "to 1000"),
    ("train_data_batch_1.npz", b"PK\x03\x04 cut off", "cannot be read"),
    ("train_data_batch_1.npz", b"", "cannot be read"),
    ("train_data_batch_1/", b"", "cannot be read"),
], ids=lambda value: value if isinstance(value, str) else "")
def test_broken_batches(name: str, content: bytes, words: str, tmp_path: Path) -> None:
    folder = tmp_path / "imagenet32"
    folder.mkdir()
    if name.endswith("/"):
        (folder / name).mkdir()
    else:
        (folder / name).write_bytes(content)
    (folder / "val_data").write_bytes(pickle.dumps({"data": np.zeros((1, 3072), np.uint8), "labels": [1]}))
    with pytest.raises(ConfigError, match=words) as error:
        load_images("imagenet32", root=str(tmp_path))
    assert '"--data": \'imagenet32\'' in str(error.value) and "\n" not in str(error.value)


def test_images_that_no_memory_holds() -> None:
    with pytest.raises(ConfigError, match='"--image_size": 100000.*GiB'):
        load_images("digits", image_size=100_000)
