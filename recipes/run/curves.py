"""The picture of a run: curves against one x, on one or two axes, and panels by stage below."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

Curves = dict[str, list[tuple[float, float]]]
"""Points ``(x, y)`` by the curve's name; those without a value are left out."""


def plot_curves(path: Path, title: str, x_name: str, axes: dict[str, Curves],
                by_stage: dict[str, Curves] | None = None, whole: bool = True, log: bool = False) -> None:
    """One picture.

    Args:
        axes: the left axis's name and its curves; if there is a second one, the right axis's.
        by_stage: panels below, with one curve a stage; those without curves are left out.
        whole: whether only whole numbers are marked on the x axis.
        log: whether it is logarithmic.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import MaxNLocator

    below = {name: curves for name, curves in (by_stage or {}).items() if curves}
    figure, grid = plt.subplots(1 + len(below), figsize=(7, 4 + 3 * len(below)), layout="constrained", sharex=True,
                                squeeze=False)
    first, *panels = grid[:, 0]

    def draw(axis: Any, name: str, points: list[tuple[float, float]], colour: Any) -> None:
        known = [(x, y) for x, y in points if math.isfinite(y)]
        axis.plot([x for x, _ in known], [y for _, y in known], marker=".", color=colour, label=name)

    colours = iter(f"C{i}" for i in range(10))
    for number, (axis_name, curves) in enumerate(axes.items()):
        axis = first if number == 0 else first.twinx()
        for name, points in curves.items():
            colour = next(colours)
            draw(axis, name, points, colour)
        axis.set_ylabel(axis_name, color=colour if len(curves) == 1 else "black")
        if len(curves) > 1:
            axis.legend()
    for panel, (axis_name, curves) in zip(panels, below.items()):
        for place, (name, points) in enumerate(curves.items()):
            draw(panel, name, points, plt.get_cmap("viridis")(place / max(1, len(curves) - 1)))
        panel.set_ylabel(axis_name)
        panel.legend(fontsize="small", ncols=2)
    (panels or [first])[-1].set_xlabel(x_name)
    if log:
        first.set_xscale("log")
    if whole:
        first.xaxis.set_major_locator(MaxNLocator(integer=True))
    first.set_title(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
