"""Methods times ranks in one run on one model, beside bare loops and DeepSpeed's own pipelines.

    python recipes/benchmark.py                       speed: every method at P = 1 and 2, k = 1, 4, 16
    python recipes/benchmark.py --quick               the same on a tiny model, as a check that all of it runs
    python recipes/benchmark.py --model gpt-tiny      speed of a reversible GPT
    python recipes/benchmark.py memory                activations kept, by method
    python recipes/benchmark.py depth                 activations of a GPT against its depth and its stages, with a picture
    python recipes/benchmark.py reconstruction        how exact a rebuilt input is: a RevNet's couplings
    python recipes/benchmark.py precision             the same for a reversible GPT, against its depth
    python recipes/benchmark.py heads                 what heads of stage-local losses cost
    python recipes/benchmark.py codecs                what codecs cost: bytes, error, time beside a stage's forward pass
    python recipes/benchmark.py long --updates 5000   what a rank holds over thousands of updates: all of it should be flat
    python recipes/benchmark.py pace --model resnet18 what a slow rank costs the fast one
    python recipes/benchmark.py sharing               ways to give one model all cores: threads, workers, data parallelism

On CPU, with one core and one thread a rank. All worlds of one k are alive at once and take turns, round by round, so that
noise of the machine hits all alike; ratios are taken within a round, and medians over the rounds. Timings leave out
start-up and the pipeline's fill: methods with a delayed update are timed in their steady state, others by whole calls. Threads
that share a model have all cores, and are timed until they are done: give them many calls (``--methods pd_asgd --calls 50``).
"""

from __future__ import annotations

if __name__ == "__main__":  # before torch loads OpenMP
    from ds_decoupled.threads import share_cores

    share_cores(tell=False)

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import torch

from bench.codecs import codecs
from bench.depth import depth
from bench.heads import heads
from bench.long import long
from bench.memory import memory
from bench.models import GPTS, NAMES, Model, make_model
from bench.pace import PACE_METHODS, pace
from bench.plan import METHODS, SHARING
from bench.precision import DEPTHS, precision
from bench.reconstruction import reconstruction
from bench.sharing import sharing
from bench.speed import speed
from ds_decoupled.config import PRESETS
from ds_decoupled.errors import ConfigError
from run.options import refuse_beyond_memory, refuse_unused, whole
from run.places import check_file, check_picture
from run.results import write_json
from run.tables import environment, headline
from run.worlds import import_once

