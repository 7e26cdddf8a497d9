"""Text as token ids: files, folders, ``datasets`` names, or Python's own documentation; packed into sequences."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from hub import reached_or_offline
from torch import Tensor

from ds_decoupled.errors import ConfigError

SUFFIXES = (".txt", ".md", ".rst", ".py", ".text")
TABLES = (".parquet", ".arrow")
"""A folder with such files is a data set, whatever else is in it: of one from the hub, the README would be all the text."""
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")
Batch = tuple[Tensor, Tensor]


class Tokenizer(Protocol):
    """What the recipes need of a tokenizer."""

    name: str
    vocab_size: int

    def encode(self, documents: list[str]) -> list[int]:
        """All documents behind one another."""

    def decode(self, ids: list[int]) -> str: ...

    def save(self, folder: Path) -> None:
        """Write what :func:`tokenizer_of` finds there."""


class Bytes:
    """Every byte of UTF-8 is a token; documents are lines apart."""

    name = "bytes"
    vocab_size = 256

    def encode(self, documents: list[str]) -> list[int]:
        return list("\n".join(documents).encode())

    def decode(self, ids: list[int]) -> str:
        return bytes(ids).decode(errors="replace")

    def save(self, folder: Path) -> None:
        """Nothing: without a tokenizer, bytes are taken."""


class HuggingFaceTokenizer:
    """A tokenizer of ``transformers``, by folder or hub name; its end-of-text token, if it has one, parts documents."""

    def __init__(self, name: str) -> None:
        from transformers import AutoTokenizer

        try:
            with reached_or_offline(name):
                self._tokenizer: Any = AutoTokenizer.from_pretrained(name)
        except Exception as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ConfigError("--tokenizer", name, f"no tokenizer can be loaded from there ({reason})",
                              'Give a folder, a hub name, or "bytes"') from error
        self.name, self.vocab_size = name, len(self._tokenizer)

    def encode(self, documents: list[str]) -> list[int]:
        end = self._tokenizer.eos_token_id
        border = self._tokens("\n") if end is None else [end]
        ids = self._tokens(documents[0])
        for document in documents[1:]:
            ids += border + self._tokens(document)
        return ids

    def _tokens(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids))

    def save(self, folder: Path) -> None:
        self._tokenizer.save_pretrained(folder)


def tokenizer_of(name: str | None, model: str | None = None) -> Tokenizer:
    """The tokenizer called ``name`` (``bytes``, a folder, a hub name); without a name the model's own, if it has one, or bytes.

    Args:
        model: a folder, a file in one, or a hub name.
    """
    if name is None and model is not None:
        place = Path(model)
        folder = place.parent if place.is_file() else place
        name = model if not folder.exists() or any((folder / file).is_file() for file in TOKENIZER_FILES) else None
    return Bytes() if name in (None, "bytes") else HuggingFaceTokenizer(str(name))


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


@dataclass(frozen=True)
class Corpus:
    """Token ids: the first nine tenths to train on, the rest to validate on."""

    train: Tensor
    validation: Tensor

    @staticmethod
    def of(documents: list[str], tokenizer: Tokenizer, sequence: int) -> Corpus:
        """Raises :class:`ConfigError` where the text is too short for a sequence to validate on."""
        ids = torch.tensor(tokenizer.encode(documents), dtype=torch.long)
        cut = len(ids) * 9 // 10
        if len(ids) - cut <= sequence:
            raise ConfigError("--sequence_length", sequence, f"the text has {len(ids)} tokens, and the last tenth of them must "
                              "hold a sequence to validate on", "Give more text or shorter sequences")
        return Corpus(ids[:cut], ids[cut:])


class RandomWindows(Iterator[Batch]):
    """Endless micro-batches of windows at random places: ``(ids, next ids)``, both ``(micro_batch, sequence)``.

    What comes is a function of (seed, position) alone: replicas take their rows of the same windows, and ``seek`` resumes.
    """

    def __init__(self, ids: Tensor, micro_batch: int, sequence: int, *, seed: int, replica: int = 0, replicas: int = 1) -> None:
        self.ids, self.micro_batch, self.sequence = ids, micro_batch, sequence
        self.seed, self.replica, self.replicas = seed, replica, replicas
        self.position = 0

    def seek(self, position: int) -> None:
        """Go on with micro-batch ``position``."""
        self.position = position

    def __next__(self) -> Batch:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.position)
        starts = torch.randint(len(self.ids) - self.sequence, (self.micro_batch * self.replicas,), generator=generator)
        self.position += 1
        own = starts[self.replica * self.micro_batch:(self.replica + 1) * self.micro_batch]
        windows = torch.stack([self.ids[s:s + self.sequence + 1] for s in own.tolist()])
        return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()


def in_order(ids: Tensor, micro_batch: int, sequence: int, limit: int) -> list[Batch]:
    """Consecutive windows, up to ``limit`` micro-batches; the last one may be smaller."""
    count = (len(ids) - 1) // sequence
    inputs, targets = (ids[shift:shift + count * sequence].view(count, sequence) for shift in (0, 1))
    return list(zip(inputs.split(micro_batch), targets.split(micro_batch)))[:limit]
