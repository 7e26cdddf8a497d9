"""Methods times ranks: samples per second in turns, beside the laws that they should follow."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

from tqdm import tqdm

from bench.models import Model
from bench.plan import METHODS, Configuration, configurations, laws
from bench.rank import profile, serve
from bench.report import Measurement, as_json, law_table, laws_as_json, speed_table
from ds_decoupled.schedules import balanced_bounds
from ds_decoupled.threads import usable_cores
from run.tables import table
from run.worlds import World, WorldFailed


def measure_layers(model: Model) -> dict[str, list[float]]:
    """Seconds of every layer, by what ``Method.cost`` names: measured once, so that all are cut by the same numbers."""
    with World(1, profile, model, pinned=True) as world:
        times: dict[str, list[float]] = world.answers()[0]
    return times


def bounds_for(configuration: Configuration, times: dict[str, list[float]]) -> list[int]:
    """The layers at which ranks begin, balanced by what they cost under this method."""
    method = METHODS[configuration.method]
    parts = configuration.ranks * (2 if method.runner == "dualpipev" else 1)
    return balanced_bounds(times[method.cost], parts)


def measure(model: Model, chosen: list[Configuration], times: dict[str, list[float]], micro_batches: int,
            repeats: int) -> dict[Configuration, Measurement]:
    """Start a world for each configuration, time them in turns, then look at their memory."""
    measured = {c: Measurement(bounds=bounds_for(c, times)) for c in chosen}
    alive: dict[Configuration, World] = {}
    bar = tqdm(total=(repeats + 2) * len(chosen), unit="timing")

    def attempt(c: Configuration, action: Callable[[Configuration], object]) -> None:
        bar.set_postfix_str(str(c))
        try:
            action(c)
        except WorldFailed as error:
            measured[c].error = str(error)
            alive.pop(c).end()
            bar.write(f"{c} failed: {error}")
        bar.update()

    def begin(c: Configuration) -> None:
        method = METHODS[c.method]
        alive[c] = ends.enter_context(World(c.ranks, serve, c, model, measured[c].bounds, pinned=not method.all_cores,
                                            threads=usable_cores() if method.split_operations else 1))
        alive[c].answers()

    def time_once(c: Configuration) -> None:
        calls = math.ceil(micro_batches / c.k)
        copies = c.ranks if METHODS[c.method].copies else 1
        measured[c].add(alive[c].ask(("time", calls)), copies * calls * c.k * model.micro_batch)

    def watch(c: Configuration) -> None:
        measured[c].watched = alive[c].ask(("watch", 1))

    with ExitStack() as ends, bar:
        for c in chosen:
            attempt(c, begin)
        for _ in range(repeats):
            for c in chosen:
                if c in alive:
                    attempt(c, time_once)
                if c not in alive:
                    measured[c].rates.append(None)
        for c in list(alive):
            attempt(c, watch)
    return measured


def speed(model: Model, methods: Sequence[str], ranks: Sequence[int], ks: Sequence[int], repeats: int,
          calls: int) -> tuple[str, dict[str, Any]]:
    """The tables and all numbers.

    Args:
        methods: names of ``METHODS``.
        ranks, ks: P and k; every combination that a method can run with is measured.
        repeats: rounds.
        calls: of a timing, at the largest k.
    """
    measured: dict[Configuration, Measurement] = {}
    times = measure_layers(model)
    for k in ks:
        chosen = configurations(methods, ranks, k, layers=len(model.specs()))
        measured |= measure(model, chosen, times, calls * max(ks), repeats)
    rules = [law for p in ranks for k in ks for law in laws(p, k)]
    cuts: dict[tuple[str, ...], list[str]] = {}
    for c, m in measured.items():
        if c.ranks > 1 and not METHODS[c.method].copies:
            cost = times[METHODS[c.method].cost]
            shares = [sum(cost[a:b]) / sum(cost) for a, b in zip(m.bounds, m.bounds[1:])]
            row = str(c.ranks), str(m.bounds), " / ".join(f"{share:.1%}" for share in shares)
            cuts.setdefault(row, []).append(c.label)
    partitions = table(["methods", "P", "ranks begin at layers", "share of the measured time"],
                       ([", ".join(dict.fromkeys(labels)), *row] for row, labels in cuts.items()))
    text = "\n\n".join([speed_table(measured), law_table(measured, rules), partitions])
    return text, {"measured": as_json(measured), "laws": laws_as_json(measured, rules), "layer_seconds": times}
