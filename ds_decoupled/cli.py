"""The command ``ds-decoupled``: what a configuration will do, before anything runs. Torch is not loaded."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from ds_decoupled.analysis.report import RunShape, plan_report
from ds_decoupled.config import BLOCK, PRESETS, DecoupledConfig, parse_block, read_json
from ds_decoupled.errors import ConfigError, PlanError
from ds_decoupled.settings.table import BATCH, MICRO_BATCH, SIZES, K, batch_sizes

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None,
                  help="Decoupled pipelines for DeepSpeed: see a method's plan before anything runs.")

#: Stages that ``"stages": "blocks"`` stands for where no model is at hand: RevNet-18's stem, eight blocks and head.
BLOCKS_OF_REVNET18 = 10


@contextmanager
def _one_line_errors() -> Iterator[None]:
    """What a user did wrong is one line on stderr and exit code 2; there is nothing to trace back."""
    try:
        yield
    except (ConfigError, PlanError, OSError) as error:
        print(f"ds-decoupled: {error}", file=sys.stderr)
        raise typer.Exit(2) from None


@app.command()
def plan(
    config: Annotated[Path, typer.Argument(help="A DeepSpeed JSON file.", show_default=False)],
    ranks: Annotated[int, typer.Option(help="P: processes along the pipeline.")] = 1,
    stages: Annotated[int | None, typer.Option(
        help="J: stages, in place of the file's.", show_default=False)] = None,
    ticks: Annotated[int | None, typer.Option(
        help="Ticks to draw; by default a few past the fill.", show_default=False)] = None,
    micro_batches: Annotated[int | None, typer.Option(
        help="Draw and time a run of so many micro-batches, drain included; by default the run has no end.",
        show_default=False)] = None,
    link: Annotated[float, typer.Option(help="Time of a message between ranks, in forward passes of a stage.")] = 0.0,
    picture: Annotated[Path | None, typer.Option(
        help="Also draw the timeline here (.png, .svg, .pdf).", show_default=False)] = None,
) -> None:
    """Print a plan's staircase, and its delays, records in flight, messages, idle share and time.

    Times are in units of one stage's forward pass; a backward pass costs two, and one more where it runs the forward
    pass again. Stages are spread evenly over the ranks here; a run spreads them by the file's "partition".

    Example: ds-decoupled plan ds_configs/petra.json --ranks 4
    """
    with _one_line_errors():
        raw = read_json(config)
        block = parse_block(raw)
        notes = []
        if block is None:
            notes.append(f'no "{BLOCK}" block: DeepSpeed\'s own 1F1B')
            block = DecoupledConfig(method="backprop")
        for name, value, least in (("--ranks", ranks, 1), ("--stages", stages, 1), ("--ticks", ticks, 1),
                                   ("--micro-batches", micro_batches, 1), ("--link", link, 0)):
            if value is not None and not least <= value < math.inf:  # also refuses NaN
                raise ConfigError(name, value, f"a number, at least {least}")
        shape = RunShape(stages=_stages(block, stages, ranks, notes), ranks=ranks, k=_k(raw, notes),
                         micro_batches=micro_batches, ticks=ticks, link=link)
        if shape.stages < ranks:
            raise ConfigError("--ranks", ranks, f"at most one rank per stage, and there are {shape.stages} stages",
                              "Take fewer ranks or more stages.")
        typer.echo(plan_report(block, shape, notes=notes, picture=picture))


def _stages(block: DecoupledConfig, given: int | None, ranks: int, notes: list[str]) -> int:
    """J: from the option, or else from the file."""
    if given is not None:
        return given
    if isinstance(block.stages, list):
        return len(block.stages) - 1
    if isinstance(block.stages, int):
        return block.stages
    if block.stages == "ranks":
        return ranks
    notes.append(f'"stages": "blocks" depends on the model: {BLOCKS_OF_REVNET18} as in RevNet-18 '
                 "(stem, eight blocks, head); another number with --stages")
    return BLOCKS_OF_REVNET18


def _k(raw: dict[str, Any], notes: list[str]) -> int:
    """Micro-batches per update, as DeepSpeed works it out; with one data-parallel replica where it depends on those."""
    given = {name: raw.get(name) for name in SIZES}
    if given[K] is not None or None in (given[BATCH], given[MICRO_BATCH]):  # no other size says more about it
        return batch_sizes({MICRO_BATCH: 1, K: given[K]}, 1)[1]
    notes.append(f'k is "{BATCH}" over "{MICRO_BATCH}", with one data-parallel replica')
    return batch_sizes(given, 1)[1]


@app.command()
def methods() -> None:
    """List the presets and their place on the axes."""
    heads = ["method", "gradient", "recover", "weights", "update", "input", "hops"]
    rows = [[name, axes.gradient, axes.recover, axes.weights, axes.update, axes.input, str(axes.hops)]
            for name, axes in PRESETS.items()]
    widths = [max(len(row[i]) for row in [heads, *rows]) for i in range(len(heads))]
    for row in [heads, *rows]:
        typer.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


if __name__ == "__main__":
    app(prog_name="ds-decoupled")
