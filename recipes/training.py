"""One training run as every recipe makes it: stretches of updates, a test after each, checkpoints to go on from, a summary."""

from __future__ import annotations

import argparse
import copy
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import common
import deepspeed
import torch
import torch.distributed as dist
from options import SEEDS, refuse_unused, whole
from places import check_file, check_folder, check_picture
from torch import Tensor
from tqdm import tqdm

import ds_decoupled
from ds_decoupled.errors import ConfigError

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
    parser.add_argument("--resume", metavar="DIR", help="go on from the last checkpoint there")
    parser.add_argument("--backend", help="of torch.distributed (default: DeepSpeed's choice)")
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the launcher")
    deepspeed.add_config_arguments(parser)


def check_run_arguments(args: argparse.Namespace, config: dict[str, Any]) -> None:
    """Refuse what would change nothing, and places that cannot be written to, before there is anything to lose."""
    if args.save_checkpoint is None:
        refuse_unused(args, ["save_every"], "without --save_checkpoint nothing is saved", "Give --save_checkpoint")
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
    summary, plot = args.summary or DEFAULT_FOLDER / "METHOD.json", _plot_path(args, args.summary)
    if args.summary is None:
        check_folder("--summary", DEFAULT_FOLDER)
    else:
        check_file("--summary", summary)
    if plot is not None:
        if plot == summary:
            raise ConfigError("--summary", str(summary), f"the picture of the curves would go to the same file, {plot}",
                              "End the summary's name with .json, or give another --plot")
        check_picture("--plot", plot)


def _plot_path(args: argparse.Namespace, summary: Path | None) -> Path | None:
    """Where the picture goes; None while neither it nor the summary has a name."""
    plot: Path | None = args.plot or (None if summary is None else summary.with_suffix(".png"))
    return plot


@dataclass(frozen=True)
class Setup:
    """What is known before any data: the configuration, and this process's place among all.

    Attributes:
        config: DeepSpeed's; recipes write the peak learning rate into it.
        pipe_ranks, pipe_rank: P, and which of them this is.
        replicas, replica: pipelines that share the data, and which of them this is.
        micro_batch: samples of a micro-batch of one replica.
        k: micro-batches per update.
    """

    config: dict[str, Any]
    pipe_ranks: int
    pipe_rank: int
    replicas: int
    replica: int
    micro_batch: int
    k: int

    @staticmethod
    def of(args: argparse.Namespace) -> Setup:
        """Raises :class:`ConfigError` for settings that cannot work."""
        config = common.read_config(args.deepspeed_config)
        common.together(lambda: check_run_arguments(args, config))
        pipe_ranks, pipe_rank, replicas, replica = common.pipe_position(args.pipe_ranks)
        return Setup(config, pipe_ranks, pipe_rank, replicas, replica, *common.batch_sizes(config, replicas))

    @property
    def holds_data(self) -> bool:
        """Whether this is a rank of the first or the last stage: only these read data."""
        return self.pipe_rank in (0, self.pipe_ranks - 1)

    @property
    def update_samples(self) -> int:
        """Samples of one update, over all replicas."""
        return self.micro_batch * self.k * self.replicas

    @property
    def counted_in(self) -> dict[str, int]:
        """Units that a run's progress is counted in: a checkpoint goes on with the same ones."""
        return {"gradient_accumulation_steps": self.k, "samples of a micro-batch, over all replicas,":
                self.micro_batch * self.replicas}

    def engine(self, layers: list[Any], *, loss_fn: Callable[..., Any], seed: int, schedule: Any, sample_input: Any) -> Any:
        """The engine that trains ``layers``; ``schedule`` counts updates, unless the JSON has a scheduler."""
        model = ds_decoupled.DecoupledPipelineModule(
            layers, config=copy.deepcopy(self.config), num_stages=self.pipe_ranks, loss_fn=loss_fn, base_seed=seed,
            sample_input=sample_input)
        engine, _, _, _ = ds_decoupled.initialize(
            model=model, config=copy.deepcopy(self.config), model_parameters=common.parameter_groups(model),
            lr_scheduler=None if "scheduler" in self.config else schedule)
        return engine


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
        score: the test's; nan where none was made.
        stages: of every stage with a loss of its own, the loss and accuracy of its head; empty for other methods.
    """

    updates: list[int] = field(default_factory=list)
    train_loss: list[float] = field(default_factory=list)
    score: list[float] = field(default_factory=list)
    stages: list[list[dict[str, float]]] = field(default_factory=list)

    @property
    def done(self) -> int:
        """Updates made so far."""
        return self.updates[-1] if self.updates else 0

    def add(self, updates: int, train_loss: float, score: float, stages: list[dict[str, float]] | None = None) -> None:
        """One more stretch."""
        self.updates.append(updates)
        self.train_loss.append(train_loss)
        self.score.append(score)
        self.stages.append(stages or [])

    def stage_curves(self, name: str) -> dict[str, list[float]]:
        """The ``name`` (loss or accuracy) of each stage's head, by stage; empty where stages have no loss of their own."""
        count = max((len(stages) for stages in self.stages), default=0)
        return {f"stage {s}": [stages[s].get(name, math.nan) if s < len(stages) else math.nan for stages in self.stages]
                for s in range(count)}

    @property
    def last_score(self) -> float:
        """The newest that there is, or nan."""
        return next((value for value in reversed(self.score) if math.isfinite(value)), math.nan)