DEFAULTS: dict[str, Any] = {
    "model": "revnet18", "width": None, "blocks": None, "image_size": 22, "k": [1, 4, 16], "ranks": [1, 2], "repeats": 7,
    "updates": 5000,
}
QUICK = {"width": 8, "image_size": 8, "length": 8, "micro_batch": 4, "repeats": 2, "k": [1, 4], "updates": 20}
SIZES = ("model", "width", "blocks", "image_size", "length", "micro_batch")
FIGURES = {
    "speed": (*SIZES, "k", "ranks", "methods", "repeats", "calls"), "memory": (*SIZES, "k"),
    "depth": ("length", "micro_batch", "width"), "reconstruction": ("width", "image_size", "micro_batch"),
    "precision": ("length", "micro_batch", "width"), "heads": ("model", "width", "image_size", "micro_batch"),
    "codecs": ("width", "image_size", "micro_batch", "repeats"), "long": ("updates", "methods", "ranks"),
    "pace": (*SIZES, "methods", "repeats", "calls"), "sharing": (*SIZES, "methods", "repeats", "calls"),
}
"""Which options each figure takes."""
OF_IMAGES, OF_TEXT = ("image_size",), ("blocks", "length")
"""Sizes that only such models have."""


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("figure", nargs="?", default="speed", choices=list(FIGURES))
    parser.add_argument("--model", choices=NAMES, metavar="MODEL", help=f"of {', '.join(NAMES)} (default: revnet18)")
    parser.add_argument("--width", type=whole(1, 1_000_000),
                        help="channels of the first group, or a GPT's width (default: 64, its size's)")
    parser.add_argument("--blocks", type=whole(1, 10_000), help="a GPT's blocks (default: its size's)")
    parser.add_argument("--image_size", type=whole(8, 100_000), help="pixels a side (default: 22)")
    parser.add_argument("--length", type=whole(1), help="tokens of a sequence (default: 128; depth: 32; precision: 64)")
    parser.add_argument("--micro_batch", type=whole(1),
                        help="images or sequences (default: 32, GPTs: 8; depth and precision: 2)")
    parser.add_argument("--k", type=whole(1), nargs="+", help="micro-batches an update (default: 1 4 16; memory: 1)")
    parser.add_argument("--ranks", type=whole(1), nargs="+", help="pipeline ranks P (default: 1 2)")
    parser.add_argument("--methods", nargs="+", choices=list(dict.fromkeys([*METHODS, *PRESETS])), metavar="METHOD",
                        help=f"of {', '.join(METHODS)} (default: all that are not compiled); long: of {', '.join(PRESETS)} "
                        "(default: all)")
    parser.add_argument("--repeats", type=whole(1), help="rounds (default: 7)")
    parser.add_argument("--calls", type=whole(1), help="train_batch calls a timing at the largest k; at a smaller k as "
                        "many as feed as many micro-batches (default: 1)")
    parser.add_argument("--updates", type=whole(1), help="of every long run (default: 5000)")
    parser.add_argument("--output", type=Path, help="JSON file of all numbers (default: runs/benchmark.json, or the figure's "
                        "name); a picture goes beside it")
    parser.add_argument("--quick", action="store_true", help="a tiny model and two rounds")
    args = parser.parse_args(arguments)
    try:
        _refuse_unused(args)
        _fill_in(args)
        _check(args)
    except ConfigError as error:
        parser.error(str(error))
    if args.figure == "speed" and not model_of(args).streams:
        reversible = [m for m in args.methods if METHODS[m].cost == "reconstruct"]
        args.methods = [m for m in args.methods if m not in reversible]
        print(f"{args.model} has no layer that can be inverted: leaving out {', '.join(reversible)}", file=sys.stderr)
    return args


def _refuse_unused(args: argparse.Namespace) -> None:
    taken = FIGURES[args.figure]
    unused = sorted({name for names in FIGURES.values() for name in names} - set(taken))
    refuse_unused(args, unused, f"{args.figure} takes {', '.join('--' + name for name in taken)}")
    if "model" in taken:
        model = args.model or DEFAULTS["model"]
        refuse_unused(args, list(OF_IMAGES if model in GPTS else OF_TEXT), f"{model} has no such size")
    if args.figure == "memory" and len(args.k or []) > 1:
        raise ConfigError("--k", args.k, "memory is looked at with one k", "Give one number")


def _fill_in(args: argparse.Namespace) -> None:
    small = args.figure in ("depth", "precision")
    model = args.model or DEFAULTS["model"]
    usual = [name for name, method in METHODS.items() if not method.extra]
    methods = {"long": list(PRESETS), "pace": list(PACE_METHODS), "sharing": list(SHARING)}.get(args.figure, usual)
    defaults = DEFAULTS | {"methods": methods, "micro_batch": 2 if small else 8 if model in GPTS else 32,
                           "calls": {"pace": 20, "sharing": 50}.get(args.figure, 1),
                           "length": {"depth": 32, "precision": 64}.get(args.figure, 128)} | (QUICK if args.quick else {})
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)


