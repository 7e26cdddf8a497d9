"""Instruction data: rows of a prompt and its completion, or of a conversation, to tokens of which some are to be learned.

::

    {"prompt": "2 + 2 =", "completion": " 4"}             two texts, or two lists of messages
    {"messages": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]}

The loss is asked for the completion alone, or for what the assistant says; names of columns and options are TRL's.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from data.files import Row, Rows
from data.micro_batches import MicroBatches
from data.text import counted
from data.tokens import Tokenizer
from ds_decoupled.errors import ConfigError

NOT_ASKED = -100
"""The target of a place whose prediction is no part of the loss."""

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Example:
    """Token ids, and for each whether its prediction is asked for."""

    ids: list[int]
    asked: list[bool]


def encode(row: Row, tokenizer: Tokenizer, place: str, completion_only: bool) -> Example:
    """One row as tokens.

    Raises:
        ConfigError: for a row of another form, and for a chat template that this tokenizer lacks or that writes the beginning
            of a conversation in another way when more follows.
    """
    if "messages" in row:
        return _conversation(row["messages"], 0, tokenizer, place, completion_only)
    prompt, completion = row.get("prompt"), row.get("completion")
    if isinstance(prompt, list) and isinstance(completion, list):
        return _conversation([*prompt, *completion], len(prompt), tokenizer, place, completion_only)
    if not isinstance(prompt, str) or not isinstance(completion, str):
        raise ConfigError("--data", place, f"its prompt is a {type(prompt).__name__} and its completion a "
                          f"{type(completion).__name__}", "Both must be texts, or lists of messages")
    before, after = tokenizer.tokens(prompt), [*tokenizer.tokens(completion), *tokenizer.end()]
    return Example(before + after, [not completion_only] * len(before) + [True] * len(after))


def _conversation(messages: Any, given: int, tokenizer: Tokenizer, place: str, completion_only: bool) -> Example:
    """Asked for is what the assistant says behind the first ``given`` messages, with the mark that ends it."""
    if not isinstance(messages, list) or not all(isinstance(m, dict) and isinstance(m.get("role"), str) for m in messages):
        raise ConfigError("--data", place, "its messages are no list of objects with a role and a content",
                          'Write [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}]')
    ids = tokenizer.chat(messages, answers=False)
    asked = [not completion_only] * len(ids)
    for number, message in enumerate(messages):
        if not completion_only or message["role"] != "assistant" or number < given:
            continue
        before, after = tokenizer.chat(messages[:number], answers=True), tokenizer.chat(messages[:number + 1], answers=False)
        if ids[:len(before)] != before or ids[:len(after)] != after:
            raise ConfigError("--completion_only_loss", True, f"the chat template writes the first {number + 1} messages of "
                              f"{place} in another way when more follow, so that the answers cannot be told from the rest",
                              "Split conversations after each answer, or give --completion_only_loss false")
        asked[len(before):len(after)] = [True] * (len(after) - len(before))
    return Example(ids, asked)


class _Windows:
    """Samples as :class:`~data.micro_batches.MicroBatches` takes them: inputs and targets ``(N, T)``."""

    slow = False

    def __init__(self, inputs: Tensor, targets: Tensor) -> None:
        self.inputs, self.labels = inputs, targets

    def batch(self, indices: Tensor, draws: Tensor | None) -> Tensor:
        return self.inputs[indices]


@dataclass(frozen=True)
class Instructions:
    """Windows of examples to train on and to validate on.

    Attributes:
        train, validation: inputs and targets ``(N, T)``, targets shifted already and ``NOT_ASKED`` where none is asked for.
        dropped: examples of which nothing asked for is within a window.
    """

    train: Batch
    validation: Batch
    dropped: int

    @staticmethod
    def of(rows: Rows, tokenizer: Tokenizer, sequence: int, *, completion_only: bool, packing: bool,
           validation: Rows | None = None) -> Instructions:
        """Windows of ``sequence`` tokens: an example each, filled up behind its end, or with ``packing`` one behind another.

        Args:
            validation: rows to validate on; by default the last tenth of ``rows``.
        """
        examples = [encode(row, tokenizer, f"{rows.place}, row {i}", completion_only) for i, row in enumerate(rows)]
        if validation is None:
            cut = len(examples) * 9 // 10
            examples, others = examples[:cut], examples[cut:]
        else:
            others = [encode(row, tokenizer, f"{validation.place}, row {i}", completion_only)
                      for i, row in enumerate(validation)]
        parts, dropped = [], 0
        for part, option in ((examples, "--data"), (others, "--data" if validation is None else "--validation")):
            kept = list(windows_of(part, sequence, packing))
            dropped += 0 if packing else len(part) - len(kept)
            if not kept:
                raise ConfigError(option, rows.place, f"in the first {sequence} tokens of none of its {len(part)} rows to "
                                  f"{'train' if part is examples else 'validate'} on is anything to be learned",
                                  "Give more rows, or a larger --max_length")
            parts.append((torch.stack([ids for ids, _ in kept]), torch.stack([targets for _, targets in kept])))
        return Instructions(parts[0], parts[1], dropped)

    @staticmethod
    def held_out(rows: Rows, tokenizer: Tokenizer, sequence: int, *, completion_only: bool, packing: bool) -> Instructions:
        """Rows to validate on alone."""
        return Instructions.of(Rows(), tokenizer, sequence, completion_only=completion_only, packing=packing, validation=rows)

    def told(self, rows: Rows) -> str:
        """What was read, in words."""
        note = f" from {rows.note}" if rows.note else ""
        dropped = f", {self.dropped} left out (nothing to be learned within --max_length)" if self.dropped else ""
        learned, held = (int((targets != NOT_ASKED).sum()) for _, targets in (self.train, self.validation))
        return (f"data: {counted(len(rows), 'example')}{note}{dropped}, {len(self.train[0]):,} windows with {learned:,} tokens "
                f"to learn, {len(self.validation[0]):,} with {held:,} to validate on")

    @property
    def tokens(self) -> int:
        """Of one epoch, filling included."""
        return self.train[0].numel()

    def loader(self, micro_batch: int, sequence: int, *, seed: int, replica: int, replicas: int) -> MicroBatches:
        """Every window once an epoch."""
        return MicroBatches(_Windows(*self.train), micro_batch, seed=seed, replica=replica, replicas=replicas)

    def tests(self, micro_batch: int, sequence: int, limit: int) -> list[Batch]:
        """Micro-batches in order; the last one may be smaller."""
        return list(zip(*(tensor.split(micro_batch) for tensor in self.validation)))[:limit]

    def prompt(self, most: int) -> list[int]:
        """The beginning of the first example that is not trained on, up to what is asked for."""
        ids, targets = (tensor[0].tolist() for tensor in self.validation)
        first = next(i for i, target in enumerate(targets) if target != NOT_ASKED)
        return list(ids[:first + 1])


def windows_of(examples: Iterable[Example], sequence: int, packing: bool) -> Iterator[Batch]:
    """Inputs and targets ``(sequence,)`` of windows in which something is asked for: an example each, or with ``packing`` one
    behind another, cut where a window is full; a window's last token is the next one's first."""
    windows = _packed(examples, sequence) if packing else (Example(e.ids[:sequence + 1], e.asked[:sequence + 1])
                                                           for e in examples)
    return (_tensors(window, sequence) for window in windows if any(window.asked[1:]))


def _packed(examples: Iterable[Example], sequence: int) -> Iterator[Example]:
    ids: list[int] = []
    asked: list[bool] = []
    for example in examples:
        ids += example.ids
        asked += example.asked
        while len(ids) > sequence:
            yield Example(ids[:sequence + 1], asked[:sequence + 1])
            del ids[:sequence], asked[:sequence]
    if len(ids) > 1:
        yield Example(ids, asked)


def _tensors(window: Example, sequence: int) -> Batch:
    """Filled up at the end, where a causal model sees nothing of it, with targets that are not asked for."""
    inputs, targets = torch.zeros(sequence, dtype=torch.long), torch.full((sequence,), NOT_ASKED)
    ids, asked = torch.tensor(window.ids), torch.tensor(window.asked)
    inputs[:len(ids) - 1] = ids[:-1]
    targets[:len(ids) - 1] = torch.where(asked[1:], ids[1:], NOT_ASKED)
    return inputs, targets
