"""From the fine-tuning study's runs to a table and a picture: what a method gains, as a share of what backpropagation gains."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from run.tables import MIB, table
from studies.finetune_settings import BARE, FinetuneSetting

Runs = Mapping[FinetuneSetting, dict[str, Any]]


def loss_at(run: Mapping[str, Any], update: int) -> float:
    """The validation loss after ``update`` updates, those of teaching counted."""
    curves = run["curves"]
    return float(curves["validation_loss"][curves["updates"].index(update)])


@dataclass(frozen=True)
class Line:
    """One setting over its seeds, beside backpropagation with the same seeds.

    Attributes:
        setting: with seed 0, whatever the seeds were.
        runs: one a seed.
        by_tokens, by_updates: shares of backpropagation's gain, one a seed: after as many tokens, those of teaching counted,
            and after as many updates of the stages.
    """

    setting: FinetuneSetting
    runs: list[dict[str, Any]]
    by_tokens: list[float]
    by_updates: list[float]

    def mean(self, name: str) -> float:
        """Of the runs' own numbers."""
        return fmean(run[name] for run in self.runs)


def lines_of(runs: Runs, updates: int) -> list[Line]:
    """In the order of the table; failed runs, and those without backpropagation of the same seed, are left out.

    Args:
        updates: of every stage.
    """
    base = {setting.seed: run for setting, run in runs.items() if setting.method == "backprop" and "curves" in run}
    found: dict[FinetuneSetting, list[tuple[dict[str, Any], dict[str, Any]]]] = defaultdict(list)
    for setting, run in runs.items():
        if "curves" in run and setting.seed in base:
            found[replace(setting, seed=0)].append((run, base[setting.seed]))
    lines = []
    for setting, pairs in found.items():
        def share(run: dict[str, Any], of: dict[str, Any], update: int) -> float:
            return (loss_at(run, 0) - loss_at(run, update)) / (loss_at(of, 0) - loss_at(of, updates))

        lines.append(Line(setting, [run for run, _ in pairs], [share(run, of, updates) for run, of in pairs],
                          [share(run, of, run["taught"] + updates) for run, of in pairs]))
    return sorted(lines, key=lambda line: (line.setting.method != "backprop", line.setting.stages, line.setting.method))


def _spread(values: list[float]) -> str:
    return f"{fmean(values):.2f}" + (f" ± {stdev(values):.2f}" if len(values) > 1 else "")


def tables(runs: Runs, updates: int) -> str:
    """A Markdown table; then what failed."""
    rows = []
    for line in lines_of(runs, updates):
        s, parameters = line.setting, line.runs[0]["parameters"]
        whole = s.method in ("backprop", BARE)
        rows.append([s.method, "–" if whole else str(s.stages), s.block if s.block != "{}" else "–",
                     str(len(line.runs)), f"{line.mean('validation_loss'):.4f}", _spread(line.by_updates),
                     _spread(line.by_tokens), f"{line.mean('teaching_seconds'):.0f}",
                     f"{fmean(run['curves']['seconds'][-1] for run in line.runs):.0f}",
                     f"{line.mean('peak_memory_bytes') / MIB:.0f}", f"{parameters['heads'] / 1e6:.1f}"])
    head = ["method", "J", "further", "seeds", "validation loss", "share of the gain, equal updates", "equal tokens",
            "teaching, s", "all, s", "peak memory, MiB", "heads, million weights"]
    failed = [f"- {s.label}: {str(run['error']).splitlines()[0]}" for s, run in runs.items() if "error" in run]
    return "\n\n".join([table(head, rows), *(["\n".join(["Failed:", *failed])] if failed else [])])


def draw(runs: Runs, updates: int, path: Path) -> None:
    """Shares of backpropagation's gain against J, by tokens (open) and by updates of the stages; and against time."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lines = lines_of(runs, updates)
    names = sorted({(line.setting.method, line.setting.block) for line in lines})
    colours = {name: f"C{i}" for i, name in enumerate(names)}
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    shares, time = figure.subplots(1, 2)
    for name in names:
        own = [line for line in lines if (line.setting.method, line.setting.block) == name]
        label = name[0] if [method for method, _ in names].count(name[0]) == 1 else f"{name[0]} {name[1]:.60}"
        if name[0] not in ("backprop", BARE):
            places = [line.setting.stages for line in own]
            shares.plot(places, [fmean(line.by_updates) for line in own], "-", marker="o", color=colours[name], label=label)
            shares.plot(places, [fmean(line.by_tokens) for line in own], ":", marker="o", fillstyle="none", color=colours[name])
        for line in own:
            curves, stages = line.runs[0]["curves"], "" if name[0] in ("backprop", BARE) else f", J = {line.setting.stages}"
            time.plot(curves["seconds"], curves["validation_loss"], marker=".", color=colours[name],
                      linestyle="-" if line.setting.stages < 3 else "--", label=f"{label}{stages}")
    shares.axhline(1, color="grey", linewidth=0.8)
    shares.set_xticks(sorted({line.setting.stages for line in lines if line.setting.method not in ("backprop", BARE)}))
    shares.set(xlabel="stages", ylabel="gain / backpropagation's gain", title="after equal updates; dotted: equal tokens")
    time.set(xlabel="seconds of one rank that has all stages", ylabel="validation loss, nats", title="teaching counted")
    for panel in (shares, time):
        panel.grid(alpha=0.3)
        panel.legend(fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
