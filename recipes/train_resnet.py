"""Train a RevNet or ResNet on images, with the method that the DeepSpeed JSON names.

    deepspeed recipes/train_resnet.py --deepspeed_config ds_configs/petra.json
    deepspeed --num_gpus 4 recipes/train_resnet.py --deepspeed_config ds_configs/petra.json --data cifar10 --epochs 300

Defaults follow PETRA (arXiv 2406.02052): peak learning rate 0.1 * batch / 256, linear warm-up, no weight decay on
biases and batch norms, random crops and flips (digits are not flipped).
"""

from __future__ import annotations

if __name__ == "__main__":  # before torch loads OpenMP
    from ds_decoupled.threads import share_cores

    share_cores()

import argparse
import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.pipe import LayerSpec
from torch import nn

import run.evaluation
import run.training
from data.images import NAMED, load_images
from data.micro_batches import MicroBatches, Samples, in_order
from data.samples import SMALLEST, ImageData
from ds_decoupled.collectives import from_rank, together
from ds_decoupled.config import parse_block
from ds_decoupled.errors import ConfigError
from ds_decoupled.models import MODELS, build_model
from run.arguments import add_run_arguments
from run.best import Best
from run.generated import Generated, panels
from run.options import number, refuse_beyond_memory, refuse_unused, whole
from run.processes import distributed
from run.rates import lr_schedule, set_peak_lr
from run.results import report, summarize
from run.setup import Setup
from run.speed import Speed

STEPS_SMALL = (150 / 300, 225 / 300)
STEPS_IMAGENET = (30 / 90, 60 / 90, 80 / 90)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="revnet18", choices=MODELS)
    parser.add_argument("--width", type=whole(1), help="channels of the first group (default: 16 for digits, else the paper's)")
    parser.add_argument("--data", default="digits", help=f"one of {', '.join(NAMED)}, or a folder of images or parquet")
    parser.add_argument("--data_root", help="where torchvision's data sets are (default: data)")
    parser.add_argument("--image_size", type=whole(SMALLEST, 100_000),
                        help="pixels a side (default: 16 for digits, else the data's own)")
    parser.add_argument("--num_classes", type=whole(1, 10_000_000), help="outputs of the model (default: the data's classes)")
    parser.add_argument("--epochs", type=whole(1, 1_000_000), help="default: 20 for digits, 300 for small images, 90 for large")
    parser.add_argument("--lr", type=number(0), help="peak (default: the JSON's, else 0.1 * batch / 256)")
    parser.add_argument("--schedule", choices=("cosine", "steps"), help="(default: cosine)")
    parser.add_argument("--warmup_epochs", type=number(0), help="default: 5, at most a fifth of all epochs")
    parser.add_argument("--serial_epochs", type=whole(0), help="with an AuxNet: the last so many epochs are backpropagation "
                        "through the serial network (default: the JSON's)")
    parser.add_argument("--eval_every", type=whole(1), default=1, help="epochs from test to test (default: 1)")
    add_run_arguments(parser, stretch="epochs", summary="runs/METHOD.json")
    return parser.parse_args()


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
        return load_images(args.data, root=args.data_root or "data", image_size=args.image_size, num_classes=args.num_classes)

    # One rank downloads, then the others find the files.
    goes_first = args.data != "cifar10" or dist.get_rank() == 0
    images = together(read if holds_data and goes_first else None)
    images = together(read if holds_data and not goes_first else None) or images
    facts = None
    if images is not None:
        counts = len(images.train.labels), len(images.test.labels)
        facts = DataFacts(images.num_classes, images.image_size, images.form, *counts)
    facts = from_rank(0, facts)
    assert facts is not None
    return images, facts


