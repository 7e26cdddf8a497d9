"""A simulated run as a picture: one row a rank, time to the right, one box an action."""

from __future__ import annotations

from pathlib import Path

from ds_decoupled.analysis.simulation import Simulation
from ds_decoupled.schedules.kinds import KINDS


def timeline(simulation: Simulation, path: str | Path, *, until: float | None = None, title: str = "") -> None:
    """Write the picture to ``path``; its ending chooses the format (``.png``, ``.svg``, ``.pdf``).

    Args:
        simulation: the run to draw.
        path: where to write.
        until: draw up to this time, in units of the costs; the whole run by default.
        title: a line above the picture.

    Raises:
        OSError: the file cannot be written.
        ValueError: the ending names no format.
    """
    # Here, not above: whoever only reads a plan needs no matplotlib. No pyplot, so no display is asked for.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    until = simulation.total_time if until is None else min(until, simulation.total_time)
    ranks = len(simulation.busy)
    width = max(4.0, min(24.0, 0.35 * until))
    figure = Figure(figsize=(2 + width, 1.2 + 0.6 * ranks), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    several = len({e.action.stage for e in simulation.events}) > ranks
    for event in simulation.events:
        if event.start == event.end or event.start >= until:
            continue
        end = min(event.end, until)
        axes.broken_barh([(event.start, end - event.start)], (event.rank - 0.4, 0.8),
                         facecolors=event.action.kind.colour, edgecolor="white", linewidth=0.8)
        if (end - event.start) * width < 0.2 * until:
            continue  # no room for a number
        text = f"{event.action.stage}:{event.action.micro_batch}" if several else str(event.action.micro_batch)
        axes.text((event.start + end) / 2, event.rank, text, ha="center", va="center", fontsize=7, clip_on=True)
    drawn = {event.action.kind for event in simulation.events if event.start < event.end}
    axes.legend(handles=[Patch(color=kind.colour, label=kind.words) for kind in KINDS.values() if kind in drawn],
                loc="upper left", bbox_to_anchor=(1, 1), fontsize=7, frameon=False)
    axes.set(xlim=(0, until), ylim=(ranks - 0.5, -0.5), yticks=range(ranks),
             yticklabels=[f"rank {r}" for r in range(ranks)], title=title,
             xlabel="time; in a box " + ("stage:micro-batch" if several else "the micro-batch"))
    figure.savefig(path, dpi=120)
