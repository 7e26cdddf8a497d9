"""Activation memory of a GPT against its depth and against the number of stages J: a table and a picture."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from bench.live import Job, count_all
from bench.models import Model, make_model
from bench.plan import METHODS, Configuration
from ds_decoupled.schedules import uniform_bounds
from run.tables import MIB, table
from run.worlds import World, WorldFailed

DEPTHS = (4, 8, 16, 32)
STAGES = (2, 3, 6, 9, 18)
STAGES_AT = 8
"""Blocks of the GPT that is cut into so many stages."""

OURS = ("petra", "dsp", "delayed")
DEEPSPEED = ("1f1b", "1f1b-checkpoint")
DEEPSPEED_RANKS = (2, 3, 6)
"""J of DeepSpeed's pipelines, where a stage is a rank; processes that this many need fit a small machine."""

COLOURS = {"petra": "#d1495b", "dsp": "#edae49", "delayed": "#66a182", "1f1b": "#7d8ca3", "1f1b-checkpoint": "#2e4057"}


@dataclass(frozen=True)
class Point:
    """A method on a GPT of so many blocks in J stages; ours on one rank, DeepSpeed's on J.

    Attributes:
        sweep: ``depth`` (J grows with the model where it is ours, and is 2 for DeepSpeed's) or ``stages``.
    """

    sweep: str
    method: str
    blocks: int
    stages: int

    @property
    def ours(self) -> bool:
        return self.method in OURS

    @property
    def ranks(self) -> int:
        return 1 if self.ours else self.stages


def points(depths: Sequence[int], stages: Sequence[int], at: int) -> list[Point]:
    """All that is measured: a GPT of n blocks has 2n + 2 layers."""
    found = [Point("depth", m, n, 2 * n + 2) for m in OURS for n in depths]
    found += [Point("depth", m, n, 2) for m in DEEPSPEED for n in depths]
    found += [Point("stages", m, at, j) for m in OURS for j in stages if j <= 2 * at + 2]
    found += [Point("stages", m, at, j) for m in DEEPSPEED for j in stages if j in DEEPSPEED_RANKS]
    return found


DEEPSPEED_K = 4
"""Micro-batches of a flush; ours, which have none, take 1."""


def depth(micro_batch: int, length: int, width: int, picture: Path, quick: bool) -> tuple[str, str, list[dict[str, Any]]]:
    """Count what lives at every point: a table, what was run in words, and the numbers; and draw them."""
    depths, stages, at = ((1, 2), (2, 4), 1) if quick else (DEPTHS, STAGES, STAGES_AT)
    found: list[dict[str, Any]] = []
    todo = points(depths, stages, at)
    with tqdm(total=len(todo), unit="point") as bar:
        by_ranks = sorted(todo, key=lambda point: point.ranks)
        for ranks, group in itertools.groupby(by_ranks, key=lambda point: point.ranks):
            found += _count(ranks, list(group), lambda point: make_model(
                "gpt-tiny", micro_batch, width=width, length=length, blocks=point.blocks), bar)
    found.sort(key=lambda row: todo.index(Point(row["sweep"], row["method"], row["blocks"], row["stages"])))
    draw(found, picture)
    about = (f"Reversible GPTs of width {width}, 4 heads, 256 tokens, in float32; sequences of {length}, micro-batch "
             f"{micro_batch}, k = {DEEPSPEED_K} for DeepSpeed's pipelines and 1 for ours; ours on one rank, DeepSpeed's on J; "
             "sums over all ranks")
    return depth_table(found), about, found


def _count(ranks: int, todo: list[Point], model: Callable[[Point], Model], bar: tqdm[Any]) -> list[dict[str, Any]]:
    """In one world, one after the other; what a failure leaves out says so."""
    found: list[dict[str, Any]] = []
    with World(ranks, count_all, [_job(point, model(point)) for point in todo], 2, pinned=True) as world:
        try:
            for point in todo:
                bar.set_postfix_str(f"{point.method}, {point.blocks} blocks, J = {point.stages}")
                answers = world.answers()
                found.append({**vars(point), **{name: sum(a[name] for a in answers) for name in ("held", "kept", "peak")}})
                bar.update()
        except WorldFailed as error:
            found += [{**vars(point), "error": str(error)} for point in todo[len(found):]]
    return found


def _job(point: Point, model: Model) -> Job:
    layers = len(model.specs())
    bounds = uniform_bounds(layers, point.stages)
    configuration = Configuration(point.method, point.ranks, 1 if point.ours else DEEPSPEED_K)
    if point.ours:
        return Job(configuration, model, [0, layers], {"stages": bounds})
    return Job(configuration, model, bounds, {})


def depth_table(found: Sequence[dict[str, Any]]) -> str:
    """Two tables, one a sweep."""
    parts = []
    for sweep, title in (("depth", "against depth"), ("stages", "against J")):
        rows = []
        for row in (row for row in found if row["sweep"] == sweep):
            label = METHODS[row["method"]].label
            if "error" in row:
                numbers = [row["error"].splitlines()[0][:80], "", "", ""]
            else:
                kept = f"{row['kept'] / MIB:.3f}" if row["method"] in OURS else "–"
                numbers = [kept, f"{row['held'] / MIB:.2f}", f"{_a_stage(row, 'held'):.3f}", f"{row['peak'] / MIB:.2f}"]
            rows.append([label, str(row["blocks"]), str(row["stages"]), *numbers])
        parts.append(table([f"{title}: method", "blocks", "J", "kept by stages, MiB", "held between passes, MiB",
                            "a stage", "peak, MiB"], rows))
    return "\n\n".join(parts)


def _a_stage(row: dict[str, Any], what: str) -> float:
    """MiB of one stage, the mean of all; as much as a rank has where each has one."""
    return float(row[what] / row["stages"] / MIB)


def draw(found: Sequence[dict[str, Any]], path: Path) -> None:
    """Two panels: what a stage holds between passes, against depth and against J."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import FuncFormatter

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2)
    for axes, sweep, x, label in (
            (panels[0], "depth", "blocks", "blocks of the GPT (ours: one stage a half-block; 1F1B: J = 2)"),
            (panels[1], "stages", "stages", "stages J, at {} blocks")):
        rows = [row for row in found if row["sweep"] == sweep and "error" not in row]
        for method, of_method in itertools.groupby(rows, key=lambda row: row["method"]):
            curve = sorted(of_method, key=lambda row: row[x])
            at = [row[x] for row in curve]
            axes.plot(at, [_a_stage(row, "held") for row in curve], "o-", color=COLOURS[method], markersize=4)
            if method == "petra":
                axes.plot(at, [_a_stage(row, "kept") for row in curve], "^:", color=COLOURS[method], markersize=4)
        ticks = sorted({row[x] for row in rows})
        axes.set(xscale="log", yscale="log", xticks=ticks, xticklabels=[str(t) for t in ticks], ylabel="MiB a stage",
                 xlabel=label.format(rows[0]["blocks"] if rows else ""))
        axes.minorticks_off()
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.grid(alpha=0.25)
    lines = [Line2D([], [], color=COLOURS[m], marker="o", markersize=4, label=METHODS[m].label) for m in COLOURS]
    lines += [Line2D([], [], color=COLOURS["petra"], linestyle=":", marker="^", markersize=4,
                     label="petra without messages on their way")]
    figure.legend(handles=lines, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
