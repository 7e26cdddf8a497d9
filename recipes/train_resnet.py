"""Train a RevNet or ResNet on images, with the method that the DeepSpeed JSON names.

    deepspeed recipes/train_resnet.py --deepspeed_config ds_configs/petra.json
    deepspeed --num_gpus 4 recipes/train_resnet.py --deepspeed_config ds_configs/petra.json --data cifar10 --epochs 300

Defaults follow PETRA (arXiv 2406.02052): peak learning rate 0.1 * batch / 256, linear warm-up, no weight decay on
biases and batch norms, random crops and flips (digits are not flipped).
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common
import deepspeed
import torch
import torch.distributed as dist
from image_data import NAMED, ImageData, load_images
from micro_batches import MicroBatches, Samples, in_order
from torch import Tensor, nn
from tqdm import tqdm

import ds_decoupled
from ds_decoupled.errors import ConfigError
from ds_decoupled.models import MODELS, build_model

STEPS_SMALL = (150 / 300, 225 / 300)
STEPS_IMAGENET = (30 / 90, 60 / 90, 80 / 90)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="revnet18", choices=MODELS)
    parser.add_argument("--width", type=int, help="channels of the first group (default: 16 for digits, else 64)")
    parser.add_argument("--data", default="digits", help=f"one of {', '.join(NAMED)}, or a folder of images or parquet")
    parser.add_argument("--data_root", default="data", help="where torchvision's data sets are (default: data)")
    parser.add_argument("--image_size", type=int, help="pixels a side (default: 16 for digits, else the data's own)")
    parser.add_argument("--num_classes", type=int, help="outputs of the model (default: the data's classes)")
    parser.add_argument("--epochs", type=int, help="default: 20 for digits, 300 for small images, 90 for large")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pipe_ranks", type=int, help="P, processes a pipeline (default: all)")
    parser.add_argument("--lr", type=float, help="peak (default: the JSON's, else 0.1 * batch / 256)")
    parser.add_argument("--schedule", default="cosine", choices=("cosine", "steps"))
    parser.add_argument("--warmup_epochs", type=float, help="default: 5, at most a fifth of all epochs")
    parser.add_argument("--eval_every", type=int, default=1, help="epochs from test to test")
    parser.add_argument("--summary", type=Path, help="JSON file of results (default: runs/METHOD.json)")
    parser.add_argument("--plot", type=Path, help="picture of the curves (default: beside the summary)")
    parser.add_argument("--save_checkpoint", metavar="DIR", help="save there after the last epoch")
    parser.add_argument("--save_every", type=int, default=0, help="and after every so many epochs")
    parser.add_argument("--resume", metavar="DIR", help="go on from the last checkpoint there")
    parser.add_argument("--backend", help="of torch.distributed (default: DeepSpeed's choice)")
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the launcher")
    return deepspeed.add_config_arguments(parser).parse_args()


@dataclass
class Progress:
    """What a checkpoint carries beside the engine's own state."""

    epoch: int
    train_loss: list[float]
    test_accuracy: list[float]


@dataclass(frozen=True)
class DataFacts:
    """What ranks that hold no images must know of them."""

    num_classes: int
    image_size: int
    form: str
    train_count: int
    test_count: int


def load(args: argparse.Namespace, holds_data: bool) -> tuple[ImageData | None, DataFacts]:
    """The images on the ranks of the first and the last stage, facts about them on all."""

    def read() -> ImageData:
        return load_images(args.data, root=args.data_root, image_size=args.image_size, num_classes=args.num_classes)

    # One rank downloads, then the others find the files.
    goes_first = args.data != "cifar10" or dist.get_rank() == 0
    images = common.together(read if holds_data and goes_first else None)
    images = common.together(read if holds_data and not goes_first else None) or images
    facts = None
    if images is not None:
        counts = len(images.train.labels), len(images.test.labels)
        facts = DataFacts(images.num_classes, images.image_size, images.form, *counts)
    facts = common.from_rank(0, facts)
    assert facts is not None
    return images, facts


