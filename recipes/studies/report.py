"""From the delay study's runs to tables and a picture: every loss against backpropagation with the same optimizer and k."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from run.tables import table
from studies.settings import Setting


@dataclass(frozen=True)
class Row:
    """One setting over its seeds.

    Attributes:
        setting: with seed 0, whatever the seeds were.
        losses: validation losses in nats, one a seed.
        error: mean relative error of what the lowest coupling's input was rebuilt to; None where nothing is rebuilt.
        gap: mean loss minus backpropagation's best with the same optimizer and k; None without such a run.
        delay: of the first stage's gradients, in updates: the schedule's, or what threads came to.
        seconds: of training, mean over the seeds.
    """

    setting: Setting
    losses: list[float]
    error: float | None
    gap: float | None
    delay: float
    seconds: float

    @property
    def loss(self) -> float:
        return fmean(self.losses)


def rows_of(runs: Mapping[Setting, dict[str, Any]]) -> list[Row]:
    """Settings in the order of the table; failed runs and losses that are not finite are left out."""
    seeds: dict[Setting, list[dict[str, Any]]] = defaultdict(list)
    for setting, run in runs.items():
        loss = run.get("validation_loss")
        if loss is not None and math.isfinite(loss):
            seeds[replace(setting, seed=0)].append(run)
    best: dict[tuple[str, int], float] = {}
    for setting, found in seeds.items():
        if setting.method == "backprop":
            key = setting.optimizer, setting.k
            best[key] = min(best.get(key, math.inf), fmean(run["validation_loss"] for run in found))
    rows = []
    for setting, found in seeds.items():
        losses = [run["validation_loss"] for run in found]
        errors = [run["reconstruction_error"] for run in found if run.get("reconstruction_error") is not None]
        baseline = best.get((setting.optimizer, setting.k))
        measured = [run["staleness"][0] for run in found if run.get("staleness")]
        rows.append(Row(setting, losses, fmean(errors) if errors else None,
                        None if baseline is None else fmean(losses) - baseline,
                        fmean(measured) if measured else setting.delay, fmean(run["seconds"] for run in found)))
    return sorted(rows, key=lambda row: (row.setting.k, row.setting.optimizer, row.setting.method != "backprop",
                                         row.setting.method, row.setting.stages, row.setting.hops, row.loss))


def tables(runs: Mapping[Setting, dict[str, Any]]) -> str:
    """One Markdown table for every k; losses in nats, delays in updates."""
    rows = rows_of(runs)
    parts = []
    head = ["optimizer", "method", "J", "hops", "delay of stage 0", "rate", "embedding std", "further", "seeds",
            "validation loss", "minus backprop", "reconstruction error", "seconds"]
    for k in sorted({row.setting.k for row in rows}):
        lines = []
        for row in (row for row in rows if row.setting.k == k):
            s = row.setting
            further = [f"lr_by_delay {s.lr_by_delay}"] * bool(s.lr_by_delay)
            further += [text for text in (s.params, s.block) if text != "{}"]
            spread = f" ± {stdev(row.losses):.3f}" if len(row.losses) > 1 else ""
            where = ["–" if s.method == "backprop" else str(s.stages),
                     f"({s.hops[0]}, {s.hops[1]})" if s.hops_matter or s.method == "reversible" else "–"]
            lines.append([s.optimizer, s.method, *where, f"{row.delay:.3g}", f"{s.lr:g}", f"{s.embedding_std:g}",
                          ", ".join(further) or "–", str(len(row.losses)), f"{row.loss:.3f}{spread}",
                          "–" if row.gap is None else f"{row.gap:+.3f}", "–" if row.error is None else f"{row.error:.2g}",
                          f"{row.seconds:.0f}"])
        parts.append(f"k = {k}\n\n{table(head, lines)}")
    failed = [f"- {s.label}: {str(run['error']).splitlines()[0]}" for s, run in runs.items() if "error" in run]
    if failed:
        parts.append("\n".join(["Failed:", *failed]))
    return "\n\n".join(parts)


def draw(runs: Mapping[Setting, dict[str, Any]], path: Path) -> None:
    """Loss minus backpropagation's against the delay of stage 0: a panel for each k, a line for each optimizer, method and
    further settings.

    Of several rates and scales the best one stands for a point.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    points: dict[tuple[int, str, str], dict[float, float]] = defaultdict(dict)
    for row in rows_of(runs):
        s = row.setting
        if row.gap is None:
            continue
        line = points[s.k, s.optimizer, s.method if s.block == "{}" else f"{s.method} {s.block}"]
        line[row.delay] = min(line.get(row.delay, math.inf), row.gap)
    delayed = {key: line for key, line in points.items() if max(line) > 0}
    ks = sorted({k for k, _, _ in delayed})
    optimizers = sorted({optimizer for _, optimizer, _ in delayed})
    methods = sorted({method for _, _, method in delayed})
    styles = dict(zip(methods, ["-", "--", ":", "-."] * len(methods)))
    figure = Figure(figsize=(2.5 + 4.2 * max(1, len(ks)), 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, max(1, len(ks)), sharey=True, squeeze=False)[0]
    for panel, k in zip(panels, ks):
        panel.axhline(0, color="grey", linewidth=0.8)
        for (own_k, optimizer, method), line in sorted(delayed.items()):
            if own_k == k:
                panel.plot(*zip(*sorted({0.0: 0.0, **line}.items())), styles[method], marker="o", markersize=4,
                           color=f"C{optimizers.index(optimizer)}", label=f"{optimizer}, {method}")
        panel.set(title=f"k = {k}", xlabel="delay of stage 0, updates")
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8)
    panels[0].set_ylabel("validation loss minus backprop's, nats")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
