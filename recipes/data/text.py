"""Documents of text: files, folders, rows, ``datasets`` names, or Python's own documentation."""

from __future__ import annotations

from glob import glob
from pathlib import Path

from data.files import ROW_SUFFIXES, TEXT_SUFFIXES, Rows, is_example, kind_of, read_document, read_rows, texts_of
from data.hub import reached_or_offline
from ds_decoupled.errors import ConfigError

TABLES = (".parquet", ".arrow")
"""A folder with such files is a data set, whatever else is in it: of one from the hub, the README would be all the text."""


class Documents(list[str]):
    """Texts, and a note on where they are from, for those who read along.

    Attributes:
        note: such as "2 files, 1 skipped (.csv)".
    """

    note: str = ""


def read_text(data: str) -> Documents:
    """As :func:`read_data`, for texts alone."""
    found = read_data(data)
    if isinstance(found, Rows):
        raise ConfigError("--data", data, "it holds prompts or conversations, and texts are needed", "Give a text file")
    return found


def read_data(data: str, option: str = "--data") -> Documents | Rows:
    """The texts or the instruction data named by ``data``.

    - ``topics``: Python's own documentation topics;
    - a text file, plain or ``.gz``: one document;
    - a JSONL file, plain or ``.gz``: of every row the ``text``, a document each; or rows of ``prompt`` and ``completion``, or
      of ``messages``;
    - a parquet file, or a name or folder that ``datasets`` loads: with a column ``text`` its rows make one document, as lines;
      or rows as above;
    - a folder, or a pattern such as ``data/*.jsonl``: the JSONL files if there are any, or else the text files.

    Raises:
        ConfigError: for what is missing, empty, cannot be read, or is no UTF-8 text.
    """
    try:
        found = _documents(data)
    except OSError as error:  # a place that may not be read, or a name that is too long for one
        raise ConfigError(option, data, f"it cannot be read ({error.strerror or error})", "Is the path right?") from error
    except ConfigError as error:
        raise ConfigError(option, *error.fields[1:]) from error
    if not any(found):
        raise ConfigError(option, data, "it is empty: there is no text in it", "Give more text")
    if isinstance(found, Rows):
        found.place = data
        return found
    return found if isinstance(found, Documents) else Documents(found)


def counted(count: int, thing: str) -> str:
    """Such as "1,000 files"."""
    return f"{count:,} {thing}" + ("s" if count != 1 else "")


def _documents(data: str) -> list[str] | Rows:
    if data == "topics":
        from pydoc_data.topics import topics

        return [f"{topics[name]}\n" for name in sorted(topics)]
    path = Path(data)
    if path.is_file():
        return _file(path)
    if path.is_dir():
        return _folder(path)
    if path.exists():
        raise ConfigError("--data", data, "it is neither a file nor a folder", "Give a text file or a folder of them")
    if files := sorted(Path(name) for name in glob(data, recursive=True)):
        return _files([file for file in files if file.is_file()], data)
    if path.suffix or path.is_absolute():
        raise ConfigError("--data", data, "there is no such file or folder", "Is the path right?")
    return _rows(data, "neither a file nor a folder, and not a data set that can be loaded",
                 "Give a text file, a folder of them, or a name on the hub")


def _file(path: Path) -> list[str] | Rows:
    if kind_of(path) in ROW_SUFFIXES:
        rows = read_rows(path)
        return Rows(rows) if rows and is_example(rows[0]) else texts_of(rows, str(path))
    if kind_of(path) in TABLES:
        return _rows(str(path), "no data set can be loaded from it", "Is it whole? Write it again")
    return [read_document(path)]


def _folder(path: Path) -> list[str] | Rows:
    files = sorted(p for p in path.rglob("*") if p.is_file())
    if tables := [file.name for file in files if file.suffix in TABLES]:
        return _rows(str(path), f"it holds {tables[0]}, and no data set can be loaded from it",
                     "Give a folder of text files, or one that `datasets` loads")
    return _files(files, str(path))


def _files(files: list[Path], place: str) -> list[str] | Rows:
    """Those of rows, or else those of text; how many were passed over is noted.

    Args:
        place: of all of them, in messages.
    """
    for suffixes in (ROW_SUFFIXES, TEXT_SUFFIXES):
        if found := [file for file in files if kind_of(file) in suffixes]:
            parts = [_file(file) for file in found]
            kinds = {isinstance(part, Rows) for part in parts}
            if len(kinds) > 1:
                raise ConfigError("--data", place, "some of its files hold texts, and others prompts or conversations",
                                  "Give one kind")
            documents: Documents | Rows = Rows() if kinds == {True} else Documents()
            documents.extend(item for part in parts for item in part)  # type: ignore[misc]
            others = sorted({file.suffix or file.name for file in files if file not in found})
            skipped = f", skipped {len(files) - len(found)} ({', '.join(others)})" if others else ""
            documents.note = counted(len(found), "file") + skipped
            return documents
    raise ConfigError("--data", place, f"there are no text files ({', '.join((*TEXT_SUFFIXES, *ROW_SUFFIXES))})",
                      "Is it the right one?")


def _rows(data: str, why: str, hint: str) -> list[str] | Rows:
    """The column ``text`` of a data set, one row a line; or rows of instruction data."""
    import datasets

    try:
        folder = Path(data)
        if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():  # what save_to_disk leaves
            loaded = datasets.load_from_disk(data)
            if isinstance(loaded, dict):
                loaded = loaded["train"]
        else:
            with reached_or_offline(data):
                loaded = (datasets.Dataset.from_parquet(data) if folder.is_file() else
                          datasets.load_dataset(data, split="train"))
        columns = loaded.column_names
        if "text" not in columns and is_example(columns):
            return Rows(loaded.to_list())
        texts = list(loaded["text"]) if "text" in columns else []
    except Exception as error:
        told = error.__cause__ or error  # datasets' own message says that an error occurred
        reason = (str(told).splitlines() or [type(told).__name__])[0]
        raise ConfigError("--data", data, f"{why} ({reason})", hint) from error
    if "text" not in columns:
        raise ConfigError("--data", data, f"its columns are {columns}, one of them must be 'text'",
                          "Take another data set, or write its texts to a file")
    return ["\n".join(texts_of(({"text": text} for text in texts), data))]