def evaluate(engine: Any, test: Samples | None, count: int, micro_batch: int, **options: Any) -> float:
    """Share of the ``count`` test images that the model classifies rightly, on every rank; a collective call."""
    batches = None if test is None else in_order(test, micro_batch)
    logits = run.evaluation.evaluate(engine, batches, -(-count // micro_batch), compute_loss=False, **options)
    accuracy = math.nan
    if test is not None and logits is not None:
        guesses = torch.cat(logits)[:count].argmax(dim=1).cpu()
        accuracy = (guesses == test.labels).float().mean().item()
    return from_rank(dist.get_world_size() - 1, accuracy)


def check_memory(args: argparse.Namespace, layers: list[LayerSpec], micro_batch: int, facts: DataFacts) -> None:
    """Refuse a model, or a micro-batch of images, that is larger than this machine."""
    with torch.device("meta"):  # without weights
        weights = sum(parameter.numel() for layer in layers for parameter in layer.build().parameters())
    for name in ("width", "num_classes"):
        if getattr(args, name) is not None:
            refuse_beyond_memory(f"--{name}", getattr(args, name), 4.0 * weights, "the model's weights")
    refuse_beyond_memory("--image_size" if args.image_size else "train_micro_batch_size_per_gpu",
                         args.image_size or micro_batch, 12.0 * micro_batch * facts.image_size**2, "one micro-batch of images")


def end_serially(config: dict[str, Any], serial: int, ends: list[int]) -> None:
    """Write ``auxnet.serial_from`` for the last ``serial`` epochs; ``ends`` are the updates at the end of each."""
    block = parse_block(config)
    if block is None or block.axes().input != "auxnet":
        raise ConfigError("--serial_epochs", serial, "no inputs are generated, which could come to an end",
                          'Leave it out, or take "method": "auxnet_penalty".')
    if serial > len(ends):
        raise ConfigError("--serial_epochs", serial, f"there are {len(ends)} epochs", "Take fewer.")
    if serial:
        config["decoupled"].setdefault("auxnet", {})["serial_from"] = [0, *ends][len(ends) - serial]


def train(args: argparse.Namespace) -> None:
    setup = Setup.of(args)
    if args.data not in NAMED or args.data == "digits":
        refuse_unused(args, ["data_root"], f"--data {args.data} is not read from there")
    micro_batch, k, replicas = setup.micro_batch, setup.k, setup.replicas
    images, facts = load(args, setup.holds_data)
    digits = args.data == "digits"
    width = args.width or (16 if digits else None)
    epochs = args.epochs if args.epochs is not None else 20 if digits else 300 if facts.form == "cifar10" else 90
    if args.warmup_epochs is not None and args.warmup_epochs > epochs:
        raise ConfigError("--warmup_epochs", args.warmup_epochs, f"there are {epochs} epochs", "Take fewer")

    def open_loader() -> MicroBatches:
        assert images is not None
        return MicroBatches(images.train, micro_batch, seed=args.seed, replica=setup.replica, replicas=replicas)

    loader = together(open_loader if setup.holds_data else None)
    per_epoch = facts.train_count // (micro_batch * replicas)
    # Where k does not divide an epoch, updates go across its border: none of the data are left out.
    ends = [epoch * per_epoch // k for epoch in range(1, epochs + 1)]

    set_peak_lr(setup.config, args.lr, rule=0.1 * setup.update_samples / 256)
    warmup_epochs = min(5.0, epochs / 5) if args.warmup_epochs is None else args.warmup_epochs
    steps = STEPS_IMAGENET if facts.form == "imagenet" or args.data == "imagenet32" else STEPS_SMALL
    if args.serial_epochs is not None:
        end_serially(setup.config, args.serial_epochs, ends)
    layers = build_model(args.model, data=facts.form, num_classes=facts.num_classes, width=width)
    check_memory(args, layers, micro_batch, facts)
    sample = torch.randn(micro_batch, 3, facts.image_size, facts.image_size, generator=torch.Generator().manual_seed(0))
    setup.check_taught(ends[-1])
    engine = setup.engine(
        layers,
        loss_fn=nn.CrossEntropyLoss(),
        seed=args.seed,
        schedule=lr_schedule(args.schedule or "cosine", ends[-1], round(warmup_epochs * per_epoch / k), steps),
        sample_input=sample,
    )

    def accuracy(**options: Any) -> float:
        return evaluate(engine, None if images is None else images.test, facts.test_count, micro_batch, **options)

    generated = Generated(engine.placement.stages, lambda stage: accuracy(from_stage=stage)) \
        if "auxnet" in engine.decoupled_summary() else None
    test = accuracy if generated is None else generated.test

    def show(progress: run.training.Progress) -> str:
        return f"loss {progress.train_loss[-1]:.4f}, test accuracy {progress.last_score:.2%}"

    trained = run.training.train(args, setup, engine, loader, ends=ends, test=test, show=show, test_every=args.eval_every,
                                 best=Best.of(args, lower=False),
                                 speed=Speed(setup.update_samples, "images"))
    losses, accuracies = trained.progress.train_loss, trained.progress.score
    beside = {} if generated is None else generated.summary(
        trained.progress, engine.decoupled_summary()["gradient_tracker"], per_epoch)
    summary = summarize(
        args, setup, engine, trained,
        model=args.model,
        width=width,
        data=args.data,
        image_size=facts.image_size,
        epochs=epochs,
        test_accuracy=trained.score,
        best_update=trained.best,
        curves={"train_loss": losses, "test_accuracy": accuracies, "seconds": trained.progress.seconds},
        **beside,
        stage_curves={name: trained.progress.stage_curves(name) for name in ("loss", "accuracy")},
    )
    report(
        args, summary, summary["method"], f"{summary['method']}: {args.model} on {args.data}, {summary['stages']} stages",
        ("epoch", range(1, len(losses) + 1)),
        {"training loss": {"training loss": losses}, "test accuracy": {"test accuracy": accuracies}},
        f"test accuracy {summary['test_accuracy']:.2%}, training loss {summary['train_loss']:.4f}, "
        f"{summary['samples_per_second']:.0f} samples/s, peak memory {summary['peak_memory_bytes'] / 2**20:.0f} MiB",
        by_stage={"training accuracy by the stage's head": trained.progress.stage_curves("accuracy"),
                  **(panels(beside) if beside else {})},
    )


def main() -> None:
    args = parse_arguments()
    with distributed(args.backend):
        train(args)


if __name__ == "__main__":
    main()
