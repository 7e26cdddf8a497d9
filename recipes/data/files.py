"""One file of text or of rows: plain or ``.gz``, read as what its name says, and refused where it is something else."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ds_decoupled.errors import ConfigError

Row = dict[str, Any]

class Rows(list[Row]):
    """Rows of prompts and completions, or of conversations.

    Attributes:
        place: where they are from.
        note: the same in words, such as "2 files, 1 skipped (.csv)"; empty where there is nothing to add.
    """

    place: str = ""
    note: str = ""


def is_example(columns: Iterable[str]) -> bool:
    """Whether a row with such columns is one of instruction data."""
    return "messages" in columns or {"prompt", "completion"} <= set(columns)


TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py", ".text")
ROW_SUFFIXES = (".jsonl", ".ndjson")
OTHER_SUFFIXES = {
    ".json": "JSON", ".csv": "a table", ".tsv": "a table", ".html": "a page with its markup", ".htm": "a page with its markup",
    ".ipynb": "a notebook", ".xml": "a document with its markup",
}
"""What is UTF-8 as a rule, and seldom what someone wants a model to write."""


def kind_of(file: Path) -> str:
    """The ending that tells what is in the file: that before ``.gz``."""
    return Path(file.stem).suffix if file.suffix == ".gz" else file.suffix


def read_document(file: Path) -> str:
    """UTF-8, without its mark. What cannot be in a text is not trained on as if it were."""
    kind = kind_of(file)
    if kind in OTHER_SUFFIXES:
        raise ConfigError("--data", str(file), f"by its name it is {OTHER_SUFFIXES[kind]}, all of which would be trained on",
                          'Write the texts as JSONL, {"text": ...} a line, or end its name with .txt if it is as it should be')
    text = _decoded(file)
    if (place := text.find("\0")) >= 0:
        raise ConfigError("--data", str(file), f"it is no text: character {place} is NUL", "Take it out, or give another file")
    return text


def read_rows(file: Path) -> list[Row]:
    """The objects of a JSONL file, one a line; empty lines are passed over."""
    rows = []
    for number, line in enumerate(_decoded(file).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ConfigError("--data", str(file), f"line {number} is no JSON ({error})", "Mend it or leave it out") from error
        if not isinstance(row, dict):
            raise ConfigError("--data", str(file), f"line {number} is a {type(row).__name__}, and an object is needed",
                              'Write {"text": ...}')
        rows.append(row)
    return rows


def texts_of(rows: Iterable[Row], place: str, what: str = "row") -> list[str]:
    """The column ``text`` of rows.

    Raises:
        ConfigError: for rows without one, or with one that is no text.
    """
    texts = []
    for number, row in enumerate(rows):
        text = row.get("text")
        if not isinstance(text, str):
            columns = "" if "text" in row else f"; its columns are {list(row)}, one of them must be 'text'"
            found = "missing" if text is None else f"a {type(text).__name__}"
            raise ConfigError("--data", place, f"the text of {what} {number} is {found}{columns}", "Leave such rows out")
        texts.append(text)
    return texts


def _decoded(file: Path) -> str:
    content = file.read_bytes()
    if file.suffix == ".gz":
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise ConfigError("--data", str(file), f"it cannot be unpacked as gzip ({error})",
                              "Is it whole? Get it again") from error
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError("--data", str(file), f"it is no UTF-8 text: byte {error.start} is {error.object[error.start]:#04x}",
                          "Convert it (iconv -f ENCODING -t utf-8), or take it out") from error
