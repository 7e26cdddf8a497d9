"""Runs of the training recipes side by side: a table of their summaries, and a picture.

    python recipes/compare_runs.py runs/finetune_*.json --plot docs/finetuning.png
    python recipes/compare_runs.py runs/dgl_*.json runs/backprop.json --against stages

The picture shows how the runs went, by epochs or tokens, or with ``--against time`` by the seconds that they had trained; with
``--against stages``, what they came to against the number of stages J.
"""

from __future__ import annotations

if __name__ == "__main__":  # before torch loads OpenMP
    from ds_decoupled.threads import share_cores

    share_cores(tell=False)

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

from ds_decoupled.errors import ConfigError
from run.curves import plot_curves
from run.places import check_picture
from run.tables import MIB, table
from studies.summaries import Run, label, read_run

Points = list[tuple[float, float]]
ONE_STAGE = ("backprop",)
"""Methods whose result is the same for every J."""


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("summaries", nargs="+", type=Path, help="what --summary wrote, of images or of text")
    parser.add_argument("--against", choices=["stages", "time"],
                        help="draw results against the number of stages, or curves against time (default: the curves of each "
                        "run against its epochs or tokens)")
    parser.add_argument("--plot", type=Path, default=Path("runs/compared.png"), help="(default: %(default)s)")
    parser.add_argument("--title", default="")
    return parser.parse_args(arguments)


def text_table(runs: Sequence[Run]) -> str:
    """Of language models."""
    rows = [[label(run, runs), f"{run.get('validation_loss_before', math.nan):.3f}", f"{run['validation_loss']:.3f}",
             f"{run['perplexity']:.2f}", f"{run['tokens_per_second']:.0f}", *_costs(run)] for run in runs]
    return table(["method", "loss before", "loss after, nats", "perplexity", "tokens/s",
                  "peak memory of a process, MiB", "sent per sequence, KiB"], rows)


def image_table(runs: Sequence[Run]) -> str:
    """Of image models."""
    rows = [[label(run, runs), str(run["stages"]), f"{run['test_accuracy']:.1%}", f"{run['train_loss']:.3f}",
             f"{run['samples_per_second']:.0f}", *_costs(run)] for run in runs]
    return table(["method", "stages", "test accuracy", "training loss", "images/s", "peak memory of a process, MiB",
                  "sent per image, KiB"], rows)


def _costs(run: Run) -> list[str]:
    sent = run["bytes_sent_per_sample"]
    return [f"{run['peak_memory_bytes'] / MIB:.0f}", "not counted" if sent is None else f"{sent / 1024:.0f}"]


def courses(runs: Sequence[Run], x: str, y: str, scale: float, unit: float = 1000.0) -> dict[str, Points]:
    """How each run went: points of its curve ``y``, against its curve ``x`` over ``unit`` or, where it has none, its epochs."""
    found = {}
    for run in runs:
        values = [math.nan if value is None else value * scale for value in run["curves"][y]]
        at = [value / unit for value in run["curves"][x]] if x in run["curves"] else range(1, len(values) + 1)
        found[label(run, runs)] = list(zip(map(float, at), values))
    return found


def against_stages(runs: Sequence[Run], result: str, scale: float) -> dict[str, Points]:
    """A curve a method (and what else differs): its result at each J, the mean over seeds; a level line for backpropagation."""
    everywhere = sorted({run["stages"] for run in runs if run["method"] not in ONE_STAGE})
    groups: dict[str, dict[int, list[float]]] = {}
    for run in runs:
        curve = groups.setdefault(label(run, runs, without=("stages", "seed")), {})
        for stages in everywhere if run["method"] in ONE_STAGE else [run["stages"]]:
            curve.setdefault(stages, []).append(run[result] * scale)
    return {name: [(float(j), mean(values)) for j, values in sorted(curve.items())] for name, curve in groups.items()}


def main() -> None:
    args = parse_arguments()
    try:
        runs = [read_run(path) for path in args.summaries]
        check_picture("--plot", args.plot)
    except ConfigError as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")
    images = ["test_accuracy" in run for run in runs]
    if any(images) != all(images):
        sys.exit("error: runs on images and runs on text have no result in common; compare them apart")
    if all(images):
        print(image_table(runs))
        result, scale, name, x, x_name = "test_accuracy", 100.0, "test accuracy, %", "epochs", "epochs"
    else:
        print(text_table(runs))
        result, scale, name, x = "validation_loss", 1.0, "validation loss, nats per token", "tokens"
        x_name = "thousands of tokens"
    if args.against == "time":
        if without := [str(path) for path, run in zip(args.summaries, runs) if not run["curves"].get("seconds")]:
            sys.exit(f"error: {without[0]} does not say how long its epochs took; a recipe's newer summary does")
        curves, x_name = courses(runs, "seconds", result, scale, unit=1.0), "seconds of training"
    elif args.against:
        curves, x_name = against_stages(runs, result, scale), "stages J"
    else:
        curves = courses(runs, x, result, scale)
    plot_curves(args.plot, args.title, x_name, {name: curves})
    print(f"picture: {args.plot}")


if __name__ == "__main__":
    main()
