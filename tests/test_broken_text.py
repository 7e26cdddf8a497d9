"""Text as it comes: what is no text, or not enough of it, is refused with a sentence that names the file."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest
import recipe_runs
import worlds

from data.text import read_text
from data.tokens import Bytes
from data.windows import Corpus
from ds_decoupled.errors import ConfigError

WORDS = "Grüße aus der Küche. " * 20


@pytest.mark.parametrize("content, words", [
    (b"", "it is empty"),
    (WORDS.encode("latin-1"), "no UTF-8 text: byte 2 is 0xfc"),
    (WORDS.encode("utf-16"), "no UTF-8 text: byte 0 is 0xff"),
    (WORDS.encode("utf-16-le"), "no UTF-8 text|NUL"),
    (b"\x89PNG\r\n\x1a\n" + bytes(range(256)), "no UTF-8 text: byte 0 is 0x89"),
    (b"words" + bytes(500), "no text: character 5 is NUL"),
    (WORDS.encode()[:-1], None),
    (WORDS.encode()[:3], "no UTF-8 text: byte 2"),
    (b"\xef\xbb\xbf", "it is empty"),
], ids=["empty", "latin", "utf-16", "utf-16-le", "picture", "zeros", "good", "cut", "mark"])
@pytest.mark.parametrize("in_folder", [False, True])
def test_files(content: bytes, words: str | None, in_folder: bool, tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_bytes(content)
    place = tmp_path if in_folder else tmp_path / "b.txt"
    if words is None:
        assert read_text(str(place)) == [content.decode()]
        return
    with pytest.raises(ConfigError, match=words) as error:
        read_text(str(place))
    assert '"--data": ' in str(error.value) and str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_a_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("text".encode("utf-8-sig"))
    assert read_text(str(tmp_path / "a.txt")) == ["text"]


@pytest.mark.parametrize("place, make", [
    ("pipe", os.mkfifo), ("n" * 300, lambda path: None), ("dangling.txt", lambda path: path.symlink_to("nowhere")),
    ("empty", Path.mkdir), ("missing.txt", lambda path: None), ("missing", lambda path: None),
])
def test_what_is_no_text(place: str, make: Callable[[Path], object], tmp_path: Path) -> None:
    make(tmp_path / place)
    with pytest.raises(ConfigError, match="--data"):
        read_text(str(tmp_path / place))


def test_long_texts_that_are_too_short_for_a_window() -> None:
    for characters in (1, 2, 159):
        with pytest.raises(ConfigError, match=f'"--sequence_length": 16.*the text has {characters} tokens'):
            Corpus.of(["x" * characters], Bytes(), 16)
    assert len(Corpus.of(["x" * 170], Bytes(), 16).validation) == 17


@pytest.mark.parametrize("table, words", [
    ({"text": ["one", "two"]}, None),
    ({"words": ["one", "two"]}, r"columns are \['words'\]"),
    ({"text": ["one", None]}, "text of row 1 is missing"),
    ({"text": [1, 2]}, "text of row 0 is a int"),
    ({"text": [["a"], ["b"]]}, "text of row 0 is a list"),
    ({"text": ["", ""]}, None),
    ({"text": arrow.array([], arrow.string())}, "no data set can be loaded from it.*got 0|it is empty"),
    (b"no table", "no data set can be loaded from it"),
], ids=["good", "column", "null", "numbers", "lists", "lines", "rows", "damaged"])
def test_data_sets(table: Any, words: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "README.md").write_text("About the data.")
    if isinstance(table, bytes):
        (folder / "train.parquet").write_bytes(table)
    else:
        parquet.write_table(arrow.table(table), folder / "train.parquet")
    if words is None:
        assert read_text(str(folder)) == ["\n".join(table["text"])]
        return
    with pytest.raises(ConfigError, match=words) as error:
        read_text(str(folder))
    assert "\n" not in str(error.value)


def test_a_data_set_saved_to_disk(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    data = Dataset.from_dict({"text": ["one", "two"]})
    data.save_to_disk(str(tmp_path / "one"))
    DatasetDict({"train": data}).save_to_disk(str(tmp_path / "dict"))
    DatasetDict({"test": data}).save_to_disk(str(tmp_path / "test"))
    assert read_text(str(tmp_path / "one")) == read_text(str(tmp_path / "dict")) == ["one\ntwo"]
    with pytest.raises(ConfigError, match="no data set can be loaded from it.*train"):
        read_text(str(tmp_path / "test"))


def test_on_every_rank(tmp_path: Path) -> None:
    """The rank in the middle reads no text, and says what the others found."""
    (tmp_path / "text.txt").write_bytes(WORDS.encode("latin-1"))
    config = recipe_runs.config_file(tmp_path, "delayed")
    with pytest.raises(worlds.RankFailed) as failure:
        worlds.run(3, recipe_runs._main, "train_lm", ["--deepspeed_config", str(config), "--data", str(tmp_path / "text.txt"),
                                                      "--blocks", "1"], timeout=30)
    assert all(str(error).startswith('SystemExit: train_lm.py: "--data": ') for error in failure.value.errors), failure.value