def evaluate(engine: Any, test: Samples | None, count: int, micro_batch: int) -> float:
    """Share of the ``count`` test images that the model classifies rightly, on every rank; a collective call."""
    number = -(-count // micro_batch)
    batches = None if test is None else in_order(test, micro_batch)
    # DeepSpeed adds what the last stage gives to the loss that the last train_batch left there, and the shapes differ.
    engine.total_loss = None
    logits = engine.eval_batch(
        batches, compute_loss=False, reduce_output=None, bcast_loss=False, num_micro_batches=number
    )
    accuracy = math.nan
    if test is not None and logits is not None:
        guesses = torch.cat(list(logits))[:count].argmax(dim=1).cpu()
        accuracy = (guesses == test.labels).float().mean().item()
    return common.from_rank(dist.get_world_size() - 1, accuracy)


def train_epoch(engine: Any, batches: Iterator[Any] | None, updates: int, bar: tqdm[Any]) -> float:
    """Mean loss of the micro-batches that finished; nan if the pipeline was still filling."""
    losses: list[Tensor] = []
    for _ in range(updates):
        losses.append(engine.train_batch(data_iter=batches).detach().float().mean())
        bar.update()
    return torch.stack(losses).nanmean().item() if losses else math.nan


def train(args: argparse.Namespace) -> None:
    config = common.read_config(args.deepspeed_config)
    pipe_ranks, pipe_rank, replicas, replica = common.pipe_position(args.pipe_ranks)
    micro_batch, k = common.batch_sizes(config, replicas)
    holds_data = pipe_rank in (0, pipe_ranks - 1)
    images, facts = load(args, holds_data)
    digits, rank = args.data == "digits", dist.get_rank()
    width = args.width or (16 if digits else 64)
    epochs = args.epochs if args.epochs is not None else 20 if digits else 300 if facts.form == "cifar10" else 90
    if epochs < 1:
        raise ConfigError("--epochs", epochs, "it must be at least 1")

    def open_loader() -> MicroBatches:
        assert images is not None
        return MicroBatches(images.train, micro_batch, seed=args.seed, replica=replica, replicas=replicas)

    loader = common.together(open_loader if holds_data else None)
    per_epoch = facts.train_count // (micro_batch * replicas)
    # Where k does not divide an epoch, updates go across its border: none of the data are left out.
    borders = [epoch * per_epoch // k for epoch in range(epochs + 1)]

    common.set_peak_lr(config, args.lr, rule=0.1 * micro_batch * k * replicas / 256)
    warmup_epochs = min(5.0, epochs / 5) if args.warmup_epochs is None else args.warmup_epochs
    steps = STEPS_IMAGENET if facts.form == "imagenet" or args.data == "imagenet32" else STEPS_SMALL
    schedule = common.lr_schedule(args.schedule, borders[-1], round(warmup_epochs * per_epoch / k), steps)

    sample = torch.randn(micro_batch, 3, facts.image_size, facts.image_size, generator=torch.Generator().manual_seed(0))
    model = ds_decoupled.DecoupledPipelineModule(
        build_model(args.model, data=facts.form, num_classes=facts.num_classes, width=width),
        config=copy.deepcopy(config),
        num_stages=pipe_ranks,
        loss_fn=nn.CrossEntropyLoss(),
        base_seed=args.seed,
        sample_input=sample,
    )
    engine, _, _, _ = ds_decoupled.initialize(
        model=model,
        config=copy.deepcopy(config),
        model_parameters=common.parameter_groups(model),
        lr_scheduler=None if "scheduler" in config else schedule,
    )

    progress = Progress(0, [], [])
    if args.resume:
        path, state = engine.load_checkpoint(args.resume)
        if path is None or "progress" not in state:
            raise ConfigError("--resume", args.resume, "no checkpoint was found there", "Check the folder")
        progress = Progress(**state["progress"])
        if progress.epoch >= epochs:
            raise ConfigError("--epochs", epochs, f"the checkpoint already has {progress.epoch}", "Give more epochs")
    if loader is not None:
        loader.seek(borders[progress.epoch] * k)

    def test() -> float:
        return evaluate(engine, None if images is None else images.test, facts.test_count, micro_batch)

    def show() -> None:
        accuracy = next((value for value in reversed(progress.test_accuracy) if math.isfinite(value)), math.nan)
        bar.set_postfix_str(f"loss {progress.train_loss[-1]:.4f}, test accuracy {accuracy:.2%}")

    bar = tqdm(total=borders[-1], initial=borders[progress.epoch], unit="update", mininterval=0.5, disable=rank != 0)
    first_epoch, seconds = progress.epoch, 0.0
    for epoch in range(first_epoch + 1, epochs + 1):
        last = epoch == epochs
        start = time.perf_counter()
        progress.train_loss.append(train_epoch(engine, loader, borders[epoch] - borders[epoch - 1], bar))
        seconds += time.perf_counter() - start
        progress.test_accuracy.append(test() if not last and epoch % args.eval_every == 0 else math.nan)
        progress.epoch = epoch
        if args.save_checkpoint and (last or (args.save_every and epoch % args.save_every == 0)):
            # Before the drain, so that a longer run goes on as if it had not been stopped.
            engine.save_checkpoint(args.save_checkpoint, tag=f"epoch{epoch}", client_state={"progress": vars(progress)})
        show()
    start = time.perf_counter()
    if hasattr(engine, "drain"):
        engine.drain()
    seconds += time.perf_counter() - start
    progress.test_accuracy[-1] = test()
    show()
    bar.close()

    numbers = common.engine_numbers(engine, pipe_ranks, config)
    bytes_sent = numbers.pop("bytes_sent", None)
    samples = (borders[-1] - borders[first_epoch]) * k * micro_batch * replicas
    summary = {
        "model": args.model,
        "width": width,
        "data": args.data,
        "image_size": facts.image_size,
        "pipe_ranks": pipe_ranks,
        "replicas": replicas,
        "seed": args.seed,
        "epochs": epochs,
        "train_loss": progress.train_loss[-1],
        "test_accuracy": progress.test_accuracy[-1],
        "samples_per_second": samples / seconds if seconds else math.nan,
        "peak_memory_bytes": common.largest(common.peak_memory_bytes()),
        "bytes_sent_per_sample": None if bytes_sent is None or not samples else bytes_sent / samples,
        "curves": {"train_loss": progress.train_loss, "test_accuracy": progress.test_accuracy},
        "config": config,
        "arguments": {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()},
    }
    if rank == 0:
        report(args, numbers | summary)


def report(args: argparse.Namespace, summary: dict[str, Any]) -> None:
    """Print the result, write the summary and the picture."""
    path = args.summary or Path("runs") / f"{summary['method']}.json"
    plot = args.plot or path.with_suffix(".png")
    curves = summary["curves"]
    title = f"{summary['method']}: {summary['model']} on {summary['data']}, {summary['stages']} stages"
    common.plot_curves(plot, title, curves["train_loss"], curves["test_accuracy"], "test accuracy")
    common.write_json(path, summary)
    print(
        f"{title} on {summary['pipe_ranks']} rank(s): test accuracy {summary['test_accuracy']:.2%}, "
        f"training loss {summary['train_loss']:.4f}, {summary['samples_per_second']:.0f} samples/s, "
        f"peak memory {summary['peak_memory_bytes'] / 2**20:.0f} MiB\nsummary: {path}\ncurves: {plot}"
    )


def main() -> None:
    args = parse_arguments()
    with common.distributed(args.backend):
        train(args)


if __name__ == "__main__":
    main()
