"""Documents of text: files, folders, ``datasets`` names, or Python's own documentation."""

from __future__ import annotations

from pathlib import Path

from data.hub import reached_or_offline
from ds_decoupled.errors import ConfigError

SUFFIXES = (".txt", ".md", ".rst", ".py", ".text")
TABLES = (".parquet", ".arrow")
"""A folder with such files is a data set, whatever else is in it: of one from the hub, the README would be all the text."""


def read_text(data: str) -> list[str]:
    """The texts named by ``data``: ``topics`` (Python's own documentation topics), a file, the text files of a folder, or a
    data set of ``datasets``, by name or folder, with a column ``text``, whose rows make one document.

    Raises:
        ConfigError: for what is missing, empty, cannot be read, or is no UTF-8 text.
    """
    try:
        documents = _documents(data)
    except OSError as error:  # a place that may not be read, or a name that is too long for one
        raise ConfigError("--data", data, f"it cannot be read ({error.strerror or error})", "Is the path right?") from error
    if not any(documents):
        raise ConfigError("--data", data, "it is empty: there is no text in it", "Give more text")
    return documents


def _documents(data: str) -> list[str]:
    if data == "topics":
        from pydoc_data.topics import topics

        return [f"{topics[name]}\n" for name in sorted(topics)]
    path = Path(data)
    if path.is_file():
        return [_read(path)]
    if path.is_dir():
        return _folder(path)
    if path.exists():
        raise ConfigError("--data", data, "it is neither a file nor a folder", "Give a text file or a folder of them")
    if path.suffix or path.is_absolute():
        raise ConfigError("--data", data, "there is no such file or folder", "Is the path right?")
    return _rows(data, "neither a file nor a folder, and not a data set that can be loaded",
                 "Give a text file, a folder of them, or a name on the hub")


def _folder(path: Path) -> list[str]:
    files = sorted(p for p in path.rglob("*") if p.is_file())
    if tables := [file.name for file in files if file.suffix in TABLES]:
        return _rows(str(path), f"it holds {tables[0]}, and no data set can be loaded from it",
                     "Give a folder of text files, or one that `datasets` loads")
    texts = [file for file in files if file.suffix in SUFFIXES]
    if not texts:
        raise ConfigError("--data", str(path), f"the folder has no text files ({', '.join(SUFFIXES)})", "Is it the right one?")
    return [_read(file) for file in texts]


def _read(file: Path) -> str:
    """UTF-8, without its mark. What cannot be in a text is not trained on as if it were."""
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError("--data", str(file), f"it is no UTF-8 text: byte {error.start} is {error.object[error.start]:#04x}",
                          "Convert it (iconv -f ENCODING -t utf-8), or take it out") from error
    if (place := text.find("\0")) >= 0:
        raise ConfigError("--data", str(file), f"it is no text: character {place} is NUL", "Take it out, or give another file")
    return text


def _rows(data: str, why: str, hint: str) -> list[str]:
    """The column ``text`` of a data set, one row a line."""
    import datasets

    try:
        folder = Path(data)
        if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():  # what save_to_disk leaves
            loaded = datasets.load_from_disk(data)
            if isinstance(loaded, dict):
                loaded = loaded["train"]
        else:
            with reached_or_offline(data):
                loaded = datasets.load_dataset(data, split="train")
        columns = loaded.column_names
        texts = list(loaded["text"]) if "text" in columns else []
    except Exception as error:
        told = error.__cause__ or error  # datasets' own message says that an error occurred
        reason = (str(told).splitlines() or [type(told).__name__])[0]
        raise ConfigError("--data", data, f"{why} ({reason})", hint) from error
    if "text" not in columns:
        raise ConfigError("--data", data, f"its columns are {columns}, one of them must be 'text'",
                          "Take another data set, or write its texts to a file")
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            what = "missing" if text is None else f"a {type(text).__name__}"
            raise ConfigError("--data", data, f"the text of row {number} is {what}", "Leave such rows out")
    return ["\n".join(texts)]
