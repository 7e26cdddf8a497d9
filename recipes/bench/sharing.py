"""Ways to give one model all cores: threads that go forward and back, workers, operations that are split, data parallelism."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from bench.models import Model
from bench.plan import Configuration, Law, configurations
from bench.report import Measurement, as_json, by_rank, ratio
from bench.speed import measure, measure_layers
from run.tables import MIB, table

HEAD = ["way", "processes", "samples/s", "/ one core", "CPU time a batch, ms", "/ one core", "peak memory, MiB",
        "forward threads busy", "backward threads busy", "staleness"]


def sharing(model: Model, methods: Sequence[str], repeats: int, calls: int) -> tuple[str, list[dict[str, Any]]]:
    """The table and all numbers; every batch is an update (k = 1).

    Args:
        methods: names of ``METHODS``; ``bare-backprop`` among them is the one core that others are compared with.
        repeats: rounds.
        calls: of a timing.
    """
    chosen = configurations(methods, [1], 1, len(model.specs())) + configurations(methods, [2], 1, len(model.specs()))
    measured = measure(model, chosen, measure_layers(model), calls, repeats)
    base = Configuration("bare-backprop", 1, 1)
    return table(HEAD, (_row(c, measured, base, model.micro_batch) for c in chosen)), as_json(measured)


def _row(c: Configuration, measured: Mapping[Configuration, Measurement], base: Configuration, micro_batch: int) -> list[str]:
    m = measured[c]
    if m.rate is None:
        return [c.label, str(c.ranks), f"failed: {(m.error or '?').splitlines()[0][:80]}", *["–"] * (len(HEAD) - 3)]
    faster = ratio(measured, Law("", c, base, 1.0, 0.0))
    cpu, plain = cpu_seconds(m, micro_batch), None if base not in measured else cpu_seconds(measured[base], micro_batch)
    watched = m.watched[0] if m.watched else {}
    threads, staleness = watched.get("threads", {}), watched.get("staleness", [])
    return [c.label, str(c.ranks), f"{m.rate:.0f}", "–" if faster is None else f"{faster:.2f}",
            "–" if cpu is None else f"{1000 * cpu:.1f}", "–" if cpu is None or plain is None else f"{cpu / plain:.2f}",
            f"{sum(w['peak_memory_bytes'] for w in m.watched) / MIB:.0f}" if m.watched else "–",
            _shares(threads.get("forward_busy")), _shares(threads.get("backward_busy")),
            f"{fmean(row['mean'] for row in staleness):.2f}" if staleness else "–"]


def cpu_seconds(m: Measurement, micro_batch: int) -> float | None:
    """Of all processes, for a batch; None where nothing was measured."""
    return sum(by_rank(m.cpu)) / m.rate * micro_batch if m.rate and m.cpu else None


def _shares(busy: Sequence[float | None] | None) -> str:
    return " / ".join("–" if share is None else f"{share:.0%}" for share in busy) if busy else "–"
