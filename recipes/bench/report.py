"""From timings to tables: medians, ratios round by round, and what the laws make of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from bench.plan import Configuration, Law
from run.tables import MIB, table


@dataclass
class Measurement:
    """What a configuration's world did.

    Attributes:
        rates: samples/s, one a round; None where the world did not answer.
        idle: share of each rank's time that went into waiting, by round and rank.
        cpu: share of each rank's time in which its core worked, likewise.
        bytes_per_sample: sent between ranks.
        watched: by rank: memory and activations.
        bounds: layers at which ranks (DualPipeV: its 2P stages) begin.
        error: why there is nothing (more).
    """

    rates: list[float | None] = field(default_factory=list)
    idle: list[list[float]] = field(default_factory=list)
    cpu: list[list[float]] = field(default_factory=list)
    bytes_per_sample: float = 0.0
    watched: list[dict[str, Any]] = field(default_factory=list)
    bounds: list[int] = field(default_factory=list)
    error: str | None = None

    @property
    def rate(self) -> float | None:
        """Median samples/s."""
        rates = [rate for rate in self.rates if rate is not None]
        return median(rates) if rates else None

    def add(self, answers: Sequence[Mapping[str, float]], samples: int) -> None:
        """One round's timing from every rank; all ranks began together, and the slowest one's end counts."""
        start = min(a["start"] for a in answers)
        wall = max(a["end"] for a in answers) - start
        self.rates.append(samples / wall)
        # A rank that is done before the others waits for them, though it need not: the next call would go on.
        self.idle.append([(wall - (a["end"] - a["start"]) + a["waited"]) / wall for a in answers])
        self.cpu.append([a["cpu"] / wall for a in answers])
        self.bytes_per_sample = sum(a["bytes_sent"] for a in answers) / samples


def by_rank(rounds: Sequence[Sequence[float]]) -> list[float]:
    """Median over the rounds, of each rank."""
    return [median(values) for values in zip(*rounds)]


def ratio(measured: Mapping[Configuration, Measurement], law: Law) -> float | None:
    """Median over the rounds of the two speeds' ratio; None unless both were measured."""
    fast, slow = measured.get(law.fast), measured.get(law.slow)
    if fast is None or slow is None:
        return None
    ratios = [a / b for a, b in zip(fast.rates, slow.rates) if a is not None and b is not None]
    return median(ratios) if ratios else None


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def speed_table(measured: Mapping[Configuration, Measurement]) -> str:
    """One row a configuration."""
    rows = []
    for c, m in measured.items():
        rate = _number(m.rate, ".1f") if m.rate is not None else f"failed: {(m.error or '?').splitlines()[0][:80]}"
        idle = " / ".join(f"{share:.0%}" for share in by_rank(m.idle)) or "–"
        memory = " / ".join(f"{w['peak_memory_bytes'] / MIB:.0f}" for w in m.watched) or "–"
        kept = " / ".join(f"{w['kept'] / MIB:.1f}" if "kept" in w else "–" for w in m.watched) or "–"
        rows.append([c.label, str(c.ranks), str(c.k), rate, idle, memory, kept, f"{m.bytes_per_sample / 1024:.0f}"])
    return table(["method", "P", "k", "samples/s", "idle by rank", "peak memory by rank, MiB", "activations kept by rank, MiB",
                  "KiB sent a sample"], rows)


def law_table(measured: Mapping[Configuration, Measurement], laws: Iterable[Law]) -> str:
    """One row a law that could be measured: the ratio, the law, and their quotient."""
    rows = []
    for law in laws:
        value = ratio(measured, law)
        if value is not None:
            share = value / law.value
            verdict = "" if not law.target else "yes" if share >= law.target else "no"
            rows.append([law.name, str(law.fast.k), f"{value:.3f}", f"{law.value:.3f}", f"{share:.3f}",
                         f"{law.target:.2f}" if law.target else "", verdict])
    return table(["ratio of samples/s", "k", "measured", "law", "measured / law", "asked for", "met"], rows)


def as_json(measured: Mapping[Configuration, Measurement]) -> list[dict[str, Any]]:
    """Everything, for a file."""
    return [{"method": c.method, "label": c.label, "ranks": c.ranks, "k": c.k, "samples_per_second": m.rate, **vars(m)}
            for c, m in measured.items()]


def laws_as_json(measured: Mapping[Configuration, Measurement], laws: Iterable[Law]) -> list[dict[str, Any]]:
    """The laws that could be measured."""
    return [{"name": law.name, "ranks": law.fast.ranks, "k": law.fast.k, "measured": value, "law": law.value,
             "target": law.target} for law in laws if (value := ratio(measured, law)) is not None]
