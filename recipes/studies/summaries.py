"""Summaries that training recipes wrote: read again, and told apart."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ds_decoupled.errors import ConfigError

Run = dict[str, Any]


def _setting(name: str) -> Callable[[Run], str]:
    """What the ``decoupled`` block says of ``name``; nothing where it says nothing."""
    return lambda run: f"{name} {_block(run)[name]}" if name in _block(run) else ""


DIFFERENCES: dict[str, Callable[[Run], str]] = {
    "stages": lambda run: f"{run['stages']} stages",
    "ranks": lambda run: f"{run['pipe_ranks']} ranks",
    "model": lambda run: str(run["model"]),
    "lora": lambda run: f"LoRA {run['lora_rank']}" if run.get("lora_rank") else "",
    "seed": lambda run: f"seed {run['seed']}",
    **{name: _setting(name) for name in ("window", "losses", "head", "transport", "weights", "codec", "vq", "pace", "replay",
                                         "slow_down", "threads", "exchange")},
}
"""What a run may be told apart by, beside its method."""


def _block(run: Run) -> dict[str, Any]:
    block: dict[str, Any] = run["config"].get("decoupled", {})
    return block


def label(run: Run, runs: Sequence[Run], without: Sequence[str] = ()) -> str:
    """The method, and with it whatever else differs between runs of that method."""
    same = [other for other in runs if other["method"] == run["method"]]
    parts = [text(run) for name, text in DIFFERENCES.items()
             if name not in without and len({text(other) for other in same}) > 1]
    return ", ".join([run["method"], *filter(None, parts)])


NUMBER, COUNTED = (int, float), (int,)
MISSING_OR_NUMBER = (int, float, type(None))
"""``run.results.write_json`` writes null for what is no number."""
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
    for name in (result, "tokens", "seconds"):
        curve = run["curves"].get(name, None if name == result else [])
        if not isinstance(curve, list) or not all(isinstance(value, MISSING_OR_NUMBER) for value in curve):
            raise ConfigError("summaries", str(path), f"it holds no summary of a run: its curve {name!r} is no list of numbers",
                              hint)
    if not isinstance(run["config"].get("decoupled", {}), dict):
        raise ConfigError("summaries", str(path), 'it holds no summary of a run: "decoupled" is no block', hint)
    return dict(run)
