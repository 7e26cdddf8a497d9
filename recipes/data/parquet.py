"""Images in parquet files: a column of encoded pictures and one of labels, whole numbers from 0.

Pictures stand in a column ``img`` or ``image``, as bytes or, as ``datasets`` writes them, as ``{"bytes", "path"}``. All that
a table can show is looked at before training; a picture that cannot be decoded shows later. Read by pyarrow and not by
``datasets``, which would copy all of it into its cache and could not name the row that is wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.pictures import Row, is_picture
from ds_decoupled.errors import ConfigError

IMAGE_COLUMNS = ("img", "image")
LABEL_COLUMN = "label"


@dataclass(frozen=True)
class Part:
    """The pictures of some files, and their labels ``(N,)``; ``names`` of classes, where the files tell any."""

    pictures: list[Row]
    labels: Tensor
    names: tuple[str, ...] | None


def read_parts(folder: Path) -> tuple[Part, Part, int]:
    """Training and test part of a folder, and the number of classes: the names that it gives them, or else the training labels.

    Raises:
        ConfigError: for files or columns that are missing or of another kind, and for labels that are none.
    """
    train, test = (_part(folder, names) for names in (("train",), ("test", "val", "validation")))
    if train.names != test.names:
        raise ConfigError("--data", str(folder), f"the classes of the training files are {_told(train.names)}, those of the "
                          f"test files {_told(test.names)}", "Write both from one data set")
    if train.names is not None:
        return train, test, len(train.names)
    return train, test, int(train.labels.max()) + 1


def _part(folder: Path, names: Sequence[str]) -> Part:
    files = sorted(file for name in names for file in folder.glob(f"{name}*.parquet"))
    if not files:
        raise ConfigError("--data", str(folder), f"it has parquet files but no {names[0]}*.parquet", "Rename them")
    parts = [_read(file) for file in files]
    for file, part in zip(files, parts):
        if part.names != parts[0].names:
            raise ConfigError("--data", str(file), f"its classes are {_told(part.names)}, those of {files[0].name} "
                              f"{_told(parts[0].names)}", "Write all files from one data set")
    pictures = [picture for part in parts for picture in part.pictures]
    if not pictures:
        raise ConfigError("--data", str(folder), f"it is empty: no rows in {names[0]}*.parquet")
    return Part(pictures, torch.cat([part.labels for part in parts]), parts[0].names)


def _read(file: Path) -> Part:
    import pyarrow.parquet as parquet

    try:
        if not file.is_file():
            raise OSError("it is no file")
        table = parquet.read_table(file, partitioning=None)
        table.validate(full=True)
    except Exception as error:  # pyarrow's own, OSError, and whatever its decoders raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError("--data", str(file), f"it cannot be read as parquet ({reason})", "Remove or replace it") from error
    columns = table.column_names
    image = next((name for name in IMAGE_COLUMNS if name in columns), None)
    if image is None or columns.count(image) != 1 or columns.count(LABEL_COLUMN) != 1:
        raise ConfigError("--data", str(file), f"it needs columns 'img' or 'image', and 'label', and has {columns}")
    return Part(_pictures(file, table.column(image)), _labels(file, table.column(LABEL_COLUMN)), _class_names(table.schema))


def _pictures(file: Path, column: Any) -> list[Row]:
    import pyarrow as arrow
    import pyarrow.compute as compute

    kind = column.type
    if arrow.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        column = compute.struct_field(column, "bytes")
    inner = column.type
    if not (arrow.types.is_binary(inner) or arrow.types.is_large_binary(inner) or arrow.types.is_binary_view(inner)
            or arrow.types.is_null(inner)):
        raise ConfigError("--data", str(file), f"its pictures are of type {kind}, and bytes are taken, or a struct with "
                          "a field 'bytes' of that type", "Write the encoded files into the table")
    rows = column.to_pylist()
    for number, content in enumerate(rows):
        if not is_picture(content):
            raise ConfigError("--data", str(file), f"row {number} holds no picture's bytes"
                              + (", only a path perhaps" if arrow.types.is_struct(kind) else ""),
                              "Write the encoded files into the table, and leave out rows without one")
    return [Row(file, number, content) for number, content in enumerate(rows)]


def _labels(file: Path, column: Any) -> Tensor:
    import pyarrow as arrow

    if not arrow.types.is_integer(column.type):
        raise ConfigError("--data", str(file), f"its labels are of type {column.type}, and whole numbers from 0 are taken",
                          "Number the classes")
    labels = column.to_pylist()
    for number, label in enumerate(labels):
        if label is None or not 0 <= label < 2**31:
            raise ConfigError("--data", str(file), f"the label of row {number} is {'missing' if label is None else label}, and "
                              "whole numbers from 0 are taken", "Mend it or leave the row out")
    return torch.tensor(labels, dtype=torch.long)


def _class_names(schema: Any) -> tuple[str, ...] | None:
    """What ``datasets`` has noted in the file, if it has."""
    from datasets import ClassLabel, Features

    try:
        feature = Features.from_arrow_schema(schema).get(LABEL_COLUMN)
    except Exception:  # notes of another version, or damaged ones: then there are no names
        return None
    return tuple(feature.names) if isinstance(feature, ClassLabel) and feature.names else None


def _told(names: tuple[str, ...] | None) -> str:
    return "not named" if names is None else ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
