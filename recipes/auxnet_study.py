"""Layer-parallel training with an AuxNet on images: accuracy beside backpropagation's, mismatch, and sweeps over its settings.

    python recipes/auxnet_study.py --data FOLDER --images 10000 --stages 2 4 --seeds 0 1 2 --jobs 2
    python recipes/auxnet_study.py --data FOLDER --images 10000 --sweep_share 0.02 0.05 0.1 0.2 --jobs 2

Every run trains with the engine on one rank, where the numbers are those of any number of ranks. Results are written as they
come, and a run that the output file holds already is not repeated; what was swept is drawn beside it.
"""

from __future__ import annotations

if __name__ == "__main__":  # before torch loads OpenMP
    from ds_decoupled.threads import share_cores

    share_cores(tell=False)

import argparse
import sys
from dataclasses import fields
from pathlib import Path

from ds_decoupled.config import parse_block
from ds_decoupled.errors import ConfigError
from ds_decoupled.models import MODELS
from run.options import COUNT, SEEDS, number, whole
from run.places import check_file
from run.tables import environment, headline
from studies.auxnet_report import accuracy_table, draw
from studies.auxnet_settings import METHODS, SWEPT, AuxNetSetting, settings
from studies.image_run import fill, image_kind
from studies.image_settings import ImageStudy

SIZES = {"images": (0, COUNT, "trained on, of those there are; 0 for all"), "width": (1, 4096, "of the first layer"),
         "image_size": (8, 256, "pixels a side"), "epochs": (1, COUNT, "of training"), "micro_batch": (1, COUNT, "images")}
OWN = {"model": "resnet20", "images": 10_000, "epochs": 8, "micro_batch": 32}
"""Of the study, where it differs from the six-layer CNN's."""


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--stages", type=whole(2, 1000), nargs="+", metavar="K", default=[2], help="(default: 2)")
    for name in SWEPT:
        parser.add_argument(f"--{name}", type=number(0, above=True), help=f"auxnet.{name} of every run (default: the method's)")
        parser.add_argument(f"--sweep_{name}", type=number(0, above=True), nargs="+", metavar="VALUE", default=[],
                            help=f"further runs with these values of auxnet.{name}")
    parser.add_argument("--serial_epochs", type=whole(0), nargs="+", default=[0],
                        help="epochs of backpropagation at the end, one run for each number (default: 0)")
    parser.add_argument("--seeds", type=whole(0, SEEDS), nargs="+", default=[0])
    parser.add_argument("--data", default="digits", help="digits, cifar10, or a folder of images or parquet")
    parser.add_argument("--model", default=OWN["model"], choices=MODELS)
    for name, (least, most, what) in SIZES.items():
        parser.add_argument(f"--{name}", type=whole(least, most), default=OWN.get(name, getattr(ImageStudy, name)),
                            help=f"{what} (default: %(default)s)")
    parser.add_argument("--lr", type=number(0, above=True), default=ImageStudy.lr, help="peak (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("runs/auxnet.json"), help="results (default: %(default)s)")
    parser.add_argument("--jobs", type=whole(1, 10_000), default=1, help="runs side by side (default: 1)")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Run what is missing, then print and draw all that the output file holds."""
    args = parse_arguments(arguments)
    study = ImageStudy(**{f.name: getattr(args, f.name) for f in fields(ImageStudy)})
    given = {name: getattr(args, name) for name in SWEPT if getattr(args, name) is not None}
    swept = {name: getattr(args, f"sweep_{name}") for name in SWEPT}
    try:
        wanted = settings(args.methods, args.stages, given, swept, args.serial_epochs, args.seeds)
        check_file("--output", args.output)
        for setting in wanted:
            parse_block(setting.config(study, 1))
        results = fill(image_kind("AuxNet study", AuxNetSetting), args.output, study, wanted, args.jobs)
    except ConfigError as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
    about = (f"{study.model} of width {study.width}, {study.images or 'all'} images of {Path(study.data).name} at "
             f"{study.image_size}×{study.image_size}, {study.epochs} epochs, micro-batch {study.micro_batch}, "
             f"rate {study.lr:g}.")
    print(f"\n{headline(environment(), about)}\n{accuracy_table(results.runs)}\n\nnumbers: {args.output}")
    for name in SWEPT:
        picture = args.output.with_name(f"{args.output.stem}_{name}.png")
        if draw(results.runs, name, picture):
            print(f"picture: {picture}")
    if any("error" in results.runs[setting] for setting in wanted):
        sys.exit(1)


if __name__ == "__main__":
    main()
