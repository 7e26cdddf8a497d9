"""From the asynchronous study's runs to tables and a picture: time to an accuracy, rates that can be used, slow replicas."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from run.tables import table
from studies.asynchronous_settings import WAYS, AsynchronousSetting, law

Run = Mapping[str, Any]
Runs = Mapping[AsynchronousSetting, Run]


def tuned(runs: Runs) -> dict[str, float]:
    """The rate of each way whose first seed is the most accurate in the end, without delay."""
    first = min((setting.seed for setting in runs), default=0)
    found: dict[str, tuple[float, float]] = {}
    for setting, run in runs.items():
        if "test_accuracy" in run and setting.delay == 0 and setting.seed == first:
            found[setting.way] = max(found.get(setting.way, (-1.0, 0.0)), (run["test_accuracy"], setting.rate))
    return {way: rate for way, (_, rate) in found.items()}


def reached(run: Run, target: float, name: str) -> float | None:
    """Where the curve first reaches the accuracy ``target``, between two evaluations in a straight line; None: nowhere.

    Args:
        name: of the curve's x, ``seconds`` or ``samples``.
    """
    points = [(0.0, 0.0), *((point[name], point["accuracy"]) for point in run["curves"])]
    for (x, y), (next_x, next_y) in pairwise(points):
        if next_y >= target > y:
            return float(x + (next_x - x) * (target - y) / (next_y - y))
    return None


def _chosen(runs: Runs, delay: float) -> dict[str, list[Run]]:
    """Done runs by way, at its tuned rate."""
    rates, found = tuned(runs), defaultdict(list)
    for setting, run in runs.items():
        if "test_accuracy" in run and setting.delay == delay and rates.get(setting.way) == setting.rate:
            found[setting.way].append(run)
    return {way: found[way] for way in WAYS if way in found}


def _spread(values: Sequence[float], form: str = ".1f") -> str:
    return format(fmean(values), form) + (f" ± {stdev(values):{form}}" if len(values) > 1 else "")


def _mean(of: Iterable[Run], name: str) -> float:
    return fmean(run[name] for run in of)


def _until(of: Sequence[Run], target: float, name: str, unit: float, form: str) -> str:
    values = [reached(run, target, name) for run in of]
    known = [value / unit for value in values if value is not None]
    return _spread(known, form) if len(known) == len(of) else f"{len(known)} of {len(of)} runs" if known else "never"


def _staleness(of: Sequence[Run]) -> str:
    rows = [fmean(row["mean"] for row in run["staleness"]) for run in of if run.get("staleness")]
    return f"{fmean(rows):.2f}" if rows else "0"


def accuracy_table(runs: Runs, target: float) -> str:
    """A row a way, at its tuned rate, means over seeds.

    Args:
        target: the accuracy that time and epochs are counted to.
    """
    rates, rows = tuned(runs), []
    for way, of in _chosen(runs, 0.0).items():
        rows.append([way, str(WAYS[way].replicas), f"{rates[way]:g}", f"{_mean(of, 'samples_per_second'):.0f}",
                     f"{1000 * _mean(of, 'cpu_seconds_per_batch'):.1f}", _spread([100 * run["test_accuracy"] for run in of]),
                     _until(of, target, "samples", of[0]["images"], ".2f"), _until(of, target, "seconds", 1, ".1f"),
                     _staleness(of)])
    return table(["way", "processes", "tuned rate", "samples/s", "CPU time a batch, ms", "test accuracy, %",
                  f"epochs to {target:.0%}", f"seconds to {target:.0%}", "staleness"], rows)


def rate_table(runs: Runs) -> str:
    """The final accuracy of the first seed by way and rate."""
    first = min((setting.seed for setting in runs), default=0)
    found = {(s.way, s.rate): run["test_accuracy"] for s, run in runs.items()
             if "test_accuracy" in run and s.delay == 0 and s.seed == first}
    rates = sorted({rate for _, rate in found})
    return table(["test accuracy, % (one seed)", *(f"{rate:g}" for rate in rates)],
                 [[way, *(f"{100 * found[way, rate]:.1f}" if (way, rate) in found else "–" for rate in rates)]
                  for way in WAYS if any(way == w for w, _ in found)])


def straggler_table(runs: Runs) -> str:
    """A row a delay and a way of replicas: speed, in samples/s and against the law, and accuracy; empty without delays."""
    rows = []
    for delay in sorted({setting.delay for setting in runs}):
        chosen = {way: of for way, of in _chosen(runs, delay).items() if WAYS[way].replicas > 1}
        for way, of in chosen.items():
            rate = _mean(of, "samples_per_second")
            base = chosen.get("synchronous")
            rows.append([f"{way}, d = {delay:g}", f"{rate:.0f}", f"{_mean(of, 'batches_per_batch_time'):.2f}",
                         "–" if base is None else f"{rate / _mean(base, 'samples_per_second'):.2f}",
                         "1" if WAYS[way].waits else f"{law(delay):.2f}", _spread([100 * run["test_accuracy"] for run in of])])
    return table(["exchange", "samples/s", "batches in a batch time", "/ synchronous", "law", "test accuracy of the mean, %"],
                 rows) if rows else ""


def tables(runs: Runs, target: float) -> str:
    """All of them; then what failed."""
    failed = [f"- {s.label}: {str(run['error']).splitlines()[0]}" for s, run in runs.items() if "error" in run]
    parts = [accuracy_table(runs, target), rate_table(runs), straggler_table(runs),
             "\n".join(["Failed:", *failed]) if failed else ""]
    return "\n\n".join(part for part in parts if part)


def draw(runs: Runs, target: float, path: Path) -> None:
    """Left, the final accuracy against the rate; right, the accuracy against time at the tuned rate. Replicas are dashed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    first = min((setting.seed for setting in runs), default=0)
    figure = Figure(figsize=(12, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    rates, time = figure.subplots(1, 2, sharey=True)
    for place, (name, way) in enumerate(WAYS.items()):
        style: dict[str, Any] = {"color": f"C{place}", "marker": ".", "linestyle": "--" if way.replicas > 1 else "-"}
        own = sorted((s.rate, 100 * run["test_accuracy"]) for s, run in runs.items()
                     if "test_accuracy" in run and (s.way, s.delay, s.seed) == (name, 0, first))
        if own:
            rates.plot(*zip(*own), label=name, **style)
        if of := _chosen(runs, 0.0).get(name):
            curves = zip(*(run["curves"] for run in of))
            points = [(fmean(p["seconds"] for p in at), 100 * fmean(p["accuracy"] for p in at)) for at in curves]
            time.plot(*zip(*points), label=name, **style)
    rates.set_xscale("log")
    known = sorted({setting.rate for setting in runs})
    rates.set_xticks(known, [f"{rate:g}" for rate in known], minor=False)
    rates.minorticks_off()
    rates.set(xlabel="peak of the learning rate", ylabel="test accuracy, %", title="in the end, one seed")
    time.axhline(100 * target, color="grey", linewidth=0.8)
    time.set(xlabel="seconds of training", title="at the tuned rate, mean over seeds")
    for panel in (rates, time):
        panel.grid(alpha=0.3)
    time.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
