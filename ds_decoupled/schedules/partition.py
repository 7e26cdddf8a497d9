"""Layers to stages and stages to ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate


@dataclass(frozen=True)
class Placement:
    """Which layers make a stage, and which stages a rank holds; both as runs of consecutive ones.

    Attributes:
        stage_bounds: J+1 layer indices: stage ``s`` is layers ``stage_bounds[s]:stage_bounds[s+1]``.
        rank_bounds: P+1 stage indices: rank ``r`` holds stages ``rank_bounds[r]:rank_bounds[r+1]``.
    """

    stage_bounds: tuple[int, ...]
    rank_bounds: tuple[int, ...]

    @staticmethod
    def of(stages: int, ranks: int) -> Placement:
        """``stages`` stages of one layer each, spread evenly over ``ranks``."""
        return Placement(tuple(range(stages + 1)), tuple(uniform_bounds(stages, ranks)))

    @property
    def stages(self) -> int:
        return len(self.stage_bounds) - 1

    @property
    def ranks(self) -> int:
        return len(self.rank_bounds) - 1

    @cached_property
    def rank_of_stage(self) -> tuple[int, ...]:
        return tuple(r for r in range(self.ranks) for _ in self.stages_of(r))

    def stages_of(self, rank: int) -> range:
        return range(self.rank_bounds[rank], self.rank_bounds[rank + 1])

    def layers_of(self, stage: int) -> range:
        return range(self.stage_bounds[stage], self.stage_bounds[stage + 1])

    @property
    def rank_layer_bounds(self) -> list[int]:
        """P+1 layer indices at which ranks begin (DeepSpeed's ``parts``)."""
        return [self.stage_bounds[s] for s in self.rank_bounds]


def uniform_bounds(items: int, parts: int) -> list[int]:
    """Bounds of ``parts`` runs whose lengths differ by one at the most."""
    return [items * i // parts for i in range(parts + 1)]


def balanced_bounds(weights: Sequence[float], parts: int, last: Sequence[float] | None = None,
                    beside: Callable[[int, int], float] | None = None) -> list[int]:
    """Bounds of ``parts`` non-empty runs whose heaviest run is as light as can be.

    Args:
        weights: one per item.
        parts: how many runs.
        last: what the items weigh in the last run, where that differs (the last stage recomputes nothing).
        beside: what a run weighs beside its items, from its number and the item that it ends before; the last run nothing.

    Exact, by dynamic programming over prefix sums; of the cuts with the same heaviest run, one with the smallest sum of
    squares, so that the rest is even too.
    """
    n = len(weights)
    if not 1 <= parts <= n:
        raise ValueError(f"cannot cut {n} items into {parts} non-empty parts")
    prefix = [0.0, *accumulate(float(w) for w in weights)]

    last_prefix = prefix if last is None else [0.0, *accumulate(float(w) for w in last)]
    more = [[0.0 if beside is None or end == n else beside(part, end) for end in range(n + 1)] for part in range(parts)]

    def run(part: int, begin: int, end: int) -> float:
        sums = last_prefix if end == n else prefix
        return sums[end] - sums[begin] + more[part][end]

    lightest = [0.0, *(float("inf") for _ in range(n))]
    for part in range(parts):
        lightest = [min((max(lightest[cut], run(part, cut, end)) for cut in range(end)), default=float("inf"))
                    for end in range(n + 1)]
    # A second pass, because a lighter beginning may be less even: among all cuts within the limit, the most even one.
    limit, infinite = lightest[n], (float("inf"), 0)
    best = [[(0.0, 0), *(infinite for _ in range(n))]]
    for part in range(parts):
        best.append([min(((best[-1][cut][0] + run(part, cut, end) ** 2, cut) for cut in range(end)
                          if run(part, cut, end) <= limit), default=infinite) for end in range(n + 1)])
    bounds = [n]
    for part in range(parts, 0, -1):
        bounds.append(best[part][bounds[-1]][1])
    return bounds[::-1]
