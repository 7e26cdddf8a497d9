"""Methods on two ranks behind a cable of several speeds: all worlds alive at once, timed in turns, each behind every speed."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import ExitStack
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from tqdm import tqdm

from bench import namespaces, rank
from bench.models import Model
from bench.namespaces import ADDRESSES, INTERFACE, Cable
from bench.plan import METHODS, Configuration, configurations
from bench.report import Measurement, by_rank
from bench.speed import bounds_for
from ds_decoupled.config import parse_block
from ds_decoupled.errors import ConfigError
from run.tables import table
from run.worlds import Parent, World

RANKS = 2
PORT = 29500
"""The first world's; nobody else is in its namespace."""
SECONDS = 0.5
"""That the cable's own speed is looked at."""

Speed = int | None
"""In Mb/s; None for no limit."""
Found = dict[Configuration, dict[Speed, Measurement]]


def read_method(text: str, k: int, layers: int) -> Configuration:
    """What ``NAME`` or ``NAME:CODEC`` says: a method of ``bench.plan.METHODS``, and how its links write.

    Args:
        text: from the command line.
        k: micro-batches an update.
        layers: of the model.

    Raises:
        ConfigError: for an unknown method or codec, one that does not run on two ranks, or a codec that it does not have.
    """
    name, _, codec = text.partition(":")
    known = [method for method in METHODS if configurations([method], [RANKS], k, layers) and not METHODS[method].copies]
    if name not in known:
        raise ConfigError("--methods", text, f"with k = {k}, two ranks can run {', '.join(known)}",
                          "Take one of these; NAME:CODEC names its links' codec")
    if not codec:
        return Configuration(name, RANKS, k)
    if METHODS[name].runner != "engine":
        raise ConfigError("--methods", text, "DeepSpeed's own pipelines send tensors as they are", f"Take {name}")
    configuration = Configuration(name, RANKS, k, codec)
    parse_block({"decoupled": {**METHODS[name].block, **configuration.links}})
    return configuration


def serve(parent: Parent, names: tuple[str, str], port: int, configuration: Configuration, model: Model,
          bounds: list[int]) -> None:
    """A rank of a method's world: as :func:`bench.rank.serve`, in its namespace."""
    _move(names, port)
    rank.serve(parent, configuration, model, bounds)


def send(parent: Parent, names: tuple[str, str], port: int) -> None:
    """A rank of the world that looks at the cable: rank 0 sends as many bytes as it is told, and both say how long it took."""
    _move(names, port)
    dist.init_process_group("gloo")
    while True:
        data = torch.zeros(parent.told(), dtype=torch.uint8)
        dist.barrier()
        start = time.perf_counter()
        if dist.get_rank() == 0:
            dist.send(data, 1)
        else:
            dist.recv(data, 0)
        parent.tell((start, time.perf_counter()))


def _move(names: tuple[str, str], port: int) -> None:
    namespaces.enter(names[int(os.environ["RANK"])])
    os.environ.update(MASTER_ADDR=ADDRESSES[0], MASTER_PORT=str(port), GLOO_SOCKET_IFNAME=INTERFACE)


def look_at(cable: Cable, speeds: Sequence[Speed]) -> dict[Speed, float]:
    """Mb/s that really go through, behind each limit."""
    found = {}
    with World(RANKS, send, cable.names, PORT, pinned=True) as world:
        for speed in speeds:
            namespaces.run_all(cable.limit(speed))
            nbytes = int(SECONDS * (speed or 4000) * 1e6 / 8)
            for _ in range(2):  # the first fills the bucket's past and the connection's
                world.tell(nbytes)
                told = world.answers()
            found[speed] = 8e-6 * nbytes / (max(end for _, end in told) - min(start for start, _ in told))
    return found


def measure(cable: Cable, model: Model, chosen: Sequence[Configuration], times: dict[str, list[float]], speeds: Sequence[Speed],
            rounds: int, calls: int) -> Found:
    """Time every configuration behind every speed, in each of ``rounds`` rounds.

    Args:
        cable: laid.
        model: what is trained.
        chosen: each in its own world.
        times: seconds of every layer, by which ranks are balanced.
        speeds: of the cable.
        rounds: of which medians are taken.
        calls: of ``train_batch`` a timing; one more before it empties the pipeline of what another speed left there.

    Raises:
        WorldFailed: if a rank fails.
        bench.namespaces.NoNamespaces: if a command does.
    """
    found: Found = {c: {speed: Measurement(bounds=bounds_for(c, times)) for speed in speeds} for c in chosen}
    with ExitStack() as ends, tqdm(total=(1 + rounds * len(speeds)) * len(chosen), unit="timing") as bar:
        worlds: dict[Configuration, World] = {}
        namespaces.run_all(cable.limit(None))
        for i, c in enumerate(chosen):
            bar.set_postfix_str(c.label)
            bounds = bounds_for(c, times)
            worlds[c] = ends.enter_context(World(RANKS, serve, cable.names, PORT + i, c, model, bounds, pinned=True))
            worlds[c].answers()
            bar.update()
        for _ in range(rounds):
            for c, world in worlds.items():
                for speed in speeds:
                    bar.set_postfix_str(f"{c.label}, {said(speed)}")
                    namespaces.run_all(cable.limit(speed))
                    world.ask(("time", 1))
                    found[c][speed].add(world.ask(("time", calls)), calls * c.k * model.micro_batch)
                    bar.update()
    return found


def said(speed: Speed) -> str:
    """For people."""
    return "no limit" if speed is None else f"{speed} Mb/s"


def against_no_limit(by_speed: dict[Speed, Measurement], speed: Speed) -> float:
    """The speed's samples/s over those of the same round without a limit: the median of the rounds."""
    return median(a / b for a, b in zip(by_speed[speed].rates, by_speed[None].rates) if a is not None and b is not None)


def report(found: Found, link: dict[Speed, float]) -> str:
    """Speeds, waiting, and what the cable did: a row a method, a row a limit."""
    speeds = list(link)
    limits = [speed for speed in speeds if speed is not None]
    rates, idle = [], []
    for c, by_speed in found.items():
        rates.append([c.label, f"{by_speed[None].bytes_per_sample / 1024:.0f}",
                      *(f"{by_speed[speed].rate:.1f}" for speed in speeds),
                      *(f"{against_no_limit(by_speed, speed):.3f}" for speed in limits)])
        idle.append([c.label, *(" / ".join(f"{share:.0%}" for share in by_rank(by_speed[speed].idle)) for speed in speeds)])
    names = [said(speed) for speed in speeds]
    return "\n\n".join([
        table(["samples/s", "KiB sent a sample", *names, *(f"{said(speed)} / no limit" for speed in limits)], rates),
        table(["idle by rank", *names], idle),
        table(["cable", "Mb/s that went through"], ([said(speed), f"{value:.0f}"] for speed, value in link.items()))])


def as_json(found: Found) -> list[dict[str, Any]]:
    """Everything, for a file."""
    return [{"method": c.method, "codec": c.codec, "label": c.label, "k": c.k, "mbits": speed, "samples_per_second": m.rate,
             "ratio": against_no_limit(by_speed, speed), **vars(m)}
            for c, by_speed in found.items() for speed, m in by_speed.items()]
