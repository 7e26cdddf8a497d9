"""One job beside programs that keep cores busy, started in several ways, all of them alive at once and timed in turns."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import ds_decoupled
from ds_decoupled.models import build_model
from ds_decoupled.threads import THREADS, WAITING, settings
from run.tables import table
from run.worlds import Parent, World

CONFIGS = Path(__file__).parent.parent.parent / "ds_configs"
WAYS = ("default", "shared", "pinned", "brief spin", "one thread")


@dataclass(frozen=True)
class Job:
    """What is trained, by how many processes, and how they are started."""

    method: str
    ranks: int
    way: str
    width: int
    image_size: int


def jobs_of(ways: Sequence[str], method: str, ranks: int, cores: int, width: int, image_size: int) -> list[Job]:
    """One for each way that makes a difference for so many ranks."""
    same = {"pinned"} if ranks == 1 or ranks > cores else set()
    if cores // ranks <= 1:  # a thread a rank, which waits for nobody
        same |= {"brief spin", "one thread"}
    return [Job(method, ranks, way, width, image_size) for way in ways if way not in same]


def variables(way: str, ranks: int, cores: int) -> dict[str, str | None]:
    """What the environment says of threads, and nothing else of them."""
    nothing: dict[str, str | None] = dict.fromkeys((THREADS, *WAITING))
    if way == "default":
        return nothing
    if way == "one thread":
        return nothing | {THREADS: "1"}
    said = {"GOMP_SPINCOUNT": "1000"} if way == "brief spin" else {}
    return nothing | said | settings({"LOCAL_SIZE": str(ranks), **said}, cores)


def serve(parent: Parent, job: Job) -> None:
    """A rank's task: build, fill the pipeline, then time so many updates whenever it is told to."""
    if job.way == "default":  # nobody has shared the cores: each rank would take them all, slower still
        torch.set_num_threads(max(1, torch.get_num_threads() // job.ranks))
    if job.way == "pinned":
        own, rank = sorted(os.sched_getaffinity(0)), int(os.environ["RANK"])
        share = len(own) // job.ranks
        os.sched_setaffinity(0, own[rank * share:(rank + 1) * share])
    config = json.loads((CONFIGS / f"{job.method}.json").read_text())
    config["optimizer"]["params"]["lr"] = 1e-5  # random labels lead nowhere
    layers = build_model("revnet18", data="cifar10", num_classes=10, width=job.width)
    module = ds_decoupled.DecoupledPipelineModule(layers, config=config, loss_fn=nn.CrossEntropyLoss(), base_seed=0)
    engine, *_ = ds_decoupled.initialize(model=module, config=config, model_parameters=list(module.parameters()))
    samples = config["train_micro_batch_size_per_gpu"]
    batch = torch.randn(samples, 3, job.image_size, job.image_size), torch.randint(10, (samples,))

    def batches() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        while True:
            yield batch

    data = batches()
    warm_up = math.ceil(2 * len(layers) / engine.gradient_accumulation_steps()) + 1  # as deep as any pipeline here
    for _ in range(warm_up):
        engine.train_batch(data)
    parent.tell(torch.get_num_threads())
    while True:
        updates = parent.told()
        dist.barrier()
        start = time.perf_counter()
        for _ in range(updates):
            engine.train_batch(data)
        parent.tell((start, time.perf_counter()))  # one clock for all processes


def measure(jobs: Sequence[Job], beside: Sequence[int], rounds: int, seconds: float, cores: int, bar: Any) -> list[Timed]:
    """Start a world for each of ``jobs`` and time them in turns.

    Args:
        jobs: each in its own world.
        beside: numbers of busy programs.
        rounds: of which each times every job beside every number.
        seconds: about so many a timing.
        cores: that the jobs may use.
        bar: moves by one a timing.
    """
    found: list[Timed] = []
    last: dict[World, float] = {}  # seconds an update, when it was timed last

    def timing(world: World, wanted: float) -> float:
        updates = max(1, round(wanted / last[world])) if world in last else 1
        told = world.ask(updates)
        last[world] = (max(end for _, end in told) - min(start for start, _ in told)) / updates
        return last[world]

    with ExitStack() as stack:
        worlds: list[World] = []
        for job in jobs:  # one after the other: starting is no part of this
            world = World(job.ranks, serve, job, threads=None,
                          environ={"LOCAL_SIZE": str(job.ranks), **variables(job.way, job.ranks, cores)})
            worlds.append(stack.enter_context(world))
            found.append(Timed(job, world.answers()[0], {count: [] for count in beside}))
            timing(world, 0)
        for _ in range(rounds):
            for count in beside:
                with neighbours(count):
                    for timed, world in zip(found, worlds):
                        job = timed.job
                        bar.set_postfix_str(f"{job.method}, P={job.ranks}, {job.way}, {count} beside")
                        timed.seconds[count].append(timing(world, seconds))
                        bar.update()
    return found


@contextmanager
def neighbours(count: int) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Within, ``count`` programs keep a core busy each; they end with this process, however it ends."""
    loop = f"import os\nwhile os.getppid() == {os.getpid()}:\n    sum(range(100_000))"
    started = [subprocess.Popen([sys.executable, "-c", loop]) for _ in range(count)]
    try:
        if started:
            time.sleep(0.5)  # they are under way
        yield started
    finally:
        for process in started:
            process.kill()
            process.wait()


@dataclass
class Timed:
    """A job, the threads that each of its ranks has, and seconds an update by the number of neighbours, one a round."""

    job: Job
    threads: int
    seconds: dict[int, list[float]]


def report(beside: Sequence[int], found: Sequence[Timed]) -> str:
    """A row a job and way: medians over the rounds."""
    heads = ["alone" if count == 0 else f"beside {count}" for count in beside]
    rows = [[timed.job.method, str(timed.job.ranks), timed.job.way, str(timed.threads),
             *(f"{median(timed.seconds[count]):.3f}" for count in beside)] for timed in found]
    return table(["method", "P", "way", "threads a rank", *(f"s an update, {head}" for head in heads)], rows)
