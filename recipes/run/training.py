"""One training run as every recipe makes it: stretches of updates, a test after each, checkpoints to go on from."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from ds_decoupled.collectives import together
from ds_decoupled.errors import ConfigError
from run import resuming
from run.best import Best
from run.setup import Setup
from run.speed import Lines, Speed
from run.thread_trial import ThreadTrial


class Loader(Protocol):
    """Endless micro-batches that are a function of their position."""

    def seek(self, position: int) -> None: ...

    def __next__(self) -> Any: ...


@dataclass
class Progress:
    """What has been done, one entry a stretch; a checkpoint carries it beside the engine's own state.

    Attributes:
        updates: made by the end of the stretch, since the very first.
        train_loss: mean over the stretch's micro-batches that finished; nan if none did.
        score: the test's; nan where none was made, infinitely bad where it was nan.
        stages: of every stage with a loss of its own, the loss and accuracy of its head; empty for other methods.
        seconds: spent on training alone by the end of the stretch, since the very first.
    """

    updates: list[int] = field(default_factory=list)
    train_loss: list[float] = field(default_factory=list)
    score: list[float] = field(default_factory=list)
    stages: list[list[dict[str, float]]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    @property
    def done(self) -> int:
        """Updates made so far."""
        return self.updates[-1] if self.updates else 0

    def add(self, updates: int, train_loss: float, score: float, stages: list[dict[str, float]] | None = None,
            seconds: float = 0.0) -> None:
        """One more stretch; ``seconds``: that it took."""
        self.updates.append(updates)
        self.train_loss.append(train_loss)
        self.score.append(score)
        self.stages.append(stages or [])
        self.seconds.append((self.seconds[-1] if self.seconds else 0.0) + seconds)

    def stage_curves(self, name: str) -> dict[str, list[float]]:
        """The ``name`` (loss or accuracy) of each stage's head, by stage; empty where stages have no loss of their own."""
        count = max((len(stages) for stages in self.stages), default=0)
        return {f"stage {s}": [stages[s].get(name, math.nan) if s < len(stages) else math.nan for stages in self.stages]
                for s in range(count)}

    @property
    def last_score(self) -> float:
        """The newest that there is, or nan."""
        return next((value for value in reversed(self.score) if not math.isnan(value)), math.nan)


@dataclass(frozen=True)
class Trained:
    """A finished run.

    Attributes:
        progress: its curves.
        seconds: spent on training alone.
        updates: made in them.
        score: of the weights that it ended with.
        best: the update that they are of, if they are not the last ones.
    """

    progress: Progress
    seconds: float
    updates: int
    score: float
    best: int | None = None


