"""From the fine-tuning study's runs to a table and a picture: what a method gains, as a share of what backpropagation gains."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from run.tables import MIB, table
from studies.finetune_settings import BARE, FinetuneSetting

Runs = Mapping[FinetuneSetting, dict[str, Any]]


@dataclass(frozen=True)
class Line:
    """One setting over its seeds, beside backpropagation with the same seeds.

    Attributes:
        setting: with seed 0, whatever the seeds were.
        runs: one a seed.
        shares: of backpropagation's gain after as many tokens, one a seed.
    """

    setting: FinetuneSetting
    runs: list[dict[str, Any]]
    shares: list[float]

    def mean(self, name: str) -> float:
        """Of the runs' own numbers."""
        return fmean(run[name] for run in self.runs)


def lines_of(runs: Runs) -> list[Line]:
    """In the order of the table; failed runs, and those without backpropagation of the same seed, are left out."""
    base = {setting.seed: run for setting, run in runs.items() if setting.method == "backprop" and "curves" in run}
    found: dict[FinetuneSetting, list[tuple[dict[str, Any], dict[str, Any]]]] = defaultdict(list)
    for setting, run in runs.items():
        if "curves" in run and setting.seed in base:
            found[replace(setting, seed=0)].append((run, base[setting.seed]))
    lines = [Line(setting, [run for run, _ in pairs], [_gain(run) / _gain(of) for run, of in pairs])
             for setting, pairs in found.items()]
    return sorted(lines, key=lambda line: (line.setting.method != "backprop", line.setting.stages, line.setting.method))


def _gain(run: Mapping[str, Any]) -> float:
    losses = run["curves"]["validation_loss"]
    return float(losses[0] - losses[-1])


def _spread(values: list[float]) -> str:
    return f"{fmean(values):.2f}" + (f" ± {stdev(values):.2f}" if len(values) > 1 else "")


def tables(runs: Runs) -> str:
    """A Markdown table; then what failed."""
    rows = []
    for line in lines_of(runs):
        s, parameters = line.setting, line.runs[0]["parameters"]
        whole = s.method in ("backprop", BARE)
        rows.append([s.method, "–" if whole else str(s.stages), s.block if s.block != "{}" else "–",
                     str(len(line.runs)), f"{line.mean('validation_loss'):.4f}", _spread(line.shares),
                     f"{fmean(run['curves']['seconds'][-1] for run in line.runs):.0f}",
                     f"{line.mean('peak_memory_bytes') / MIB:.0f}", f"{parameters['heads'] / 1e6:.1f}"])
    head = ["method", "J", "further", "seeds", "validation loss", "share of the gain", "seconds", "peak memory, MiB",
            "heads, million weights"]
    failed = [f"- {s.label}: {str(run['error']).splitlines()[0]}" for s, run in runs.items() if "error" in run]
    return "\n\n".join([table(head, rows), *(["\n".join(["Failed:", *failed])] if failed else [])])


def differing(block: str, blocks: list[str]) -> str:
    """What ``block`` says that not all ``blocks`` say, as JSON; nothing where it is the only one."""
    own, others = json.loads(block), [json.loads(other) for other in blocks]
    told = {name: value for name, value in own.items() if any(other.get(name) != value for other in others)}
    return json.dumps(told)[1:-1]


def draw(runs: Runs, path: Path) -> None:
    """Shares of backpropagation's gain against J and memory, and losses against updates and time."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lines = lines_of(runs)
    names = sorted({(line.setting.method, line.setting.block) for line in lines})
    colours = {name: f"C{i}" for i, name in enumerate(names)}
    figure = Figure(figsize=(12, 8.6), layout="constrained")
    FigureCanvasAgg(figure)
    (shares, memory), (updates, time) = figure.subplots(2, 2)
    for name in names:
        own = [line for line in lines if (line.setting.method, line.setting.block) == name]
        label = f"{name[0]} {differing(name[1], [block for method, block in names if method == name[0]])}".strip()
        if name[0] not in ("backprop", BARE):
            places = [line.setting.stages for line in own]
            shares.plot(places, [fmean(line.shares) for line in own], "-", marker="o", color=colours[name])
            for line in own:
                shares.plot([line.setting.stages] * len(line.shares), line.shares, ".", color=colours[name], alpha=0.4)
        memory.plot([line.mean("peak_memory_bytes") / 2**30 for line in own], [fmean(line.shares) for line in own], "o",
                    color=colours[name], label=label)
        for line in own:
            curves = line.runs[0]["curves"]
            for panel, along in ((updates, "updates"), (time, "seconds")):
                panel.plot(curves[along], curves["validation_loss"], marker=".", color=colours[name],
                           linestyle="-" if line.setting.stages < 3 else "--")
    shares.axhline(1, color="grey", linewidth=0.8)
    shares.set_xticks(sorted({line.setting.stages for line in lines if line.setting.method not in ("backprop", BARE)}))
    shares.set(xlabel="stages", ylabel="gain / backpropagation's gain", title="after equal tokens; a dot a seed")
    memory.set(xlabel="peak memory of one rank that has all stages, GiB", ylabel="gain / backpropagation's gain",
               title="against memory; the mean of the seeds")
    updates.set(xlabel="updates", ylabel="validation loss, nats", title="lessons counted; first seed; dashed: 3 stages or more")
    time.set(xlabel="seconds of one rank that has all stages", title="the same, against time")
    for panel in (shares, memory, updates, time):
        panel.grid(alpha=0.3)
    figure.legend(loc="outside lower center", fontsize=8)  # one for all panels: names are long, and would lie on the curves
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
