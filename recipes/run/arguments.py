"""Arguments that every training recipe takes, and where its results go."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import deepspeed
import torch.distributed as dist

from ds_decoupled.errors import ConfigError
from run.monitors import MONITORS
from run.options import SEEDS, refuse_unused, whole
from run.places import check_file, check_folder, check_picture

DEFAULT_FOLDER = Path("runs")
"""Where results go, unless told otherwise."""
SETS_THE_RATE = ("LRRangeTest", "OneCycle", "WarmupLR", "WarmupDecayLR")
"""DeepSpeed's schedulers that take no notice of the optimizer's rate."""


def add_run_arguments(parser: argparse.ArgumentParser, stretch: str, summary: str) -> None:
    """What every recipe takes.

    Args:
        stretch: what lies between two tests, in the plural.
        summary: where results go by default.
    """
    parser.add_argument("--seed", type=whole(0, SEEDS), default=0)
    parser.add_argument("--pipe_ranks", type=whole(1), help="P, processes a pipeline (default: all)")
    parser.add_argument("--summary", type=Path, help=f"JSON file of results (default: {summary})")
    parser.add_argument("--plot", type=Path, help="picture of the curves (default: beside the summary)")
    parser.add_argument("--save_checkpoint", metavar="DIR", help="save there at the end")
    parser.add_argument("--save_every", type=whole(1), help=f"and after every so many {stretch}")
    parser.add_argument("--load_best_model_at_end", action="store_true",
                        help="end with the weights of the best test, which --save_checkpoint keeps")
    parser.add_argument("--early_stopping_patience", type=whole(1), metavar="TESTS",
                        help="stop after so many tests without a better one")
    parser.add_argument("--logging_steps", type=whole(1), metavar="UPDATES", help="print a line of numbers every so many")
    parser.add_argument("--report_to", nargs="+", choices=[*MONITORS, "none"], metavar="MONITOR",
                        help=f"of {', '.join(MONITORS)}, none (default: what the JSON says); files go to {DEFAULT_FOLDER}/logs")
    parser.add_argument("--resume", metavar="DIR", help="go on from the last checkpoint there")
    parser.add_argument("--backend", help="of torch.distributed (default: DeepSpeed's choice)")
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the launcher")
    deepspeed.add_config_arguments(parser)


def check_run_arguments(args: argparse.Namespace, config: dict[str, Any]) -> None:
    """Refuse what would change nothing, and places that cannot be written to, before there is anything to lose."""
    if args.save_checkpoint is None:
        refuse_unused(args, {"save_every": None, "load_best_model_at_end": False}, "without --save_checkpoint nothing is saved",
                      "Give --save_checkpoint")
    scheduler = config.get("scheduler")
    if isinstance(scheduler, dict):
        why = f'the JSON\'s "scheduler", {scheduler.get("type")}, decides over the rate'
        hint = 'Leave it out, or take the "scheduler" out of the JSON'
        refuse_unused(args, [name for name in ("schedule", "warmup_epochs", "warmup") if hasattr(args, name)], why, hint)
        if scheduler.get("type") in SETS_THE_RATE:
            refuse_unused(args, ["lr"], why, hint)
    if args.save_checkpoint is not None and int(os.environ["LOCAL_RANK"]) == 0:
        check_folder("--save_checkpoint", args.save_checkpoint)
    if dist.get_rank() != 0:
        return
    summary, plot = args.summary or DEFAULT_FOLDER / "METHOD.json", plot_path(args, args.summary)
    if args.summary is None:
        check_folder("--summary", DEFAULT_FOLDER)
    else:
        check_file("--summary", summary)
    if plot is not None:
        if plot == summary:
            raise ConfigError("--summary", str(summary), f"the picture of the curves would go to the same file, {plot}",
                              "End the summary's name with .json, or give another --plot")
        check_picture("--plot", plot)


def plot_path(args: argparse.Namespace, summary: Path | None) -> Path | None:
    """Where the picture goes; None while neither it nor the summary has a name."""
    plot: Path | None = args.plot or (None if summary is None else summary.with_suffix(".png"))
    return plot
