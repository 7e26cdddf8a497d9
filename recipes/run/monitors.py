"""``--report_to``: a block of DeepSpeed's monitor, written into the JSON under the names that ``transformers`` gives them."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from ds_decoupled.errors import ConfigError


class Monitor(NamedTuple):
    """A block of DeepSpeed's JSON (https://www.deepspeed.ai/docs/config-json/#monitoring-module).

    Attributes:
        block: its name.
        package: that it needs, if any.
        writes: whether it takes a folder.
    """

    block: str
    package: str | None = None
    writes: bool = False


MONITORS = {"tensorboard": Monitor("tensorboard", "tensorboard", writes=True), "wandb": Monitor("wandb", "wandb"),
            "comet_ml": Monitor("comet", "comet_ml"), "csv": Monitor("csv_monitor", writes=True)}
"""By what ``--report_to`` takes."""


def report_to(config: dict[str, Any], names: list[str] | None, folder: Path) -> dict[str, Any]:
    """``config`` with a block for each of ``names``; what the JSON says itself stays, and ``none`` switches all off.

    Args:
        folder: of what is written to files.

    Raises:
        ConfigError: for one whose package is missing.
    """
    if names is None:
        return config
    if "none" in names:
        if len(names) > 1:
            raise ConfigError("--report_to", names, "none allows no other name beside it", "Leave none out")
        return config | {m.block: {**config[m.block], "enabled": False} for m in MONITORS.values() if m.block in config}
    found = {}
    for name in names:
        block, package, writes = MONITORS[name]
        if package is not None and find_spec(package) is None:
            raise ConfigError("--report_to", name, f"it needs the package {package}, which is not there",
                              f"pip install {package}")
        places = {"output_path": str(folder), "job_name": config["decoupled"]["method"]} if writes else {}
        found[block] = {**places, **config.get(block, {}), "enabled": True}
    return config | found
