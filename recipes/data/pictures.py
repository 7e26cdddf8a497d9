"""One picture at a time: from a file, or from the bytes of a table's row, to 8-bit RGB.

As in torchvision, transparency is left out, and of several frames or pages the first one is the picture.
"""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ds_decoupled.errors import ConfigError

MEGAPIXELS = 178
"""Pillow's own bound against files that unpack to more than a machine can hold; twice ``Image.MAX_IMAGE_PIXELS``."""

SIXTEEN_BITS = ("I;16", "I;16L", "I;16B", "I;16N")
SIXTEEN_BIT_FORMATS = ("PNG", "PPM")
"""Pillow opens these formats' 16 bits as 32, in some versions."""


@dataclass(frozen=True, slots=True)
class Row:
    """An encoded picture in a table.

    Attributes:
        file, number: where it stands, for messages; rows count from 0.
        content: the file's bytes.
    """

    file: Path
    number: int
    content: bytes

    def __str__(self) -> str:
        return f"row {self.number} of {self.file}"


Source = Path | Row


def open_image(source: Source) -> Image.Image:
    """An RGB image.

    Raises:
        ConfigError: for what is none, is cut off or broken anywhere, has too many pixels, or pixels that 8 bits cannot hold.
    """
    if isinstance(source, Path) and not source.is_file():  # opening a pipe would wait for ever
        raise _refusal(source, "it is no file that can be read", "Remove or replace it")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of large pictures, up to the bound, and of palettes with transparency
            with Image.open(io.BytesIO(source.content) if isinstance(source, Row) else source) as image:
                return _as_rgb(image, source)
    except ConfigError:
        raise
    except Image.DecompressionBombError as error:
        raise _refusal(source, f"it has more than {MEGAPIXELS} megapixels", "Make it smaller") from error
    except Exception as error:  # decoders raise anything when they meet bytes that they do not expect
        reason = (str(error).splitlines() or [""])[0].replace(repr(str(source)), "the file")
        raise _refusal(source, f"it cannot be read as an image ({reason or type(error).__name__})",
                       "Remove or replace it") from error


def _as_rgb(image: Image.Image, source: Source) -> Image.Image:
    """Where Pillow would cut values off at 255, they are scaled: 16 bits to their upper 8."""
    if image.mode in SIXTEEN_BITS or (image.mode == "I" and image.format in SIXTEEN_BIT_FORMATS):
        return Image.fromarray((np.asarray(image).astype(np.int64) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        kind = "floating-point" if image.mode == "F" else "32-bit"
        raise _refusal(source, f"its pixels are {kind} numbers, whose range nothing tells", "Scale them to 8 bits")
    return image.convert("RGB")


def _refusal(source: Source, why: str, hint: str) -> ConfigError:
    return ConfigError("--data", str(source), why, hint)


def as_tensor(image: Image.Image) -> Tensor:
    """uint8 ``(3, H, W)``."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def is_picture(value: Any) -> bool:
    """Whether a table's cell holds the bytes of a file; what is in them shows when they are decoded."""
    return isinstance(value, bytes) and len(value) > 0