def _check(args: argparse.Namespace) -> None:
    known = PRESETS if args.figure == "long" else METHODS
    if unknown := [name for name in args.methods if name not in known]:
        raise ConfigError("--methods", unknown[0], f"{args.figure} knows {', '.join(known)}", "Take one of these")
    model = model_of(args)
    with torch.device("meta"):  # without weights
        layers = [spec.build() for spec in model.specs()]
    if args.figure in ("speed", "long") and max(args.ranks) > len(layers):
        raise ConfigError("--ranks", max(args.ranks), f"{args.model} has {len(layers)} layers, and a rank needs one at least")
    weights = sum(parameter.numel() for layer in layers for parameter in layer.parameters())
    refuse_beyond_memory("--width", args.width, 4.0 * weights, "the model's weights")
    sample = args.length if args.model in GPTS or args.figure in ("depth", "precision") else 3 * args.image_size**2
    refuse_beyond_memory("--micro_batch", args.micro_batch, 16.0 * args.micro_batch * sample, "its micro-batches")
    output = output_of(args)
    check_file("--output", output)
    if args.figure == "depth":  # the only one with a picture
        if output.suffix == ".png":
            raise ConfigError("--output", str(output), "the picture would go to the same file", "End its name with .json")
        check_picture("--output", output.with_suffix(".png"))


def output_of(args: argparse.Namespace) -> Path:
    """Where the numbers go."""
    output: Path | None = args.output
    return output or Path("runs") / ("benchmark.json" if args.figure == "speed" else f"{args.figure}.json")


def model_of(args: argparse.Namespace) -> Model:
    """What ``--model`` and its sizes say."""
    return make_model(args.model, args.micro_batch, width=args.width, image_size=args.image_size, length=args.length,
                      blocks=args.blocks)


def figure(args: argparse.Namespace, model: Model, output: Path) -> tuple[str, str, list[dict[str, Any]]]:
    """A figure other than speed: its table, what it is about, all numbers."""
    if args.figure == "memory":
        text, found = memory(model, args.k[0])
        return text, f"{model.describe()}, one stage a block, one rank, k = {args.k[0]}", found
    if args.figure == "depth":
        return depth(args.micro_batch, args.length, args.width or 64, output.with_suffix(".png"), args.quick)
    if args.figure == "heads":
        text, found = heads(args.model, args.width, args.image_size, args.micro_batch)
        return text, "Heads of stage-local losses, one behind every block but the last", found
    if args.figure == "codecs":
        width = args.width or 64
        text, found = codecs("resnet18", width, args.image_size, args.micro_batch, args.repeats)
        return text, f"What a ResNet's block gives: {args.micro_batch} x {width} x {args.image_size} x {args.image_size}", found
    if args.figure == "long":
        text, found = long(args.methods, args.ranks, args.updates)
        return text, f"{args.updates} updates of one micro-batch of 2; numbers of all ranks, by rank", found
    if args.figure == "pace":
        text, found = pace(model, args.methods, args.repeats, args.calls)
        return text, f"{model.describe()}, P = 2, k = 1; medians of {args.repeats} rounds of {args.calls} calls", found
    if args.figure == "sharing":
        text, found = sharing(model, args.methods, args.repeats, args.calls)
        return text, f"{model.describe()}, every batch an update; medians of {args.repeats} rounds of {args.calls} calls", found
    width = args.width or 64
    if args.figure == "precision":
        text, found = precision(args.micro_batch, args.length, width, (1, 2) if args.quick else DEPTHS)
        return text, f"Couplings of a GPT of width {width}; sequences of {args.length}, micro-batch {args.micro_batch}", found
    text, found = reconstruction(width, args.image_size, args.micro_batch)
    return text, "A reversible run at learning rate 0", found


def main(arguments: list[str] | None = None) -> None:
    """Run, print, write."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ["OMP_NUM_THREADS"] = "1"
    import_once("bench.rank")
    args = parse_arguments(arguments)
    model = model_of(args)
    about = model.describe()
    output = output_of(args)
    numbers: dict[str, Any]
    try:
        if args.figure == "speed":
            text, numbers = speed(model, args.methods, args.ranks, args.k, args.repeats, args.calls)
            about = f"{about}; medians of {args.repeats} rounds"
        else:
            text, about, found = figure(args, model, output)
            numbers = {args.figure: found}
    except ConfigError as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
    facts = environment()
    print(f"\n{headline(facts, about)}\n{text}")
    given = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    write_json(output, {"environment": facts, "arguments": given, **numbers})
    print(f"\nnumbers: {output}")


if __name__ == "__main__":
    main()
