"""What ``ds-decoupled plan`` prints: the staircase of a method's plan and its numbers, as plain text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from ds_decoupled.analysis.pictures import timeline
from ds_decoupled.analysis.simulate import simulate
from ds_decoupled.analysis.simulation import Costs, Simulation
from ds_decoupled.analysis.staircase import legend, staircase
from ds_decoupled.config import DecoupledConfig
from ds_decoupled.errors import ConfigError
from ds_decoupled.schedules.partition import Placement
from ds_decoupled.schedules.plan import Plan

#: More would take longer than anybody waits for a table.
MOST_ACTIONS = 3_000_000

#: What a record in flight holds of the stage's activations between a forward and its backward pass.
KEPT = {"graph": "graph", "input": "input", "reconstruct": "nothing"}


@dataclass(frozen=True)
class RunShape:
    """The sizes of a run to report on.

    Attributes:
        stages: J.
        ranks: P.
        k: micro-batches per update.
        micro_batches: in the run that is drawn and timed; None is a run without an end.
        ticks: rows to draw; None leaves it to the report.
        link: time of a message between ranks, in forward passes of a stage.
    """

    stages: int
    ranks: int
    k: int
    micro_batches: int | None = None
    ticks: int | None = None
    link: float = 0.0


def plan_report(config: DecoupledConfig, shape: RunShape, *, notes: Sequence[str] = (),
                picture: Path | None = None) -> str:
    """The text of the report; with ``picture`` also the timeline of what is drawn, written to that file.

    Raises:
        ConfigError: a run that the method cannot have, or a picture's name without a known ending.
    """
    axes = config.axes()
    if axes.flush and shape.micro_batches not in (None, shape.k):
        raise ConfigError("--micro-batches", shape.micro_batches, f'with "update": "flush" a run is one batch of k = '
                          f"{shape.k} micro-batches", "Set gradient_accumulation_steps in the file.")
    if axes.pace != "ticks":
        told = "staleness" if axes.layerwise else "replay"
        raise ConfigError("decoupled.pace", axes.pace, "there is no plan to print: who acts next is only known when it acts"
                          if axes.pace == "free" else "there is no plan to print: stages go by a virtual clock, not by ticks",
                          f'Take a method that goes by ticks, such as "dgl"; engine.decoupled_summary()["{told}"] tells how '
                          "a run went.")
    plan = Plan.make(Placement.of(shape.stages, shape.ranks), hops=axes.hops, k=shape.k, recover=axes.recover,
                     flush=axes.flush, split_backward=config.split_backward, window=axes.window,
                     farthest=config.losses == "farthest", sweeps=config.sweeps)
    costs = Costs(link=shape.link)
    fill = plan.ticks.drain
    # Long enough for the times to repeat: see Simulation.time_per_micro_batch.
    endless = 5 * (fill + 1) + 8 * shape.stages + 4 * shape.k
    drawn = shape.micro_batches or (shape.k if axes.flush else endless)
    actions = shape.stages * (max(drawn, endless) + fill) * 3
    if actions > MOST_ACTIONS:
        sizes = (f"{shape.stages} stages, k = {shape.k}, hops ({axes.hops[0]}, {axes.hops[1]}), "
                 f"{max(drawn, endless)} micro-batches")
        raise ConfigError("plan", sizes, f"no plan of more than {MOST_ACTIONS} actions is drawn and timed",
                          "Take less of what is large.")
    rows = shape.ticks or (drawn + fill if axes.flush or shape.micro_batches else fill + 4)
    lists = [list(islice(plan.run(rank, drawn), rows)) for rank in range(shape.ranks)]
    run = simulate(plan, drawn, costs)
    steady = run if axes.flush or drawn >= endless else simulate(plan, endless, costs)

    seen = {action.kind for rank in range(shape.ranks) for actions in plan.run(rank, drawn) for action in actions}
    hops = "a flush after every batch" if axes.flush else f"hops ({axes.hops[0]}, {axes.hops[1]})"
    title = f"{config.method}: {_count(shape.stages, 'stage')} on {_count(shape.ranks, 'rank')}, {hops}, k = {shape.k}"
    parts = [title + "".join(f"\nnote: {note}" for note in notes)]
    cut = rows < drawn + fill and (axes.flush or shape.micro_batches)
    parts.append(staircase(lists, plan.placement.rank_bounds, updates=True)
                 + (f"\n(the first {rows} of {drawn + fill} ticks)" if cut else "")
                 + f"\n{'; '.join(legend(seen))}")
    parts.append(_stage_table(plan, steady, axes.weights == "stashed"))
    if shape.ranks > 1:
        parts.append(_link_table(plan, steady))
    parts.append(_time_table(run if axes.flush else steady, axes.flush))
    if not axes.flush and shape.micro_batches:
        parts[-1] += (f"\nthe run of {_count(drawn, 'micro-batch', 'micro-batches')}, fill and drain included: "
                      f"{run.total_time:.2f} units")
    if picture is not None:
        _draw(run, picture, title, rows)
    return "\n\n".join(parts)


def _count(n: int, one: str, many: str = "") -> str:
    return f"{n} {one if n == 1 else many or one + 's'}"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns to the right under their heads, two blanks apart."""
    widths = [max(len(row[i]) for row in [heads, *rows]) for i in range(len(heads))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
                     for row in [heads, *rows])


