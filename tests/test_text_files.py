"""Files of text by what they are: plain, packed, rows; what else is there is said."""

from __future__ import annotations

import gzip
import json
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest

from data.text import read_text
from data.tokens import Bytes
from data.windows import Corpus
from ds_decoupled.errors import ConfigError

ROWS = "\n".join(json.dumps({"text": text, "source": 1}) for text in ("eins", "zwei\ndrei", "vier\u2028fünf")) + "\n\n"
zipped = partial(gzip.compress, mtime=0)  # else names of tests have the time in them, and two workers collect different ones
TEXTS = ["eins", "zwei\ndrei", "vier\u2028fünf"]


@pytest.mark.parametrize("name, content, texts", [
    ("a.txt.gz", zipped("Küche".encode()), ["Küche"]),
    ("a.gz", zipped(b"words"), ["words"]),
    ("a.jsonl", ROWS.encode(), TEXTS),
    ("a.ndjson.gz", zipped(ROWS.encode()), TEXTS),
    ("a.cpp", b"int main", ["int main"]),
])
def test_files(name: str, content: bytes, texts: list[str], tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    assert read_text(str(tmp_path / name)) == texts


def test_a_parquet_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    parquet.write_table(arrow.table({"text": ["one", "two"]}), tmp_path / "a.parquet")
    assert read_text(str(tmp_path / "a.parquet")) == ["one\ntwo"]


@pytest.mark.parametrize("name, content, words", [
    ("a.gz", b"words", "cannot be unpacked as gzip"),
    ("a.txt.gz", zipped(b"words" * 1000)[:-20], "cannot be unpacked as gzip"),
    ("a.gz", zipped("Küche".encode("latin-1")), "no UTF-8 text: byte 1"),
    ("a.jsonl", b'{"text": "one"}\n{"text": \n', "line 2 is no JSON"),
    ("a.jsonl", b'"one"\n', "line 1 is a str, and an object"),
    ("a.jsonl", b'{"text": "one"}\n{"words": "two"}', r"the text of row 1 is missing; its columns are \['words'\]"),
    ("a.jsonl", b'{"text": 1}', "the text of row 0 is a int"),
    ("a.jsonl", b"\n", "it is empty"),
    ("a.json", b'[{"text": "one"}]', "by its name it is JSON"),
    ("a.csv", b"text\none", "by its name it is a table"),
    ("a.html.gz", zipped(b"<p>"), "a page with its markup"),
    ("a.parquet", b"words", "no data set can be loaded from it"),
])
def test_no_text(name: str, content: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=words) as error:
        read_text(str(tmp_path / name))
    assert "\n" not in str(error.value) and str(tmp_path / name) in str(error.value)


@pytest.mark.parametrize("files, texts, note", [
    ({"a.txt": "one", "b.jsonl": '{"text": "two"}', "README.md": "About"}, ["two"], "1 file, skipped 2 (.md, .txt)"),
    ({"a.txt": "one", "b.txt.gz": "two", "c.csv": "3"}, ["one", "two"], "2 files, skipped 1 (.csv)"),
])
def test_folders(files: dict[str, Any], texts: list[str], note: str, tmp_path: Path) -> None:
    """Rows are the data where there are any; what was passed over is said."""
    for name, content in files.items():
        (tmp_path / name).write_bytes(zipped(content.encode()) if name.endswith("gz") else content.encode())
    found = read_text(str(tmp_path))
    assert found == texts and found.note == note


def test_what_was_read_is_said(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "%s"}\n' % ("words " * 100) * 2)
    (tmp_path / "b.pdf").write_text("no text")
    documents = read_text(str(tmp_path))
    assert Corpus.of(documents, Bytes(), 8).told(documents) == (
        "data: 2 documents from 1 file, skipped 1 (.pdf), 1,080 tokens to train on and 121 to validate on")
    told = Corpus.of(["x" * 100], Bytes(), 8).told(["x" * 100])
    assert told == "data: 1 document, 90 tokens to train on and 10 to validate on"
