"""Asynchronous and quantized greedy learning on images, as in the paper's experiments: accuracy of a six-layer CNN.

    python recipes/image_study.py delays --data FOLDER --jobs 2
    python recipes/image_study.py compression --data FOLDER --jobs 2

``delays`` slows one stage at a time by S (turns are drawn, the slowed one's more rarely), with replay rings of M micro-batches.
``compression`` sends and keeps activations by every codec, for the synchronous and the asynchronous method. Every run trains
with the engine on one rank, where the numbers are those of any number of ranks. Results are written as they come, and a run
that the output file holds already is not repeated.
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
from run.options import COUNT, SEEDS, number, refuse_unused, whole
from run.places import check_file, check_picture
from run.tables import environment, headline
from studies.image_report import codec_table, delay_table, draw
from studies.image_run import fill, image_kind
from studies.image_settings import CODECS, ImageSetting, ImageStudy, J, compression, delays

SIZES = {"images": (0, COUNT, "trained on, of those there are; 0 for all"), "width": (1, 4096, "of the first layer"),
         "image_size": (8, 256, "pixels a side"), "epochs": (1, COUNT, "of every stage"), "micro_batch": (1, COUNT, "images")}
OF_DELAYS = {"slow_down": [1.0, 1.1, 1.2, 1.5, 2.0], "sizes": [1, 10, 50], "stages": list(range(J))}
OF_COMPRESSION = {"codecs": list(CODECS), "size": 10, "slow": 1.2}


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("figure", choices=("delays", "compression"))
    parser.add_argument("--slow_down", type=number(1, 1000), nargs="+", metavar="S", help="delays: (default: 1 1.1 1.2 1.5 2)")
    parser.add_argument("--sizes", type=whole(1), nargs="+", metavar="M", help="delays: of the rings (default: 1 10 50)")
    parser.add_argument("--stages", type=whole(0, J - 1), nargs="+", help="delays: slowed one at a time (default: each)")
    parser.add_argument("--codecs", nargs="+", choices=list(CODECS), metavar="CODEC",
                        help=f"compression: of {', '.join(map(repr, CODECS))} (default: all)")
    parser.add_argument("--size", type=whole(1), metavar="M", help="compression: of the rings (default: 10)")
    parser.add_argument("--slow", type=number(1, 1000), metavar="S", help="compression: of the third stage (default: 1.2)")
    parser.add_argument("--seeds", type=whole(0, SEEDS), nargs="+", default=[0])
    parser.add_argument("--data", default="digits", help="digits, cifar10, or a folder of images or parquet")
    for name, (least, most, what) in SIZES.items():
        parser.add_argument(f"--{name}", type=whole(least, most), default=getattr(ImageStudy, name),
                            help=f"{what} (default: %(default)s)")
    parser.add_argument("--lr", type=number(0, above=True), default=ImageStudy.lr, help="peak (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="results (default: runs/FIGURE.json)")
    parser.add_argument("--plot", type=Path, help="delays: picture (default: beside the output)")
    parser.add_argument("--jobs", type=whole(1, 10_000), default=1, help="runs side by side (default: 1)")
    return parser.parse_args(arguments)


def settings_of(args: argparse.Namespace) -> list[ImageSetting]:
    """Every run of the figure."""
    others, own = (OF_COMPRESSION, OF_DELAYS) if args.figure == "delays" else (OF_DELAYS | {"plot": None}, OF_COMPRESSION)
    refuse_unused(args, list(others), f"{args.figure} has no such thing", "Leave it out")
    for name, default in own.items():
        if getattr(args, name) is None:
            setattr(args, name, default)
    if args.figure == "delays":
        return delays(args.slow_down, args.sizes, args.stages, args.seeds)
    return compression(args.codecs, args.size, args.slow, args.seeds)


def main(arguments: list[str] | None = None) -> None:
    """Run what is missing, then print (and draw) all that the output file holds."""
    args = parse_arguments(arguments)
    output = args.output or Path("runs") / f"{args.figure}.json"
    plot = args.plot or output.with_suffix(".png")
    study = ImageStudy(**{f.name: getattr(args, f.name) for f in fields(ImageStudy) if f.name != "model"})
    try:
        wanted = settings_of(args)
        check_file("--output", output)
        check_picture("--plot", plot)
        for setting in wanted:
            parse_block(setting.config(study, 1))
        results = fill(image_kind("image study", ImageSetting), output, study, wanted, args.jobs)
    except ConfigError as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
    about = (f"Six-layer CNN of width {study.width}, {study.images or 'all'} images of {Path(study.data).name} at "
             f"{study.image_size}×{study.image_size}, {study.epochs} epochs of each stage, micro-batch {study.micro_batch}.")
    print(f"\n{headline(environment(), about)}\n{(delay_table if args.figure == 'delays' else codec_table)(results.runs)}")
    print(f"\nnumbers: {output}")
    if args.figure == "delays":
        draw(results.runs, plot, "One stage slowed by S, replay rings of M")
        print(f"picture: {plot}")
    if any("error" in results.runs[setting] for setting in wanted):
        sys.exit(1)


if __name__ == "__main__":
    main()
