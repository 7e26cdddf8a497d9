"""Text or instruction data of any size, read row by row while it is trained on; no more than a buffer of it is held."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from data.examples import Example, Instructions, encode, windows_of
from data.files import ROW_SUFFIXES, TEXT_SUFFIXES, Row, is_example, kind_of
from data.hub import reached_or_offline
from data.tokens import Tokenizer
from data.windows import Batch, Corpus
from ds_decoupled.errors import ConfigError

BUFFER = 10_000
"""Rows of which the next one is drawn."""
BUILDERS = {**dict.fromkeys(ROW_SUFFIXES, "json"), **dict.fromkeys(TEXT_SUFFIXES, "text"), ".parquet": "parquet"}
"""Of ``datasets``, by a file's ending."""


@dataclass(frozen=True)
class Stream:
    """Rows to train on as they come, and windows to validate on that are held.

    Attributes:
        rows: all rows of an epoch, shuffled by its number and the run's seed.
        encode: a row's tokens.
        packing: whether rows stand one behind another.
        held: what is validated on.
    """

    rows: Callable[[int, int], Iterable[Row]]
    encode: Callable[[Row], Example]
    packing: bool
    held: Corpus | Instructions

    def told(self) -> str:
        """What is read, in words."""
        held = self.held
        count = f"{len(held.validation):,} tokens" if isinstance(held, Corpus) else f"{len(held.validation[0]):,} windows"
        return f"data: rows as they come, {count} to validate on"

    @property
    def tokens(self) -> float:
        """Nobody knows how many there are."""
        return float("nan")

    def loader(self, micro_batch: int, sequence: int, *, seed: int, replica: int, replicas: int) -> StreamedWindows:
        """Windows in the order of the rows."""
        return StreamedWindows(self, micro_batch, sequence, seed=seed, replica=replica, replicas=replicas)

    def tests(self, micro_batch: int, sequence: int, limit: int) -> list[Batch]:
        """Micro-batches in order."""
        return self.held.tests(micro_batch, sequence, limit)

    def prompt(self, most: int) -> list[int]:
        """The beginning of what is not trained on."""
        return self.held.prompt(most)


class StreamedWindows(Iterator[Batch]):
    """Endless micro-batches ``(ids, targets)``, both ``(micro_batch, sequence)``, a function of (seed, position).

    Replicas take their rows of the same windows. ``seek`` reads all rows up to there again.
    """

    def __init__(self, stream: Stream, micro_batch: int, sequence: int, *, seed: int, replica: int, replicas: int) -> None:
        self.stream, self.micro_batch, self.sequence = stream, micro_batch, sequence
        self.seed, self.replica, self.replicas = seed, replica, replicas
        self.seek(0)

    def seek(self, position: int) -> None:
        """Go on with micro-batch ``position``."""
        self._windows = self._made()
        skipped = position * self.micro_batch * self.replicas
        next(itertools.islice(self._windows, skipped, skipped), None)

    def __next__(self) -> Batch:
        windows = list(itertools.islice(self._windows, self.micro_batch * self.replicas))
        own = windows[self.replica * self.micro_batch:(self.replica + 1) * self.micro_batch]
        return torch.stack([ids for ids, _ in own]), torch.stack([targets for _, targets in own])

    def _made(self) -> Iterator[Batch]:
        for epoch in itertools.count():
            examples = map(self.stream.encode, self.stream.rows(epoch, self.seed))
            empty = True
            for window in windows_of(examples, self.sequence, self.stream.packing):
                empty = False
                yield window
            if empty:
                raise ConfigError("--data", "a stream", f"in {self.sequence} tokens of none of its rows is anything to be "
                                  "learned", "Give more rows, or a larger --max_length")


def open_stream(data: str, tokenizer: Tokenizer, held: Corpus | Instructions, *, completion_only: bool, packing: bool,
                buffer: int = BUFFER) -> Stream:
    """The rows of ``data``: a JSONL, parquet or text file (also ``.gz``), a folder of such, or a name on the hub.

    Args:
        held: what is validated on, of the same kind.
        completion_only: whether completions alone are learned.
        packing: whether rows of instruction data stand one behind another, as texts do.
        buffer: rows of which the next one is drawn.

    Raises:
        ConfigError: for what ``datasets`` cannot read row by row, and for rows of another kind than ``held``.
    """
    source = _source(data)
    first = next(iter(source), None)
    if first is None:
        raise ConfigError("--data", data, "it is empty: there is no row in it", "Give more text")
    examples = "text" not in first and is_example(first)
    if examples != isinstance(held, Instructions):
        raise ConfigError("--validation", "its rows", "they are of another kind than those of --data: one holds texts, the "
                          "other prompts or conversations", "Give both of one kind")
    if not examples and not isinstance(first.get("text"), str):
        raise ConfigError("--data", data, f"its columns are {list(first)}, one of them must be 'text'", "Take another data set")

    def rows(epoch: int, seed: int) -> Iterable[Row]:
        shuffled = source.shuffle(seed=seed, buffer_size=buffer)
        shuffled.set_epoch(epoch)
        return shuffled

    def tokens(row: Row) -> Example:
        if examples:
            return encode(row, tokenizer, data, completion_only)
        ids = [*tokenizer.tokens(row["text"]), *tokenizer.end()]
        return Example(ids, [True] * len(ids))

    return Stream(rows, tokens, packing or not examples, held)


def _source(data: str) -> Any:
    """An ``IterableDataset``."""
    import datasets

    path = Path(data)
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else []
    known = [file for file in files if kind_of(file) in BUILDERS]
    try:
        if not files:
            with reached_or_offline(data):
                return datasets.load_dataset(data, split="train", streaming=True)
        builders = {BUILDERS[kind_of(file)] for file in known}
        if len(builders) != 1:
            raise ConfigError("--data", data, f"its files are {', '.join(sorted(builders)) or 'of no known kind'}",
                              f"Give files of one kind: {', '.join(BUILDERS)}")
        builder = builders.pop()
        options = {"sample_by": "document"} if builder == "text" else {}  # lines of a text are not to be shuffled
        return datasets.load_dataset(builder, data_files=list(map(str, known)), split="train", streaming=True, **options)
    except ConfigError:
        raise
    except Exception as error:
        reason = (str(error.__cause__ or error).splitlines() or [type(error).__name__])[0]
        raise ConfigError("--data", data, f"it cannot be read row by row ({reason})", "Leave --streaming out, or give JSONL "
                          "or parquet") from error
