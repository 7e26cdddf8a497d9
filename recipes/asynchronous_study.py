"""Ways to train on two cores without waiting: threads that share a model, replicas that exchange weights, and a slow replica.

    python recipes/asynchronous_study.py                    on the digits
    python recipes/asynchronous_study.py --data CIFAR --images 10000 --target 0.5

The paper's comparison (PD-ASGD, arXiv 2410.05985): forward and backward threads, Hogwild's workers, LAPSGD, gossip, and
synchronous SGD, whose operations have both cores or which is data parallel. All see as many samples. First the learning rate
of each way is tuned, with the first seed; then the others train at the best one; then a second replica is slowed, so that each
of its batches takes ``d`` batch times longer. Run it on a quiet machine: it measures time. Results are written as they come,
and a run that the output file holds already is not repeated.
"""

from __future__ import annotations

if __name__ == "__main__":  # before torch loads OpenMP
    from ds_decoupled.threads import share_cores

    share_cores(tell=False)

import argparse
import os
import sys
from dataclasses import fields
from functools import partial
from pathlib import Path

from ds_decoupled.config import parse_block
from ds_decoupled.errors import ConfigError
from ds_decoupled.models import MODELS
from run.options import COUNT, SEEDS, number, whole
from run.places import check_file, check_picture
from run.tables import environment, headline
from studies.asynchronous_report import draw, tables, tuned
from studies.asynchronous_run import train_alone
from studies.asynchronous_settings import WAYS, AsynchronousSetting, AsynchronousStudy
from studies.image_run import fill
from studies.results import Kind

SIZES = {"images": (0, COUNT, "trained on, of those there are; 0 for all"), "width": (1, 4096, "of the first layer"),
         "image_size": (8, 256, "pixels a side"), "epochs": (1, COUNT, "of all replicas together"),
         "micro_batch": (1, COUNT, "images"), "evaluations": (1, COUNT, "on the way"),
         "test_images": (1, COUNT, "looked at on the way")}
RATES = [0.0125, 0.025, 0.05, 0.1, 0.2, 0.4]

ASYNCHRONOUS = Kind("asynchronous study", AsynchronousStudy, lambda held: AsynchronousSetting(**held), train_alone,
                    "test_accuracy", lambda run: f"{run['samples_per_second']:.0f} samples/s, {run['test_accuracy']:.2%}",
                    ranks=lambda setting: setting.replicas)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS), metavar="WAY",
                        help=f"of {', '.join(repr(way) for way in WAYS)} (default: all)")
    parser.add_argument("--rates", type=number(0, above=True), nargs="+", default=RATES, metavar="LR",
                        help=f"learning rates to choose from (default: {' '.join(f'{rate:g}' for rate in RATES)})")
    parser.add_argument("--delays", type=number(0, 1000), nargs="+", default=[1.0, 2.0, 4.0], metavar="D",
                        help="of the second replica, in batch times, beside none (default: 1 2 4)")
    parser.add_argument("--seeds", type=whole(0, SEEDS), nargs="+", default=[0, 1, 2], help="(default: 0 1 2)")
    parser.add_argument("--target", type=number(0, 1, above=True), default=0.5,
                        help="test accuracy that time is counted to (default: %(default)s)")
    parser.add_argument("--data", default="digits", help="digits, cifar10, or a folder of images or parquet")
    parser.add_argument("--model", default=AsynchronousStudy.model, choices=MODELS)
    for name, (least, most, what) in SIZES.items():
        parser.add_argument(f"--{name}", type=whole(least, most), default=getattr(AsynchronousStudy, name),
                            help=f"{what} (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("runs/asynchronous.json"), help="results (default: %(default)s)")
    parser.add_argument("--plot", type=Path, help="picture (default: beside the output)")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Run what is missing, then print and draw all that the output file holds."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    args = parse_arguments(arguments)
    study = AsynchronousStudy(**{f.name: getattr(args, f.name) for f in fields(AsynchronousStudy)})
    plot = args.plot or args.output.with_suffix(".png")
    grid = [AsynchronousSetting(way, rate, 0.0, args.seeds[0]) for rate in args.rates for way in args.ways]
    try:
        check_file("--output", args.output)
        check_picture("--plot", plot)
        for setting in grid:
            parse_block(setting.config(study, 1))
        run = partial(fill, ASYNCHRONOUS, args.output, study, jobs=1)
        best = tuned({setting: of for setting, of in run(grid).runs.items() if setting in grid})
        wanted = [AsynchronousSetting(way, rate, 0.0, seed) for seed in args.seeds for way, rate in best.items()]
        wanted += [AsynchronousSetting(way, rate, delay, args.seeds[0]) for delay in args.delays for way, rate in best.items()
                   if WAYS[way].replicas > 1 and delay]
        results = run(wanted)
    except ConfigError as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
    about = (f"{study.model} of width {study.width}, {study.images or 'all'} images of {Path(study.data).name} at "
             f"{study.image_size}×{study.image_size}, {study.epochs} epochs, micro-batch {study.micro_batch}.")
    print(f"\n{headline(environment(), about)}\n{tables(results.runs, args.target)}")
    draw(results.runs, args.target, plot)
    print(f"\nnumbers: {args.output}\npicture: {plot}")
    if any("error" in results.runs[setting] for setting in [*grid, *wanted]):
        sys.exit(1)


if __name__ == "__main__":
    main()
