"""What a run leaves behind: a summary of its numbers in a JSON file, a picture of its curves, and a line."""

from __future__ import annotations

import argparse
import json
import math
import resource
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

from ds_decoupled.collectives import gather
from run.arguments import DEFAULT_FOLDER, plot_path
from run.curves import Curves, plot_curves
from run.setup import Setup
from run.training import Trained


def summarize(args: argparse.Namespace, setup: Setup, engine: Any, trained: Trained, **facts: Any) -> dict[str, Any]:
    """What goes into the summary: the engine's numbers, ``facts``, speed and memory; a collective call."""
    numbers = engine.decoupled_summary()
    bytes_sent = numbers.pop("bytes_sent", None)
    samples = trained.updates * setup.update_samples
    memory = gather(peak_memory_bytes())
    return numbers | {
        "pipe_ranks": setup.pipe_ranks,
        "replicas": setup.replicas,
        "seed": args.seed,
        "train_loss": trained.progress.train_loss[-1],
        "samples_per_second": samples / trained.seconds if trained.seconds else math.nan,
        "peak_memory_bytes": max(memory),
        "peak_memory_bytes_by_rank": memory,
        "bytes_sent_per_sample": None if bytes_sent is None or not samples else bytes_sent / samples,
        **facts,
        "config": setup.config,
        "arguments": {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()},
    }


def report(args: argparse.Namespace, summary: dict[str, Any], name: str, title: str, x: tuple[str, Sequence[float]],
           axes: dict[str, dict[str, Sequence[float]]], line: str,
           by_stage: Mapping[str, Mapping[str, Sequence[float]]] | None = None) -> None:
    """Write the summary and the picture, print one line and where they are; on rank 0 alone.

    Args:
        name: of the files, where ``args`` names none.
        title: of the picture, and the line's beginning.
        x, axes: of the curves: name and values of x, then curves by axis and name, as in ``run.curves.plot_curves``.
        line: the result in words.
        by_stage: more curves, in panels below: by what they show and stage.
    """
    if dist.get_rank() != 0:
        return
    path = args.summary or DEFAULT_FOLDER / f"{name}.json"
    plot = plot_path(args, path) or path.with_suffix(".png")
    x_name, places = x

    def points(panels: Mapping[str, Mapping[str, Sequence[float]]]) -> dict[str, Curves]:
        return {axis: {curve: list(zip(places, values)) for curve, values in curves.items()} for axis, curves in panels.items()}

    write_json(path, summary)
    plot_curves(plot, title, x_name, points(axes), points(by_stage or {}))
    print(f"{title} on {summary['pipe_ranks']} rank(s): {line}\nsummary: {path}\ncurves: {plot}")


def peak_memory_bytes() -> int:
    """The most that this process has held: on the accelerator's device, or without one in main memory."""
    accelerator = get_accelerator()
    if accelerator.device_name() != "cpu":
        return int(accelerator.max_memory_allocated())
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def write_json(path: Path, content: dict[str, Any]) -> None:
    """``content`` with null for what is not a number."""

    def clean(value: Any) -> Any:
        if isinstance(value, dict):
            return {str(key): clean(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [clean(item) for item in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(clean(content), indent=2, allow_nan=False) + "\n")
