"""From the AuxNet study's runs to a table, and pictures of what was swept."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from ds_decoupled.settings.auxnet import AuxNetSettings
from run.curves import plot_curves
from run.tables import table
from studies.auxnet_settings import AuxNetSetting

Runs = Mapping[AuxNetSetting, Mapping[str, Any]]


def _alike(runs: Runs) -> dict[tuple[str, int, str, int], list[Mapping[str, Any]]]:
    """Done runs that differ in their seeds alone."""
    found: dict[tuple[str, int, str, int], list[Mapping[str, Any]]] = defaultdict(list)
    for setting, run in runs.items():
        if "test_accuracy" in run:
            found[setting.method, setting.stages, setting.auxnet, setting.serial_epochs].append(run)
    return found


def _percent(values: Sequence[float]) -> str:
    spread = f" ± {100 * stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * fmean(values):.1f}{spread}"


def _means(rows: Iterable[Sequence[float]]) -> list[float]:
    return [fmean(column) for column in zip(*rows)]


def mismatches(runs: Iterable[Mapping[str, Any]]) -> list[float]:
    """Of the last epoch with generated inputs, by stage."""
    return _means([epoch for epoch in run["mismatch"] if epoch][-1] for run in runs if any(run.get("mismatch", [])))


def cosines(run: Mapping[str, Any]) -> list[float]:
    """By stage, over the second half of the run (where that is serial training, 1)."""
    rows = run.get("cosines", [])
    late = [row for row in rows if row["micro_batch"] * 2 >= max(row["micro_batch"] for row in rows)]
    return [fmean(row["cosine"] for row in late if row["stage"] == s) for s in sorted({row["stage"] for row in late})]


def accuracy_table(runs: Runs) -> str:
    """A row a setting: the serial network, the same from each stage on, mismatch and cosine by stage."""
    rows = []
    for (method, stages, auxnet, serial), alike in _alike(runs).items():
        words = ", ".join([*(f"{name} {value:g}" for name, value in json.loads(auxnet).items()),
                           *([f"{serial} epochs serial"] if serial else [])])
        row = [f"`{method}`", str(stages) if stages > 1 else "–", words or "–", _percent([r["test_accuracy"] for r in alike])]
        if method == "backprop":
            rows.append([*row, "–", "–", "–", "–"])
            continue
        beyond = _means(r["accuracy_from_stage"][1:] for r in alike)
        rows.append([*row, " · ".join(f"{100 * a:.1f}" for a in beyond), " · ".join(f"{m:.2f}" for m in mismatches(alike)),
                     " · ".join(f"{c:.2f}" for c in _means(map(cosines, alike))), f"{100 * alike[0]['share']:.0f} %"])
    return table(["method", "K", "settings", "serial accuracy, %", "from stage 1 … K−1 on its generated input, %",
                  "mismatch of stage 0 … K−2", "cosine of stage 0 … K−1", "AuxNet"], rows)


def draw(runs: Runs, name: str, path: Path) -> bool:
    """Accuracy and mismatch against the setting ``name``, where runs differ in it; returns whether they do."""
    found = _alike(runs)
    axes: dict[str, dict[str, list[tuple[float, float]]]] = {"test accuracy, %": {}, "mismatch of the last pair": {}}
    lines: dict[str, list[tuple[float, list[Mapping[str, Any]]]]] = defaultdict(list)
    defaults = AuxNetSettings().model_dump()
    for (method, stages, auxnet, serial), alike in found.items():
        settings = json.loads(auxnet)
        if method != "backprop":
            others = ", ".join([*(f"{key} {value:g}" for key, value in settings.items() if key != name),
                                *([f"{serial} epochs serial"] if serial else [])])
            lines[f"{method.removeprefix('auxnet_')}, K = {stages}" + (f" ({others})" if others else "")].append(
                (settings.get(name, defaults[name]), alike))
    lines = {line: points for line, points in lines.items() if len(points) > 1}
    if not lines:
        return False
    for line, points in lines.items():
        points.sort(key=lambda point: point[0])
        axes["test accuracy, %"][f"serial, {line}"] = [
            (x, 100 * fmean(run["test_accuracy"] for run in alike)) for x, alike in points]
        axes["test accuracy, %"][f"from the last stage, {line}"] = [
            (x, 100 * fmean(run["accuracy_from_stage"][-1] for run in alike)) for x, alike in points]
        axes["mismatch of the last pair"][line] = [(x, mismatches(alike)[-1]) for x, alike in points]
    plain = [run["test_accuracy"] for (method, *_), alike in found.items() if method == "backprop" for run in alike]
    if plain:
        xs = [x for points in lines.values() for x, *_ in points]
        axes["test accuracy, %"]["backprop"] = [(x, 100 * fmean(plain)) for x in (min(xs), max(xs))]
    top = {"test accuracy, %": axes["test accuracy, %"]}
    plot_curves(path, f"AuxNet: {name}", name, top, {"mismatch of the last pair": axes["mismatch of the last pair"]},
                whole=False, log=True)
    return True
