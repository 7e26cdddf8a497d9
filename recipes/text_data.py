"""Text as token ids: files, folders, ``datasets`` names, or the language's own documentation; packed into sequences."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ds_decoupled.errors import ConfigError

SUFFIXES = (".txt", ".md", ".rst", ".py", ".text")
Batch = tuple[Tensor, Tensor]


class Tokenizer(Protocol):
    """What the recipe needs of a tokenizer."""

    vocab_size: int

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: list[int]) -> str: ...


class Bytes:
    """Every byte of UTF-8 is a token."""

    vocab_size = 256

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: list[int]) -> str:
        return bytes(ids).decode(errors="replace")


class HuggingFaceTokenizer:
    """A tokenizer of ``transformers``, by folder or hub name."""

    def __init__(self, name: str) -> None:
        from transformers import AutoTokenizer

        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(name)
        except (OSError, ValueError) as error:
            raise ConfigError("--tokenizer", name, f"no tokenizer was found there ({str(error).splitlines()[0]})",
                              "Give a folder or a hub name, or leave it out for bytes.") from error
        self.vocab_size = len(self._tokenizer)

    def encode(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids))


def read_text(data: str) -> str:
    """The corpus named by ``data``: ``topics`` (Python's own documentation topics), a file, a folder of text files, or the
    name of a data set of ``datasets`` with a column ``text``."""
    if data == "topics":
        from pydoc_data.topics import topics

        return "\n\n".join(topics[name] for name in sorted(topics))
    path = Path(data)
    if path.is_file():
        return path.read_text(errors="replace")
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix in SUFFIXES)
        if not files:
            raise ConfigError("--data", data, f"the folder has no text files ({', '.join(SUFFIXES)})", "Is it the right one?")
        return "\n".join(p.read_text(errors="replace") for p in files)
    if path.suffix or path.is_absolute():
        raise ConfigError("--data", data, "there is no such file or folder", "Is the path right?")
    import datasets

    try:
        loaded = datasets.load_dataset(data, split="train")
    except Exception as error:
        raise ConfigError("--data", data, f"neither a file nor a folder, and not a data set that can be loaded "
                          f"({str(error).splitlines()[0]})") from error
    if "text" not in loaded.column_names:
        raise ConfigError("--data", data, f"its columns are {loaded.column_names}, one of them must be 'text'")
    return "\n".join(loaded["text"])


@dataclass(frozen=True)
class Corpus:
    """Token ids: the first nine tenths to train on, the rest to validate on."""

    train: Tensor
    validation: Tensor

    @staticmethod
    def of(text: str, tokenizer: Tokenizer, sequence: int) -> Corpus:
        """Raises :class:`ConfigError` where the text is too short for a sequence to validate on."""
        ids = torch.tensor(tokenizer.encode(text), dtype=torch.long)
        cut = len(ids) * 9 // 10
        if len(ids) - cut <= sequence:
            raise ConfigError("--sequence_length", sequence, f"the last tenth of the text has only {len(ids) - cut} tokens",
                              "Give more text or shorter sequences.")
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
