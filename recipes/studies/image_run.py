"""One run of a study on images: a model trained by the engine on one rank, where the numbers are those of any number."""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import deepspeed
import torch
from torch import nn

import ds_decoupled
import run.evaluation
from data.images import load_images
from data.micro_batches import MicroBatches, in_order
from data.samples import ImageData, TensorImages
from ds_decoupled.errors import ConfigError
from ds_decoupled.models.registry import build_model
from ds_decoupled.threads import usable_cores
from run.rates import lr_schedule, parameter_groups
from run.worlds import Parent
from studies.image_settings import ImageStudy, ImageTask
from studies.results import Kind, Results


def decode(data: str, images: int, image_size: int, path: Path) -> ImageData:
    """Read and decode images once, for all runs of a study: they lie in ``path`` then.

    Args:
        data: as ``data.images.load_images`` takes it.
        images: the first so many are trained on; 0 for all.

    Raises:
        ConfigError: for data that cannot be read, or are read one by one while training.
    """
    found = load_images(data, image_size=image_size)
    if not isinstance(found.train, TensorImages):
        raise ConfigError("--data", data, "large images, which are decoded again and again", "Take small ones")
    train = found.train.first(images) if images else found.train
    decoded = ImageData(train, found.test, found.num_classes, found.image_size, found.form)
    torch.save(decoded, path)
    return decoded


def prepare(study: ImageTask, path: Path) -> int:
    """:func:`decode` for an image study. Returns the updates of every stage of a run."""
    decoded = decode(study.data, study.images, study.image_size, path)
    return study.epochs * len(MicroBatches(decoded.train, study.micro_batch, seed=0))


class ImageRun(Protocol):
    """What tells one run from another: a frozen dataclass."""

    @property
    def label(self) -> str:
        """For messages."""

    @property
    def seed(self) -> int:
        """Of weights, data, and whatever is drawn."""

    def config(self, study: ImageStudy, updates: int) -> dict[str, Any]:
        """The DeepSpeed JSON."""


S = TypeVar("S", bound=ImageRun)


def train(setting: ImageRun, study: ImageStudy, images: ImageData, progress: Callable[[int], None]) -> dict[str, Any]:
    """Train until every stage has made its own updates, and test; in a world of one rank.

    Args:
        progress: is told how many updates the slowest stage has made.
    """
    batches = MicroBatches(images.train, study.micro_batch, seed=setting.seed)
    updates = study.epochs * len(batches)
    config = setting.config(study, updates)
    engine = engine_of(study.model, study.width, config, images, updates, setting.seed)
    generated, epochs = getattr(getattr(engine, "axes", None), "input", "") == "auxnet", []
    start = time.perf_counter()
    done = calls = 0
    while done < updates:
        engine.train_batch(data_iter=batches)
        calls += 1
        # Whoever is slowed has its updates to make yet, and those that have made theirs only forward.
        optimizers = getattr(engine, "stage_optimizers", {})
        done = min((optimizer.updates for optimizer in optimizers.values()), default=calls)
        if calls % 10 == 0:
            progress(min(done, updates))
        if generated and calls % len(batches) == 0:
            epochs.append([row["mismatch"] for row in engine.stage_metrics() if "mismatch" in row])
    engine.drain()
    seconds = time.perf_counter() - start
    found: dict[str, Any] = {"test_accuracy": accuracy_of(engine, images, study.micro_batch), "seconds": seconds,
                             "calls": calls}
    summary = engine.decoupled_summary()
    if generated:
        stages = len(summary["stage_layers"])
        found |= {"accuracy_from_stage": [accuracy_of(engine, images, study.micro_batch, from_stage=s) for s in range(stages)],
                  "mismatch": epochs, "share": summary["auxnet"]["share"],
                  "cosines": summary.get("gradient_tracker", [])}
    return {**found, "updates": summary["updates"], "replay": summary.get("replay", [])}


def engine_of(name: str, width: int, config: dict[str, Any], images: ImageData, updates: int, seed: int) -> Any:
    """The engine that trains model ``name`` on ``images``; its rate is warmed up for a twentieth of the updates, and then falls
    by a cosine."""
    sample = torch.zeros(config["train_micro_batch_size_per_gpu"], 3, images.image_size, images.image_size)
    layers = build_model(name, data=images.form, num_classes=images.num_classes, width=width)
    model = ds_decoupled.DecoupledPipelineModule(layers, config=copy.deepcopy(config), num_stages=1, sample_input=sample,
                                                 loss_fn=nn.CrossEntropyLoss(), base_seed=seed)
    engine, *_ = ds_decoupled.initialize(model=model, config=copy.deepcopy(config), model_parameters=parameter_groups(model),
                                         lr_scheduler=lr_schedule("cosine", updates, round(0.05 * updates)))
    return engine


def accuracy_of(engine: Any, images: ImageData, micro_batch: int, **options: Any) -> float:
    """The share of the test images that are classified rightly; ``options`` are of ``eval_batch``."""
    count = len(images.test.labels)
    logits = run.evaluation.evaluate(engine, in_order(images.test, micro_batch), -(-count // micro_batch), compute_loss=False,
                                     **options)
    assert logits is not None
    right = torch.cat(logits)[:count].argmax(dim=1).cpu() == images.test.labels
    return right.float().mean().item()


def train_alone(parent: Parent, setting: ImageRun, study: ImageStudy, *, images: str) -> dict[str, Any]:
    """A process's task: tells how many updates are made, and then what :func:`train` gives.

    Args:
        images: the file of :func:`prepare`.
    """
    deepspeed.init_distributed(dist_backend="gloo")
    return train(setting, study, torch.load(images, weights_only=False), parent.tell)


def image_kind(name: str, make: Callable[..., S]) -> Kind[S]:
    """Runs on one rank.

    Args:
        name: of the kind of study, in messages.
        make: a setting of what a file holds.
    """
    return Kind(name, ImageStudy, lambda held: make(**held), train_alone, "test_accuracy",
                lambda run: f"{run['test_accuracy']:.2%}", unit="update")


def fill(kind: Kind[S], output: Path, study: ImageTask, wanted: list[S], jobs: int) -> Results[S]:
    """Run what ``output`` does not hold yet of the ``wanted`` runs, ``jobs`` side by side.

    Args:
        kind: its task takes the file of :func:`prepare` by name.

    Returns:
        All that the file holds.

    Raises:
        ConfigError: for a file of another study, or data that cannot be read.
    """
    with tempfile.TemporaryDirectory() as folder:
        images = Path(folder, "images.pt")
        results = Results(output, study, replace(kind, task=partial(kind.task, images=str(images))))
        if missing := results.missing(wanted):
            steps = prepare(study, images)
            results.execute(missing, steps, jobs, max(1, usable_cores() // jobs))
    return results
