"""What a resumed run cannot follow: it goes on with rates, data and layers of the run that saved it, whatever it is told.

Beside every checkpoint stands ``recipe.json``, what the recipe was told when it was saved.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ds_decoupled.errors import ConfigError
from run.setup import Setup

FILE = "recipe.json"
FREE = {"summary", "plot", "save_checkpoint", "save_every", "resume", "backend", "local_rank", "pipe_ranks", "output",
        "output_dtype", "max_shard_size", "adapters_only", "sample", "temperature", "micro_batches", "epochs", "evaluations",
        "eval_micro_batches", "eval_every", "eval_steps", "logging_steps", "report_to", "peak_tflops", "load_best_model_at_end",
        "early_stopping_patience"}
"""Arguments of how long a run is, what it shows, and where it and its results are."""
PLACES = {"data", "validation", "data_root", "model", "tokenizer"}
"""Files and folders, which may have moved: their own names are compared."""


def told(args: argparse.Namespace, setup: Setup) -> dict[str, Any]:
    """All that must stay, by name: arguments, and the JSON's blocks of which a checkpoint carries a state."""
    found: dict[str, Any] = {}
    for name, value in sorted(vars(args).items()):
        if name in FREE or name.startswith("deep") or name == "lr":  # the peak, wherever it is from, is the optimizer's
            continue
        found[f"--{name}"] = Path(value).name if name in PLACES and value else value
    blocks = {name: setup.config[name] for name in ("optimizer", "scheduler") if name in setup.config}
    rate = blocks.get("optimizer", {}).get("params", {}).get("lr")
    return json.loads(json.dumps({**found, **blocks, **setup.counted_in, "--lr": rate}, default=str))


def note(args: argparse.Namespace, setup: Setup, folder: str, tag: str) -> None:
    """Write what must stay beside the checkpoint ``tag``; on rank 0 alone."""
    if dist.get_rank() == 0:
        (Path(folder) / tag / FILE).write_text(json.dumps(told(args, setup), indent=2) + "\n")


def check(args: argparse.Namespace, setup: Setup) -> None:
    """Refuse arguments that this run would not follow.

    Raises:
        ConfigError: for the first one that is another than that of the run which saved the checkpoint.
    """
    folder = Path(args.resume)
    try:
        saved = json.loads((folder / (folder / "latest").read_text().strip() / FILE).read_text())
    except (OSError, ValueError):  # no checkpoint, which loading it says better, or one from before this file was written
        return
    here = told(args, setup)
    if any(here[name] != saved.get(name, here[name]) for name in setup.counted_in):
        return  # loading says that, and the default rate depends on it
    for name in sorted(here.keys() & saved.keys(), key=lambda name: not name.startswith("--")):
        if here[name] != saved[name]:
            raise ConfigError(name, here[name], f"the run that --resume goes on from had {saved[name]!r}, and a resumed run "
                              "cannot follow another one", "Give that one, or begin a new run from its weights")
