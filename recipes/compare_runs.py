"""Runs of the training recipes side by side: a table of their summaries, and a picture.

    python recipes/compare_runs.py runs/finetune_*.json --plot docs/finetuning.png
    python recipes/compare_runs.py runs/dgl_*.json runs/backprop.json --against stages

The picture shows how the runs went, or, with ``--against stages``, what they came to against the number of stages J.
"""

from __future__ import annotations

if __name__ == "__main__":  # before torch loads OpenMP
    from ds_decoupled.threads import share_cores

    share_cores(tell=False)

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import common
from bench_report import MIB, table
from places import check_picture

from ds_decoupled.errors import ConfigError

Run = dict[str, Any]
Points = list[tuple[float, float]]

def _setting(name: str) -> Callable[[Run], str]:
    """What the ``decoupled`` block says of ``name``; nothing where it says nothing."""
    return lambda run: f"{name} {_block(run)[name]}" if name in _block(run) else ""


DIFFERENCES: dict[str, Callable[[Run], str]] = {
    "stages": lambda run: f"{run['stages']} stages",
    "ranks": lambda run: f"{run['pipe_ranks']} ranks",
    "model": lambda run: str(run["model"]),
    "lora": lambda run: f"LoRA {run['lora_rank']}" if run.get("lora_rank") else "",
    "seed": lambda run: f"seed {run['seed']}",
    **{name: _setting(name) for name in ("window", "losses", "head", "weights")},
}
"""What a run may be told apart by, beside its method."""

ONE_STAGE = ("backprop",)
"""Methods whose result is the same for every J."""


def _block(run: Run) -> dict[str, Any]:
    block: dict[str, Any] = run["config"].get("decoupled", {})
    return block


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("summaries", nargs="+", type=Path, help="what --summary wrote, of images or of text")
    parser.add_argument("--against", choices=["stages"], help="draw results against it (default: the curves of each run)")
    parser.add_argument("--plot", type=Path, default=Path("runs/compared.png"), help="(default: %(default)s)")
    parser.add_argument("--title", default="")
    return parser.parse_args(arguments)


def label(run: Run, runs: Sequence[Run], without: Sequence[str] = ()) -> str:
    """The method, and with it whatever else differs between runs of that method."""
    same = [other for other in runs if other["method"] == run["method"]]
    parts = [text(run) for name, text in DIFFERENCES.items()
             if name not in without and len({text(other) for other in same}) > 1]
    return ", ".join([run["method"], *filter(None, parts)])


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


def courses(runs: Sequence[Run], x: str, y: str, scale: float) -> dict[str, Points]:
    """How each run went: points of its curve ``y``, against its curve ``x`` or, where it has none, its epochs."""
    found = {}
    for run in runs:
        values = [math.nan if value is None else value * scale for value in run["curves"][y]]
        at = [tokens / 1000 for tokens in run["curves"][x]] if x in run["curves"] else range(1, len(values) + 1)
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


NUMBER, COUNTED = (int, float), (int,)
MISSING_OR_NUMBER = (int, float, type(None))
"""``common.write_json`` writes null for what is no number."""
NEEDED: dict[str, tuple[type, ...]] = {
    "method": (str,), "model": (str,), "config": (dict,), "curves": (dict,), "stages": COUNTED, "pipe_ranks": COUNTED,
    "seed": COUNTED, "peak_memory_bytes": NUMBER, "train_loss": MISSING_OR_NUMBER, "samples_per_second": MISSING_OR_NUMBER,
    "bytes_sent_per_sample": MISSING_OR_NUMBER,
}
"""What every summary holds."""
OF_TEXT: dict[str, tuple[type, ...]] = {"perplexity": MISSING_OR_NUMBER, "tokens_per_second": MISSING_OR_NUMBER}


def read_run(path: Path) -> Run:
    """A summary, with nan for what is no number.

    Raises:
        ConfigError: for a file that is none.
    """
    hint = "Give what --summary wrote"
    try:
        run = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError("summaries", str(path), f"it holds no summary of a run ({error})", hint) from error
    if not isinstance(run, dict):
        raise ConfigError("summaries", str(path), f"it holds no summary of a run but a {type(run).__name__}", hint)
    result = next((name for name in ("test_accuracy", "validation_loss") if name in run), "test_accuracy")
    needed = NEEDED | {result: MISSING_OR_NUMBER} | (OF_TEXT if result == "validation_loss" else {})
    for name, kinds in needed.items():
        if name not in run or not isinstance(run[name], kinds) or isinstance(run[name], bool):
            what = f"its {name!r} is {run[name]!r}" if name in run else f"it has no {name!r}"
            raise ConfigError("summaries", str(path), f"it holds no summary of a run: {what}", hint)
        if run[name] is None and name != "bytes_sent_per_sample":
            run[name] = math.nan
    for name in (result, "tokens"):
        curve = run["curves"].get(name, None if name == result else [])
        if not isinstance(curve, list) or not all(isinstance(value, MISSING_OR_NUMBER) for value in curve):
            raise ConfigError("summaries", str(path), f"it holds no summary of a run: its curve {name!r} is no list of numbers",
                              hint)
    if not isinstance(run["config"].get("decoupled", {}), dict):
        raise ConfigError("summaries", str(path), 'it holds no summary of a run: "decoupled" is no block', hint)
    return dict(run)


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
    if args.against:
        curves, x_name = against_stages(runs, result, scale), "stages J"
    else:
        curves = courses(runs, x, result, scale)
    common.plot_curves(args.plot, args.title, x_name, {name: curves})
    print(f"picture: {args.plot}")


if __name__ == "__main__":
    main()