def train(args: argparse.Namespace, setup: Setup, engine: Any, loader: Loader | None, *, ends: Sequence[int],
          test: Callable[[], float], show: Callable[[Progress], str], best: Best, speed: Speed, test_every: int = 1,
          test_first: bool = False) -> Trained:
    """Train up to the last of ``ends``, from the start or from the checkpoint that ``args`` names.

    Args:
        args: holds ``save_checkpoint``, ``save_every``, ``logging_steps`` and ``resume``.
        loader: on the ranks that hold data.
        ends: after how many updates each stretch ends.
        test: gives the score; a collective call.
        show: what stands beside the progress bar, before the speed.
        best: what is kept of tests, and when they end the run.
        test_every: stretches from test to test; there always is one at the end.
        test_first: whether there is one before all training.
    """
    if ends[-1] < 1:
        raise ConfigError("gradient_accumulation_steps", setup.k, "all the micro-batches of this run do not make one update",
                          "Take a smaller k or a longer run")
    if args.resume:
        together(lambda: resuming.check(args, setup))
    progress = _resume(engine, setup, args.resume, ends[-1]) if args.resume else Progress()
    first, seconds = progress.done, 0.0
    if loader is not None:
        loader.seek(first * setup.k)
    if test_first and not progress.updates:
        progress.add(0, math.nan, best.scored(test()))
    bar = tqdm(total=ends[-1], initial=first, unit="update", mininterval=0.5, disable=dist.get_rank() != 0)
    trial = ThreadTrial.of_this_process(tell=dist.get_rank() == 0)
    lines = Lines(args.logging_steps, engine, speed, bar)

    def state() -> dict[str, Any]:
        return {"progress": asdict(progress), "run": setup.counted_in}

    for number, end in enumerate(ends, start=1):
        if end <= first:
            continue
        last, made = number == len(ends), end - progress.done
        start = time.perf_counter()
        loss = _stretch(engine, loader, progress.done, end, bar, trial, lines)
        took = time.perf_counter() - start
        seconds += took
        metrics = engine.stage_metrics()
        if metrics and "loss" in metrics[-1]:  # the model's own; what this rank told is the loss of its topmost stage's head
            loss = metrics[-1]["loss"]
        tested = not last and number % test_every == 0
        progress.add(end, loss, best.scored(test()) if tested else math.nan, metrics, took)
        if tested:
            best.keep(engine, progress, state)
            last = best.exhausted(progress)
        if args.save_checkpoint and (last or (args.save_every and number % args.save_every == 0)):
            # Before the drain, so that a longer run goes on as if it had not been stopped.
            engine.save_checkpoint(args.save_checkpoint, tag=f"update{end}", client_state=state())
            resuming.note(args, setup, args.save_checkpoint, f"update{end}")
        bar.set_postfix_str(f"{show(progress)}, {speed.words(made, took)}")
        if last:
            start = time.perf_counter()
            engine.drain()
            drained = time.perf_counter() - start
            seconds += drained
            progress.seconds[-1] += drained
            progress.score[-1] = best.scored(test())
            bar.set_postfix_str(f"{show(progress)}, {speed.words(made, took)}")
            break
    restored = best.restore(engine, progress)
    at = None if restored is None else progress.updates[restored]
    if dist.get_rank() == 0:
        if progress.done < ends[-1]:
            bar.write(f"stopped after {progress.done} of {ends[-1]} updates: {best.patience} test(s) without a better one")
        if at is not None:
            bar.write(f"the weights are those of the best test, after {at} updates")
    bar.close()
    return Trained(progress, seconds, progress.done - first, progress.score[-1 if restored is None else restored], at)


def _resume(engine: Any, setup: Setup, folder: str, updates: int) -> Progress:
    """What the checkpoint in ``folder`` has done; the engine goes on from there."""
    hint = "Go on with the settings of the run that saved it"
    try:
        path, state = engine.load_checkpoint(folder)
    except Exception as error:  # cut off files, and those of another model, raise whatever reading them comes to
        what = " ".join(line.strip() for line in str(error).splitlines()[:2]) or type(error).__name__
        raise ConfigError("--resume", folder, f"the checkpoint does not load ({what})", hint) from error
    if path is None or not isinstance(state, dict) or "progress" not in state:
        raise ConfigError("--resume", folder, "no checkpoint of this recipe was found there", "Check the folder")
    for what, here in setup.counted_in.items():
        if (saved := state.get("run", {}).get(what, here)) != here:
            raise ConfigError("--resume", folder, f"the run that saved it has {what} {saved}, and this one {here}", hint)
    try:
        progress = Progress(**state["progress"])
    except TypeError as error:
        raise ConfigError("--resume", folder, f"another version of the recipe saved it ({error})", hint) from error
    if progress.done >= updates:
        raise ConfigError("--resume", folder, f"the checkpoint has made {progress.done} updates, and this run ends after "
                          f"{updates}", "Ask for a longer run")
    return progress


def _stretch(engine: Any, loader: Loader | None, done: int, end: int, bar: tqdm[Any], trial: ThreadTrial,
             lines: Lines) -> float:
    """Mean loss of the micro-batches that finished; nan if the pipeline was still filling."""
    losses: list[Tensor] = []
    lines.begin()
    for update in range(done + 1, end + 1):
        with trial.update():
            losses.append(engine.train_batch(data_iter=loader).detach().float().mean())
        bar.update()
        lines.add(update, losses[-1])
    lines.pause()
    return torch.stack(losses).nanmean().item() if losses else math.nan