@dataclass(frozen=True)
class Trained:
    """A finished run: its curves, the seconds spent on training alone, and the updates made in them."""

    progress: Progress
    seconds: float
    updates: int


def train(args: argparse.Namespace, setup: Setup, engine: Any, loader: Loader | None, *, ends: Sequence[int],
          test: Callable[[], float], show: Callable[[Progress], str], test_every: int = 1, test_first: bool = False) -> Trained:
    """Train up to the last of ``ends``, from the start or from the checkpoint that ``args`` names.

    Args:
        args: holds ``save_checkpoint``, ``save_every`` and ``resume``.
        loader: on the ranks that hold data.
        ends: after how many updates each stretch ends.
        test: gives the score; a collective call.
        show: what stands beside the progress bar.
        test_every: stretches from test to test; there always is one at the end.
        test_first: whether there is one before all training.
    """
    if ends[-1] < 1:
        raise ConfigError("gradient_accumulation_steps", setup.k, "all the micro-batches of this run do not make one update",
                          "Take a smaller k or a longer run")
    progress = _resume(engine, setup, args.resume, ends[-1]) if args.resume else Progress()
    first, seconds = progress.done, 0.0
    if loader is not None:
        loader.seek(first * setup.k)
    if test_first and not progress.updates:
        progress.add(0, math.nan, test())
    bar = tqdm(total=ends[-1], initial=first, unit="update", mininterval=0.5, disable=dist.get_rank() != 0)
    for number, end in enumerate(ends, start=1):
        if end <= first:
            continue
        last = number == len(ends)
        start = time.perf_counter()
        loss = _stretch(engine, loader, end - progress.done, bar)
        seconds += time.perf_counter() - start
        metrics = engine.stage_metrics() if hasattr(engine, "stage_metrics") else []
        progress.add(end, loss, test() if not last and number % test_every == 0 else math.nan, metrics)
        if args.save_checkpoint and (last or (args.save_every and number % args.save_every == 0)):
            # Before the drain, so that a longer run goes on as if it had not been stopped.
            engine.save_checkpoint(args.save_checkpoint, tag=f"update{end}",
                                   client_state={"progress": asdict(progress), "run": setup.counted_in})
        if last:
            start = time.perf_counter()
            if hasattr(engine, "drain"):
                engine.drain()
            seconds += time.perf_counter() - start
            progress.score[-1] = test()
        bar.set_postfix_str(show(progress))
    bar.close()
    return Trained(progress, seconds, ends[-1] - first)


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


def _stretch(engine: Any, loader: Loader | None, updates: int, bar: tqdm[Any]) -> float:
    """Mean loss of the micro-batches that finished; nan if the pipeline was still filling."""
    losses: list[Tensor] = []
    for _ in range(updates):
        losses.append(engine.train_batch(data_iter=loader).detach().float().mean())
        bar.update()
    return torch.stack(losses).nanmean().item() if losses else math.nan


def summarize(args: argparse.Namespace, setup: Setup, engine: Any, trained: Trained, **facts: Any) -> dict[str, Any]:
    """What goes into the summary: the engine's numbers, ``facts``, speed and memory; a collective call."""
    numbers = common.engine_numbers(engine, setup.pipe_ranks, setup.config)
    bytes_sent = numbers.pop("bytes_sent", None)
    samples = trained.updates * setup.update_samples
    return numbers | {
        "pipe_ranks": setup.pipe_ranks,
        "replicas": setup.replicas,
        "seed": args.seed,
        "train_loss": trained.progress.train_loss[-1],
        "samples_per_second": samples / trained.seconds if trained.seconds else math.nan,
        "peak_memory_bytes": common.largest(common.peak_memory_bytes()),
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
        x, axes: of the curves: name and values of x, then curves by axis and name, as in ``common.plot_curves``.
        line: the result in words.
        by_stage: more curves, in panels below: by what they show and stage.
    """
    if dist.get_rank() != 0:
        return
    path = args.summary or DEFAULT_FOLDER / f"{name}.json"
    plot = _plot_path(args, path) or path.with_suffix(".png")
    x_name, places = x

    def points(panels: Mapping[str, Mapping[str, Sequence[float]]]) -> dict[str, common.Curves]:
        return {axis: {curve: list(zip(places, values)) for curve, values in curves.items()} for axis, curves in panels.items()}

    common.write_json(path, summary)
    common.plot_curves(plot, title, x_name, points(axes), points(by_stage or {}))
    print(f"{title} on {summary['pipe_ranks']} rank(s): {line}\nsummary: {path}\ncurves: {plot}")
