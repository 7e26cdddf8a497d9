"""A study's output file, and the runs that fill it, some side by side."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from tqdm import tqdm

from ds_decoupled.errors import ConfigError
from run.results import write_json
from run.tables import environment
from run.worlds import World, WorldFailed, first_to_speak


class OneRun(Protocol):
    """What tells one run of a study from another: a frozen dataclass."""

    @property
    def label(self) -> str:
        """For messages."""


S = TypeVar("S", bound=OneRun)


@dataclass(frozen=True)
class Kind(Generic[S]):
    """A kind of study.

    Attributes:
        name: in messages.
        study: the dataclass of what all runs share.
        setting: makes a setting of what its file holds.
        task: of a process: trains one run, tells now and then how much is through, and gives the results.
        result: the entry that a run has if it was done.
        said: a done run in a few words.
        unit: of what is counted while it trains.
        ranks: processes of a run, a core each where there are several; the first one's results count, and all tell as often.
    """

    name: str
    study: type
    setting: Callable[[Mapping[str, Any]], S]
    task: Callable[..., dict[str, Any]]
    result: str
    said: Callable[[Mapping[str, Any]], str]
    unit: str = "micro-batch"
    ranks: Callable[[S], int] = lambda setting: 1


class Results(Generic[S]):
    """The output file: a list of runs of one study, written whenever one is added.

    Args:
        path: the file.
        study: what all runs share.
        kind: of study.

    Raises:
        ConfigError: if the file holds another study, or none.
    """

    def __init__(self, path: Path, study: Any, kind: Kind[S]) -> None:
        self.path, self.study, self.kind = path, study, kind
        self.runs: dict[S, dict[str, Any]] = {}
        if not path.exists():
            return
        try:
            content = json.loads(path.read_text())
            held, runs = content["study"], content["runs"]
            self.runs = {kind.setting(run["setting"]): run for run in runs}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError("--output", str(path), f"it holds no {kind.name} ({error!r})", "Give another name.") from error
        if held != asdict(study):
            other = {f.name: held.get(f.name) for f in fields(kind.study) if held.get(f.name) != getattr(study, f.name)}
            raise ConfigError("--output", str(path), f"it holds a study with other settings: {other}", "Give another name.")

    def missing(self, wanted: list[S]) -> list[S]:
        """Those not done, or failed, in order; says how many are."""
        missing = [setting for setting in wanted if self.kind.result not in self.runs.get(setting, {})]
        if len(missing) < len(wanted):
            print(f"{self.path} holds {len(wanted) - len(missing)} of {len(wanted)} runs already", file=sys.stderr)
        return missing

    def add(self, setting: S, run: dict[str, Any]) -> None:
        """Add a run and write the file anew; it is never half written."""
        self.runs[setting] = {"setting": asdict(setting), **run}  # type: ignore[call-overload]
        part = self.path.with_suffix(".part")
        write_json(part, {"environment": environment(), "study": asdict(self.study), "runs": list(self.runs.values())})
        os.replace(part, self.path)

    def execute(self, settings: list[S], steps: int, jobs: int, threads: int) -> None:
        """Run ``settings``, ``jobs`` at a time, each in a process of its own with so many threads, and add them as they end.

        Args:
            steps: what a whole run counts to.
        """
        for setting, run in _execute(settings, self.study, self.kind, steps, jobs, threads):
            self.add(setting, run)


def _execute(settings: list[S], study: Any, kind: Kind[S], steps: int, jobs: int,
             threads: int) -> Iterator[tuple[S, dict[str, Any]]]:
    waiting = list(reversed(settings))
    running: dict[World, tuple[S, int]] = {}
    with ExitStack() as ends, tqdm(total=len(settings) * steps, unit=kind.unit, mininterval=0.5, smoothing=0.05) as bar:
        while waiting or running:
            while waiting and len(running) < jobs:
                setting = waiting.pop()
                ranks = kind.ranks(setting)
                world = ends.enter_context(World(ranks, kind.task, setting, study, threads=threads, pinned=ranks > 1))
                running[world] = setting, 0
            for world in first_to_speak(running):
                setting, done = running[world]
                try:
                    value = world.answers()[0]
                except WorldFailed as failure:
                    value = {"error": next(error for error in failure.errors if error is not None)}
                if isinstance(value, int):  # so many are through
                    bar.update(value - done)
                    running[world] = setting, value
                    continue
                del running[world]
                world.end()
                bar.update(steps - done)
                error = value.get("error")
                said = kind.said(value) if error is None else f"failed: {error.splitlines()[0]}"
                bar.write(f"{setting.label}: {said}", file=sys.stderr)
                yield setting, value
