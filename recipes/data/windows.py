"""Token ids cut into windows: at random places to train on, one after the other to validate on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from data.text import counted
from data.tokens import Tokenizer
from ds_decoupled.errors import ConfigError

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Corpus:
    """Token ids to train on and to validate on."""

    train: Tensor
    validation: Tensor

    @staticmethod
    def of(documents: list[str], tokenizer: Tokenizer, sequence: int, validation: list[str] | None = None) -> Corpus:
        """``validation``: texts to validate on, instead of the last tenth: of whole documents, if there are several and the
        last ones hold a sequence.

        Raises:
            ConfigError: where a text is too short for a sequence.
        """
        ids = torch.tensor(tokenizer.encode(documents), dtype=torch.long)
        if validation is not None:
            others = torch.tensor(tokenizer.encode(validation), dtype=torch.long)
            for part, option in ((ids, "--data"), (others, "--validation")):
                if len(part) <= sequence:
                    raise ConfigError("--sequence_length", sequence, f"the text of {option} has {len(part)} tokens",
                                      "Give more text or shorter sequences")
            return Corpus(ids, others)
        if (last := _last_documents(documents)) and len(held := tokenizer.encode(last)) > sequence:
            return Corpus(torch.tensor(tokenizer.encode(documents[:-len(last)])), torch.tensor(held))
        cut = len(ids) * 9 // 10
        if len(ids) - cut <= sequence:
            raise ConfigError("--sequence_length", sequence, f"the text has {len(ids)} tokens, and the last tenth of them must "
                              "hold a sequence to validate on", "Give more text or shorter sequences")
        return Corpus(ids[:cut], ids[cut:])

    def told(self, documents: list[str]) -> str:
        """What was read, in words."""
        note = getattr(documents, "note", "")
        read = counted(len(documents), "document") + (f" from {note}" if note else "")
        return f"data: {read}, {len(self.train):,} tokens to train on and {len(self.validation):,} to validate on"

    @property
    def tokens(self) -> int:
        """To train on."""
        return len(self.train)

    def loader(self, micro_batch: int, sequence: int, *, seed: int, replica: int, replicas: int) -> RandomWindows:
        """Windows at random places."""
        return RandomWindows(self.train, micro_batch, sequence, seed=seed, replica=replica, replicas=replicas)

    def tests(self, micro_batch: int, sequence: int, limit: int) -> list[Batch]:
        """Micro-batches in order."""
        return in_order(self.validation, micro_batch, sequence, limit)

    def prompt(self, most: int) -> list[int]:
        """The beginning of the text that is not trained on."""
        return list(self.validation[:most].tolist())


def _last_documents(documents: list[str]) -> list[str]:
    """As many as make up a tenth of all characters, the first ones left over; none, if that would be all.

    >>> _last_documents(["a" * 50, "b" * 40, "c" * 4, "d" * 6]), _last_documents(["a", "b" * 99])
    (['cccc', 'dddddd'], [])
    """
    wanted, count = sum(map(len, documents)) / 10, 0
    for place in range(len(documents) - 1, 0, -1):
        count += len(documents[place])
        if count >= wanted:
            return documents[place:] if count < 5 * wanted else []
    return []


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
