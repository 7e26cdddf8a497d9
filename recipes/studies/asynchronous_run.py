"""One run of the asynchronous study: threads that share a model, or two replicas, one of which may be slowed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from statistics import fmean
from typing import Any

import deepspeed
import torch
import torch.distributed as dist

from data.micro_batches import Batch, MicroBatches
from data.samples import ImageData, TensorImages
from ds_decoupled.collectives import gather
from ds_decoupled.threads import usable_cores
from run.results import peak_memory_bytes
from run.worlds import Parent
from studies.asynchronous_settings import WAYS, AsynchronousSetting, AsynchronousStudy
from studies.image_run import accuracy_of, engine_of

FIRST = 25
"""Micro-batches of each replica before the slowing; the later ones of them say what a batch time is."""
WARM = 5


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


class Clock:
    """Trains, and knows how long that took: evaluation is left out, what threads still have before them is not."""

    def __init__(self, engine: Any, batches: Iterator[Batch]) -> None:
        self.engine, self.batches = engine, batches
        self.seconds = self.cpu_seconds = 0.0
        self.done = 0

    def train(self, count: int) -> float:
        """So many micro-batches, until nothing of them is in flight; the seconds."""
        start, cpu = time.perf_counter(), time.process_time()
        for _ in range(count):
            self.engine.train_batch(data_iter=self.batches)
        if runner := getattr(self.engine, "runner", None):  # DeepSpeed's own engine has nothing in flight
            runner.pause()
        seconds = time.perf_counter() - start
        self.seconds += seconds
        self.cpu_seconds += time.process_time() - cpu
        self.done += count
        return seconds


def train(setting: AsynchronousSetting, study: AsynchronousStudy, images: ImageData,
          progress: Callable[[int], None]) -> dict[str, Any]:
    """Train, slow, and test; in a world of one rank, or of two replicas.

    Args:
        progress: is told how many micro-batches of all replicas are through.

    Returns:
        ``test_accuracy``: of the mean of the replicas, on all test images; ``curves``: by ``samples`` of all replicas, the
        ``seconds`` of the slowest and the mean ``accuracy`` of the replicas' own weights; ``samples_per_second`` and
        ``batches_per_batch_time`` after the first few micro-batches; CPU time a micro-batch; staleness, exchanges, threads.
    """
    torch.set_num_threads(usable_cores() if WAYS[setting.way].split_operations else 1)
    replica, replicas = dist.get_rank(), dist.get_world_size()
    data = MicroBatches(images.train, study.micro_batch, seed=setting.seed, replica=replica, replicas=replicas)
    total = study.epochs * (len(images.train.labels) // study.micro_batch)
    own = setting.shares(total)[replica]
    batches = Slowed(data)
    engine = engine_of(study.model, study.width, setting.config(study, own), images, own, setting.seed)
    assert isinstance(images.test, TensorImages)
    part = replace(images, test=images.test.first(study.test_images))
    clock = Clock(engine, batches)
    curves: list[dict[str, float]] = []

    def look() -> None:
        done = sum(gather(clock.done))
        curves.append({"samples": done * study.micro_batch, "seconds": max(gather(clock.seconds)),
                       "accuracy": fmean(gather(accuracy_of(engine, part, study.micro_batch)))})
        progress(done)

    first = min(FIRST, own // 2)
    clock.train(min(WARM, first - 1))
    timed = first - clock.done
    batch_seconds = fmean(gather(clock.train(timed) / timed))
    if replica == 1 and setting.delay:
        batches.seconds = (1 + setting.delay) * batch_seconds
    before = sum(gather(clock.done)), max(gather(clock.seconds))
    for point in range(1, study.evaluations + 1):
        clock.train(first + (own - first) * point // study.evaluations - clock.done)
        look()
    rate = (total - before[0]) / (max(gather(clock.seconds)) - before[1])
    engine.drain()
    summary = engine.decoupled_summary()
    return {"test_accuracy": accuracy_of(engine, images, study.micro_batch), "curves": curves, "micro_batches": gather(own),
            "images": len(images.train.labels),
            "batch_seconds": batch_seconds, "samples_per_second": rate * study.micro_batch,
            "batches_per_batch_time": rate * batch_seconds,
            "cpu_seconds_per_batch": sum(gather(clock.cpu_seconds)) / total,
            "peak_memory_bytes": sum(gather(peak_memory_bytes())),
            **{name: summary[name] for name in ("exchange", "staleness", "threads") if name in summary}}


def train_alone(parent: Parent, setting: AsynchronousSetting, study: AsynchronousStudy, *, images: str) -> dict[str, Any]:
    """A process's task: what :func:`train` gives.

    Args:
        images: the file of :func:`studies.image_run.decode`.
    """
    deepspeed.init_distributed(dist_backend="gloo")
    return train(setting, study, torch.load(images, weights_only=False), parent.tell)
