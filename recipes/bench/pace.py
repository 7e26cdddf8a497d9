"""What a slow rank costs the fast one: P = 2, one of them made twice as slow by sleeping, under every method.

A rank that runs free should keep the speed that it has alone; under any other method the slow rank sets the pace.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from deepspeed.pipe import LayerSpec
from torch import Tensor, nn
from tqdm import tqdm

from bench.models import Model
from bench.plan import METHODS, Configuration
from bench.runner import build
from bench.speed import bounds_for, measure_layers
from ds_decoupled.nn import mark_block
from run.tables import table
from run.worlds import Parent, World

PACE_METHODS = ("dgl_async", "dgl", "delayed", "1f1b")
FREE = "dgl_async"


class _Sleep(torch.autograd.Function):
    """The identity: sleeps a third of ``seconds`` forward and two thirds backward."""

    seconds = 0.0

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        time.sleep(_Sleep.seconds / 3)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        time.sleep(_Sleep.seconds * 2 / 3)
        return grad


class Sleepy(nn.Module):
    """A layer on whose way there and back a rank sleeps."""

    def __init__(self, spec: LayerSpec) -> None:
        super().__init__()
        self.layer = spec.build()

    def forward(self, x: Any) -> Any:
        y = self.layer(x)
        return _Sleep.apply(y) if isinstance(y, Tensor) else (_Sleep.apply(y[0]), *y[1:])


@dataclass(frozen=True)
class SleepyModel:
    """A model whose ranks begin with a :class:`Sleepy` layer."""

    model: Model
    starts: tuple[int, ...]

    @property
    def micro_batch(self) -> int:
        return self.model.micro_batch

    @property
    def streams(self) -> bool:
        return self.model.streams

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self.model.batches()

    def loss(self) -> Callable[[Any, Any], Tensor]:
        return self.model.loss()

    def describe(self) -> str:
        return self.model.describe()

    def specs(self) -> list[LayerSpec]:
        return [mark_block(LayerSpec(Sleepy, spec)) if i in self.starts else spec
                for i, spec in enumerate(self.model.specs())]


def serve(parent: Parent, method: str, model: Model, bounds: list[int]) -> None:
    """Build, warm up, and then obey: ``(calls of each rank, seconds that each sleeps a micro-batch)``."""
    runner = build(Configuration(method, 2, 1), model, bounds)
    for _ in range(max(12, runner.warm_up)):
        runner.call()
    parent.tell("ready")
    rank = torch.distributed.get_rank()
    while True:
        calls, sleeps = parent.told()
        _Sleep.seconds = sleeps[rank]
        start = time.perf_counter()
        for _ in range(calls[rank]):
            runner.call()
        parent.tell((time.perf_counter() - start) / max(1, calls[rank]))


def pace(model: Model, methods: Sequence[str], repeats: int, calls: int) -> tuple[str, list[dict[str, Any]]]:
    """A row a method: samples/s of both ranks with nobody slowed, with either slowed, and the fast one's share of what it does
    alone."""
    times = measure_layers(model)
    found: dict[str, dict[str, list[tuple[float, float]]]] = {name: {} for name in methods}
    with ExitStack() as ends:
        def start(method: str) -> World:
            bounds = bounds_for(Configuration(method, 2, 1), times)
            sleepy = SleepyModel(model, (bounds[0], bounds[1]))
            world = ends.enter_context(World(2, serve, method, sleepy, bounds, pinned=True))
            world.answers()
            return world

        # How long a rank takes alone is asked of ranks that run free: no other method lets one run without the other.
        free = start(FREE)
        worlds = {name: free if name == FREE else start(name) for name in methods}
        alone = [median(_ask(free, model, (calls, 0))[0] for _ in range(3)), median(_ask(free, model, (0, calls))[1]
                                                                                     for _ in range(3))]
        for _ in tqdm(range(repeats), unit="round"):
            for method, world in worlds.items():
                cases = found[method]
                for case, slow in (("none", None), ("rank 1", 1), ("rank 0", 0)):
                    sleeps = [model.micro_batch / alone[rank] if rank == slow else 0.0 for rank in (0, 1)]
                    # Of ranks that run free the slow one is to be at work for as long as the fast one, and not much longer.
                    own = [calls // 2 if method == FREE and rank == slow else calls for rank in (0, 1)]
                    cases.setdefault(case, []).append(_ask(world, model, own, sleeps))
                if method == FREE:
                    pair = _ask(world, model, (calls, 0))[0], _ask(world, model, (0, calls))[1]
                    cases.setdefault("alone", []).append(pair)
    return _table(found), [{"method": name, **cases} for name, cases in found.items()]


def _ask(world: World, model: Model, calls: Sequence[int], sleeps: Sequence[float] = (0.0, 0.0)) -> tuple[float, float]:
    """Samples/s of both ranks in so many calls of each."""
    first, second = world.ask((tuple(calls), tuple(sleeps)))
    return model.micro_batch / max(first, 1e-9), model.micro_batch / max(second, 1e-9)


def _table(found: dict[str, dict[str, list[tuple[float, float]]]]) -> str:
    rows = []
    for method, cases in found.items():
        def speed(case: str, rank: int, cases: dict[str, list[tuple[float, float]]] = cases) -> float:
            return median(pair[rank] for pair in cases[case])

        def share(case: str, fast: int, cases: dict[str, list[tuple[float, float]]] = cases) -> str:
            beside = cases.get("alone", cases["none"])
            ratio = median(own[fast] / other[fast] for own, other in zip(cases[case], beside))
            return f"{ratio:.2f}"

        rows.append([METHODS[method].label, f"{speed('none', 0):.1f} / {speed('none', 1):.1f}",
                     f"{speed('rank 1', 0):.1f} / {speed('rank 1', 1):.1f}", share("rank 1", 0),
                     f"{speed('rank 0', 0):.1f} / {speed('rank 0', 1):.1f}", share("rank 0", 1)])
    return table(["samples/s of rank 0 / rank 1", "nobody slowed", "rank 1 slowed 2×", "rank 0 keeps", "rank 0 slowed 2×",
                  "rank 1 keeps"], rows)