def _stage_table(plan: Plan, steady: Simulation, stashed: bool) -> str:
    at_once = {s for s in range(plan.placement.stages)
               if s == plan.placement.stages - 1 or (plan.ticks.window and plan.ticks.reach(s) == 0)}
    rows = [[str(s), str(rank), str(steady.delays[s]), str(steady.updates_crossed[s]), str(steady.records[s]),
             KEPT[plan.recover] + " and weights" * stashed if s not in at_once else "nothing"]
            for s, rank in enumerate(plan.placement.rank_of_stage)]
    return _table(["stage", "rank", "delay in ticks", "updates crossed", "records in flight", "each keeps"], rows)


def _link_table(plan: Plan, steady: Simulation) -> str:
    """Messages and bytes per micro-batch, in activations of that link."""
    carried = {(t.link, t.direction): t for t in steady.traffic}
    rows = []
    for link in sorted({t.link for t in steady.traffic}):
        ranks = plan.placement.rank_of_stage
        row = [f"{ranks[link]}-{ranks[link + 1]}", f"{link}-{link + 1}"]
        for direction in ("forward", "backward"):
            traffic = carried.get((link, direction))
            messages, size = (traffic.messages, traffic.bytes) if traffic else (0, 0.0)
            row += [f"{messages / steady.micro_batches:g}", f"{size / steady.micro_batches:g}"]
        rows.append(row)
    heads = ["ranks", "stages", "messages forward", "bytes forward", "messages backward", "bytes backward"]
    return f"per micro-batch, bytes in sizes of one activation\n{_table(heads, rows)}"


def _time_table(run: Simulation, flush: bool) -> str:
    time = run.total_time / run.micro_batches if flush else run.time_per_micro_batch
    idle = run.idle if flush else run.steady_idle
    assert time is not None and idle is not None, "the run is long enough for a steady state"
    rows = [[str(rank), f"{100 * share:.1f} %"] for rank, share in enumerate(idle)]
    return (_table(["rank", "idle"], rows)
            + f"\ntime per micro-batch: {time:.2f} units; on one rank {run.one_rank_time:.2f}; "
              f"{run.one_rank_time / time:.2f} times as fast on {_count(len(idle), 'rank')}")


def _draw(run: Simulation, path: Path, title: str, ticks: int) -> None:
    """The timeline of the ticks that the staircase shows."""
    until = max((event.end for event in run.events if event.tick < ticks), default=0.0)
    try:
        timeline(run, path, until=until, title=title)
    except ValueError as error:
        raise ConfigError("--picture", str(path), f"{error}") from error
