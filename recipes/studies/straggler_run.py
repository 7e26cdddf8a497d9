"""One run of the straggler study: two replicas on a core each, one of which is slowed by so many batch times."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
import torch.distributed as dist

from data.micro_batches import Batch, MicroBatches
from data.samples import ImageData
from ds_decoupled.collectives import gather
from run.worlds import Parent
from studies.image_run import accuracy_of, engine_of
from studies.image_settings import sgd

REPLICAS = 2
WARM, TIMED = 5, 20
"""Micro-batches of each replica before the slowing: the first are not timed, the others say what a batch time is."""

LINES: dict[str, dict[str, Any]] = {
    "synchronous": {"method": "backprop"},
    "allreduce": {"method": "pd_asgd", "stages": "blocks", "exchange": "allreduce"},
    "average": {"method": "lapsgd", "stages": 1, "exchange": "average"},
    "gossip": {"method": "pd_asgd", "stages": "blocks", "exchange": "gossip"},
}
"""What is compared: the ``decoupled`` block of each. ``average`` is LAPSGD."""
WAITING = ("synchronous", "allreduce")
"""Those whose replicas wait for one another."""


@dataclass(frozen=True)
class StragglerStudy:
    """What all runs share.

    Attributes:
        data: as ``data.images.load_images`` takes it.
        images: of these, the first so many are trained on; 0 for all.
        width: of the six-layer CNN.
        image_size: pixels a side.
        micro_batch: images.
        micro_batches: that both replicas train on together, after the first few.
        lr: peak; a cosine by each replica's own updates leads to 0.
    """

    data: str
    images: int = 0
    width: int = 16
    image_size: int = 16
    micro_batch: int = 64
    micro_batches: int = 600
    lr: float = 0.05


@dataclass(frozen=True)
class Straggler:
    """One run.

    Attributes:
        line: of :data:`LINES`.
        delay: d, batch times by which every batch of the second replica takes longer.
        seed: of weights and data.
    """

    line: str
    delay: float
    seed: int = 0

    @property
    def label(self) -> str:
        """For messages."""
        return f"{self.line} d={self.delay:g} seed={self.seed}"

    def config(self, study: StragglerStudy) -> dict[str, Any]:
        """The DeepSpeed JSON."""
        return {**sgd(study.micro_batch, study.lr), "decoupled": dict(LINES[self.line])}

    def shares(self, micro_batches: int) -> tuple[int, int]:
        """Micro-batches of each replica: as many as one gets done while the other does its own.

        >>> Straggler("gossip", 1.0).shares(600), Straggler("allreduce", 1.0).shares(600)
        ((400, 200), (300, 300))
        """
        speed = 1.0 if self.line in WAITING else 1 + self.delay
        first = round(micro_batches * speed / (1 + speed))
        return first, micro_batches - first


def law(delay: float, replicas: int = REPLICAS) -> float:
    """Speed of replicas that do not wait, over that of replicas that do: ``(P(1+d) - d) / P``.

    >>> law(0.0), law(4.0)
    (1.0, 3.0)
    """
    return (replicas * (1 + delay) - delay) / replicas


class Slowed(Iterator[Batch]):
    """Gives micro-batches no faster than one in so many seconds."""

    def __init__(self, batches: Iterator[Batch]) -> None:
        self.batches, self.seconds = batches, 0.0
        self._last = 0.0

    def __next__(self) -> Batch:
        wait = self._last + self.seconds - time.perf_counter()
        if self.seconds and wait > 0:
            time.sleep(wait)
        self._last = time.perf_counter()
        return next(self.batches)


def train(setting: Straggler, study: StragglerStudy, images: ImageData) -> dict[str, Any]:
    """Train, slow, and test what the replicas have in the mean; in a world of two ranks."""
    replica = dist.get_rank()
    own = setting.shares(study.micro_batches)[replica]
    updates = WARM + TIMED + own
    batches = Slowed(MicroBatches(images.train, study.micro_batch, seed=setting.seed, replica=replica, replicas=REPLICAS))
    config = setting.config(study)
    engine = engine_of("cnn6", study.width, config, images, updates, setting.seed)

    def calls(count: int) -> float:
        """Seconds that they take until nothing is in flight, on the slowest replica."""
        start = time.perf_counter()
        for _ in range(count):
            engine.train_batch(data_iter=batches)
        engine.drain()
        dist.barrier()
        return time.perf_counter() - start

    calls(WARM)
    batch_seconds = sum(gather(calls(TIMED))) / REPLICAS / TIMED
    if replica == 1 and setting.delay:
        batches.seconds = (1 + setting.delay) * batch_seconds
    seconds = max(gather(calls(own)))
    rate = study.micro_batches / seconds
    return {"test_accuracy": accuracy_of(engine, images, study.micro_batch), "seconds": seconds, "batch_seconds": batch_seconds,
            "samples_per_second": rate * study.micro_batch, "batches_per_batch_time": rate * batch_seconds,
            "micro_batches": gather(own), "exchange": engine.decoupled_summary().get("exchange")}


def train_replica(parent: Parent, setting: Straggler, study: StragglerStudy, *, images: str) -> dict[str, Any]:
    """A process's task: what :func:`train` gives.

    Args:
        images: the file of :func:`studies.image_run.decode`.
    """
    deepspeed.init_distributed(dist_backend="gloo")
    return train(setting, study, torch.load(images, weights_only=False))
