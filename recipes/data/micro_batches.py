"""Micro-batches without end, whose content is a function of (seed, position) alone.

The order of an epoch and every random number of its augmentation are drawn from ``(seed, epoch)``, sample by sample:
two replicas with micro-batches of n see the same samples, changed in the same way, as one with micro-batches of 2n,
and a run that resumes at a position sees what the uninterrupted run would have seen. torchdata's StatefulDataLoader would
lose the first, as its workers draw for themselves, and resumes only where it was saved.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import torch
from torch import Tensor

from ds_decoupled.errors import ConfigError

DRAWS = 5
"""Uniform random numbers that one sample's augmentation may use in one epoch."""

Batch = tuple[Tensor, Tensor]


class Samples(Protocol):
    """What a loader needs of a data set."""

    labels: Tensor
    slow: bool

    def batch(self, indices: Tensor, draws: Tensor | None) -> Tensor:
        """Inputs of the samples ``indices``, augmented by ``draws`` ``(len(indices), DRAWS)`` in [0, 1), if given."""


class MicroBatches(Iterator[Batch]):
    """Endless iterator of ``(inputs, labels)``, each of ``micro_batch`` samples; an epoch's incomplete rest is dropped.

    Args:
        samples: the training samples.
        micro_batch: samples in a micro-batch of one replica.
        seed: with the epoch's number, decides order and augmentation; torch's own generator is not touched.
        replica, replicas: this replica's number and how many share the data.
        look_ahead: micro-batches that a background thread prepares while the last one is in use, for slow data.

    ``len()`` is the number of micro-batches in an epoch. ``seek`` moves to any position.
    """

    def __init__(
        self, samples: Samples, micro_batch: int, *, seed: int, replica: int = 0, replicas: int = 1, look_ahead: int = 2
    ) -> None:
        needed = micro_batch * replicas
        if micro_batch < 1 or len(samples.labels) < needed:
            raise ConfigError(
                "train_micro_batch_size_per_gpu",
                micro_batch,
                f"with {replicas} replica(s) one micro-batch needs {needed} samples, "
                f"and the training data have {len(samples.labels)}",
                "Give a smaller micro-batch or more data",
            )
        self.samples = samples
        self.micro_batch = micro_batch
        self.seed = seed
        self.replica = replica
        self.replicas = replicas
        self.position = 0
        self._look_ahead = look_ahead if samples.slow else 0
        self._worker = ThreadPoolExecutor(1) if self._look_ahead else None
        self._ahead: deque[Future[Batch]] = deque()
        self._epoch = -1

    def __len__(self) -> int:
        return len(self.samples.labels) // (self.micro_batch * self.replicas)

    def seek(self, position: int) -> None:
        """Go to the micro-batch ``position``, counted over all epochs."""
        self.position = position
        self._ahead.clear()

    def __next__(self) -> Batch:
        position = self.position
        self.position += 1
        if self._worker is None:
            return self._make(position)
        while len(self._ahead) <= self._look_ahead:
            self._ahead.append(self._worker.submit(self._make, position + len(self._ahead)))
        return self._ahead.popleft().result()

    def _make(self, position: int) -> Batch:
        epoch, index = divmod(position, len(self))
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed((self.seed << 20) + epoch)
            count = len(self.samples.labels)
            self._order = torch.randperm(count, generator=generator)
            self._draws = torch.rand(count, DRAWS, generator=generator)
            self._epoch = epoch
        start = (index * self.replicas + self.replica) * self.micro_batch
        chosen = self._order[start : start + self.micro_batch]
        return self.samples.batch(chosen, self._draws[start : start + self.micro_batch]), self.samples.labels[chosen]


def in_order(samples: Samples, micro_batch: int) -> Iterator[Batch]:
    """All samples once, unchanged and in order, for evaluation, in ``ceil(N / micro_batch)`` whole micro-batches.

    The last one is filled up with repeats of the last sample, which the caller drops from the outputs.
    """
    count = len(samples.labels)
    number = -(-count // micro_batch)
    for indices in torch.arange(number * micro_batch).clamp_(max=count - 1).split(micro_batch):
        yield samples.batch(indices, None), samples.labels[indices]
