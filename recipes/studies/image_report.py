"""From the image study's runs to tables and a picture: test accuracy along each line."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from run.curves import plot_curves
from run.tables import table
from studies.image_settings import ImageSetting

Runs = Mapping[ImageSetting, Mapping[str, Any]]


def _by_point(runs: Runs) -> dict[str, dict[float | None, list[Mapping[str, Any]]]]:
    """Done runs by line and x."""
    found: dict[str, dict[float | None, list[Mapping[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for setting, run in runs.items():
        if "test_accuracy" in run:
            found[setting.line][setting.x].append(run)
    return found


def _accuracy(runs: list[Mapping[str, Any]]) -> str:
    values = [100 * run["test_accuracy"] for run in runs]
    spread = f" ± {stdev(values):.1f}" if len(values) > 1 else ""
    return f"{fmean(values):.1f}{spread}"


def _replayed(run: Mapping[str, Any]) -> tuple[float, float, float]:
    """Mean uses of a micro-batch, mean age in updates, bytes of the rings."""
    rings = run["replay"]
    if not rings:
        return 1.0, 0.0, 0.0
    uses = [{int(n): count for n, count in ring["uses"].items()} for ring in rings]
    mean = fmean(sum(n * count for n, count in ring.items()) / sum(ring.values()) for ring in uses)
    return mean, fmean(ring["age"]["mean"] for ring in rings), sum(ring["bytes"] for ring in rings)


def delay_table(runs: Runs) -> str:
    """A row a line, a column an S."""
    found = _by_point(runs)
    xs = sorted({x for points in found.values() for x in points if x is not None})
    rows = []
    for line, points in found.items():
        beside = [_accuracy(points[None])] if None in points else ["–"]
        rows.append([line, *(beside if not xs or None in points else []),
                     *(_accuracy(points[x]) if x in points else "–" for x in xs if None not in points)])
        rows[-1] += [""] * (1 + len(xs) - len(rows[-1]))
    return table(["test accuracy, %", *(f"S = {x:g}" for x in xs)] if xs else ["", "test accuracy, %"], rows)


def codec_table(runs: Runs) -> str:
    """A row a codec, with what the rings hold."""
    rows = []
    for line, points in _by_point(runs).items():
        of = [run for found in points.values() for run in found]
        uses, age, held = (fmean(values) for values in zip(*map(_replayed, of)))
        rows.append([line, _accuracy(of), f"{held / 2**20:.1f}" if held else "–", f"{uses:.2f}", f"{age:.2f}",
                     f"{fmean(run['seconds'] for run in of):.0f}"])
    return table(["method, codec", "test accuracy, %", "rings, MiB", "uses of a micro-batch", "age, updates", "seconds"], rows)


def draw(runs: Runs, path: Path, title: str) -> None:
    """Accuracy against S, a curve a ring's size; level lines for what stands beside."""
    found = _by_point(runs)
    xs = sorted({x for points in found.values() for x in points if x is not None})
    curves = {}
    for line, points in found.items():
        at = xs if None in points else sorted(x for x in points if x is not None)
        curves[line] = [(x, 100 * fmean(run["test_accuracy"] for run in points[None if None in points else x])) for x in at]
    plot_curves(path, title, "slow-down S of one stage", {"test accuracy, %": curves}, whole=False)
