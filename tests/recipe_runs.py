"""Recipes as a user starts them, by DeepSpeed's launcher, and the same in worlds of forked ranks, which start faster."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import worlds

ROOT = Path(__file__).parent.parent


def launch(recipe: str, *arguments: str | Path, ranks: int = 1, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """``deepspeed recipes/RECIPE.py ARGUMENTS``, from the folder ``cwd``."""
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = ["deepspeed", "--num_gpus", str(ranks), "--master_port", str(worlds.free_port()),
               str(ROOT / "recipes" / f"{recipe}.py"),
               *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=200)


def _main(recipe: str, arguments: list[str]) -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"
    sys.argv = [f"{recipe}.py", *arguments]
    importlib.import_module(recipe).main()


def run(recipe: str, folder: Path, *arguments: str | Path, ranks: int = 1) -> dict[str, Any]:
    """The summary of ``recipe`` run in a world; raises ``worlds.RankFailed`` with what the recipe said."""
    summary = folder / "summary.json"
    worlds.run(ranks, _main, recipe, [*map(str, arguments), "--summary", str(summary)])
    loaded: dict[str, Any] = json.loads(summary.read_text())
    return loaded


def without_seconds(summary: dict[str, Any]) -> dict[str, Any]:
    """Its curves that are the same in every run."""
    return {name: curve for name, curve in summary["curves"].items() if name != "seconds"}


def config_file(folder: Path, method: str, k: int = 2, **block: Any) -> Path:
    """A DeepSpeed JSON file for language models, micro-batches of 4."""
    path = folder / f"{method}.json"
    path.write_text(json.dumps({
        "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": k, "gradient_clipping": 1.0,
        "optimizer": {"type": "AdamW", "params": {"torch_adam": True, "lr": 3e-3}}, "steps_per_print": 1000000,
        "decoupled": {"method": method, "stages": "blocks", **block}}))
    return path
