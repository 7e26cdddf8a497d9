"""The delay study's output file, and the runs that fill it, some side by side."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ds_decoupled.errors import ConfigError
from run.results import write_json
from run.tables import environment
from run.worlds import World, WorldFailed, first_to_speak
from studies.one_run import train_alone
from studies.settings import Setting, Study


class Results:
    """The output file: a list of runs of one study, written whenever one is added.

    Raises:
        ConfigError: if the file holds another study, or none.
    """

    def __init__(self, path: Path, study: Study) -> None:
        self.path, self.study = path, study
        self.runs: dict[Setting, dict[str, Any]] = {}
        if not path.exists():
            return
        try:
            content = json.loads(path.read_text())
            held, runs = content["study"], content["runs"]
            self.runs = {Setting(**{**run["setting"], "hops": tuple(run["setting"]["hops"])}): run for run in runs}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError("--output", str(path), f"it holds no delay study ({error!r})", "Give another name.") from error
        if held != asdict(study):
            other = {f.name: held.get(f.name) for f in fields(Study) if held.get(f.name) != getattr(study, f.name)}
            raise ConfigError("--output", str(path), f"it holds a study with other settings: {other}", "Give another name.")

    def missing(self, wanted: list[Setting]) -> list[Setting]:
        """Those not done, or failed, in order."""
        return [setting for setting in wanted if "validation_loss" not in self.runs.get(setting, {})]

    def add(self, setting: Setting, run: dict[str, Any]) -> None:
        """Add a run and write the file anew; it is never half written."""
        self.runs[setting] = {"setting": asdict(setting), **run}
        part = self.path.with_suffix(".part")
        write_json(part, {"environment": environment(), "study": asdict(self.study), "runs": list(self.runs.values())})
        os.replace(part, self.path)


def execute(settings: list[Setting], study: Study, jobs: int, threads: int) -> Iterator[tuple[Setting, dict[str, Any]]]:
    """Run ``settings``, ``jobs`` at a time, each in a process of its own; yields them as they end."""
    waiting = list(reversed(settings))
    running: dict[World, tuple[Setting, int]] = {}
    with ExitStack() as ends, tqdm(total=len(settings) * study.micro_batches, unit="micro-batch", mininterval=0.5,
                                   smoothing=0.05) as bar:
        while waiting or running:
            while waiting and len(running) < jobs:
                setting = waiting.pop()
                world = ends.enter_context(World(1, train_alone, setting, study, threads=threads))
                running[world] = setting, 0
            for world in first_to_speak(running):
                setting, done = running[world]
                try:
                    [value] = world.answers()
                except WorldFailed as failure:
                    value = {"error": failure.errors[0]}
                if isinstance(value, int):  # micro-batches that are through
                    bar.update(value - done)
                    running[world] = setting, value
                    continue
                del running[world]
                world.end()
                bar.update(study.micro_batches - done)
                error = value.get("error")
                said = f"{value['validation_loss']:.3f} nats" if error is None else f"failed: {error.splitlines()[0]}"
                bar.write(f"{setting.label}: {said}", file=sys.stderr)
                yield setting, value
