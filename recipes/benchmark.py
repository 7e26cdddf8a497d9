"""Methods times ranks in one run on one model, beside bare loops and DeepSpeed's own pipelines.

    python recipes/benchmark.py                       speed: every method at P = 1 and 2, k = 1, 4, 16
    python recipes/benchmark.py --quick               the same on a tiny model, as a check that all of it runs
    python recipes/benchmark.py --model gpt-tiny      speed of a reversible GPT
    python recipes/benchmark.py memory                activations kept, by method
    python recipes/benchmark.py depth                 activations of a GPT against its depth and its stages, with a picture
    python recipes/benchmark.py reconstruction        how exact a rebuilt input is: a RevNet's couplings
    python recipes/benchmark.py precision             the same for a reversible GPT, against its depth

On CPU, with one core and one thread a rank. All worlds of one k are alive at once and take turns, round by round, so that
noise of the machine hits all alike; ratios are taken within a round, and medians over the rounds. Timings leave out
start-up and the pipeline's fill: methods with a delayed update are timed in their steady state, others by whole calls.
"""

from __future__ import annotations

if __name__ == "__main__":  # before torch loads OpenMP
    from ds_decoupled.threads import share_cores

    share_cores(tell=False)

import argparse
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bench_depth
import bench_figures
import bench_heads
import bench_precision
import common
import torch
from bench_models import GPTS, NAMES, Model, make_model
from bench_plan import METHODS, Configuration, configurations, laws
from bench_rank import profile, serve
from bench_report import (
    Measurement,
    as_json,
    environment,
    headline,
    law_table,
    laws_as_json,
    speed_table,
    table,
)
from bench_worlds import World, WorldFailed, worlds
from options import refuse_beyond_memory, refuse_unused, whole
from places import check_file, check_picture
from tqdm import tqdm

from ds_decoupled.errors import ConfigError
from ds_decoupled.schedules import balanced_bounds

DEFAULTS: dict[str, Any] = {
    "model": "revnet18", "width": None, "blocks": None, "image_size": 22, "k": [1, 4, 16], "ranks": [1, 2], "repeats": 7,
    "calls": 1, "methods": [name for name, method in METHODS.items() if not method.extra],
}
QUICK = {"width": 8, "image_size": 8, "length": 8, "micro_batch": 4, "repeats": 2, "k": [1, 4]}
SIZES = ("model", "width", "blocks", "image_size", "length", "micro_batch")
FIGURES = {
    "speed": (*SIZES, "k", "ranks", "methods", "repeats", "calls"), "memory": (*SIZES, "k"),
    "depth": ("length", "micro_batch", "width"), "reconstruction": ("width", "image_size", "micro_batch"),
    "precision": ("length", "micro_batch", "width"), "heads": ("model", "width", "image_size", "micro_batch"),
}
"""Which options each figure heeds."""
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
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), metavar="METHOD",
                        help=f"of {', '.join(METHODS)} (default: all that are not compiled)")
    parser.add_argument("--repeats", type=whole(1), help="rounds (default: 7)")
    parser.add_argument("--calls", type=whole(1), help="train_batch calls a timing at the largest k; at a smaller k as "
                        "many as feed as many micro-batches (default: 1)")
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
    heeded = FIGURES[args.figure]
    unused = sorted({name for names in FIGURES.values() for name in names} - set(heeded))
    refuse_unused(args, unused, f"{args.figure} heeds {', '.join('--' + name for name in heeded)}")
    if "model" in heeded:
        model = args.model or DEFAULTS["model"]
        refuse_unused(args, list(OF_IMAGES if model in GPTS else OF_TEXT), f"{model} has no such size")
    if args.figure == "memory" and len(args.k or []) > 1:
        raise ConfigError("--k", args.k, "memory is looked at with one k", "Give one number")


def _fill_in(args: argparse.Namespace) -> None:
    small = args.figure in ("depth", "precision")
    model = args.model or DEFAULTS["model"]
    defaults = DEFAULTS | {"micro_batch": 2 if small else 8 if model in GPTS else 32,
                           "length": {"depth": 32, "precision": 64}.get(args.figure, 128)} | (QUICK if args.quick else {})
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)


def _check(args: argparse.Namespace) -> None:
    model = model_of(args)
    with torch.device("meta"):  # without weights
        layers = [spec.build() for spec in model.specs()]
    if args.figure == "speed" and max(args.ranks) > len(layers):
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


def measure_layers(start: Callable[..., World], model: Model) -> dict[str, list[float]]:
    """Seconds of every layer, by what ``Method.cost`` names: measured once, so that all are cut by the same numbers."""
    world = start(1, profile, model)
    times: dict[str, list[float]] = world.answers()[0]
    world.end()
    return times


def bounds_for(configuration: Configuration, times: dict[str, list[float]]) -> list[int]:
    """The layers at which ranks begin, balanced by what they cost under this method."""
    method = METHODS[configuration.method]
    parts = configuration.ranks * (2 if method.runner == "dualpipev" else 1)
    return balanced_bounds(times[method.cost], parts)


def measure(start: Callable[..., World], model: Model, chosen: list[Configuration], times: dict[str, list[float]],
            micro_batches: int, repeats: int) -> dict[Configuration, Measurement]:
    """Start a world for each configuration, time them in turns, then look at their memory."""
    measured = {c: Measurement(bounds=bounds_for(c, times)) for c in chosen}
    alive: dict[Configuration, World] = {}
    bar = tqdm(total=(repeats + 2) * len(chosen), unit="timing")

    def attempt(c: Configuration, action: Callable[[Configuration], object]) -> None:
        bar.set_postfix_str(str(c))
        try:
            action(c)
        except WorldFailed as error:
            measured[c].error = str(error)
            alive.pop(c).end()
            bar.write(f"{c} failed: {error}")
        bar.update()

    def begin(c: Configuration) -> None:
        alive[c] = start(c.ranks, serve, c, model, measured[c].bounds)
        alive[c].answers()

    def time_once(c: Configuration) -> None:
        calls = math.ceil(micro_batches / c.k)
        copies = c.ranks if METHODS[c.method].copies else 1
        measured[c].add(alive[c].ask("time", calls), copies * calls * c.k * model.micro_batch)

    def watch(c: Configuration) -> None:
        measured[c].watched = alive[c].ask("watch", 1)

    for c in chosen:
        attempt(c, begin)
    for _ in range(repeats):
        for c in chosen:
            if c in alive:
                attempt(c, time_once)
            if c not in alive:
                measured[c].rates.append(None)
    for c in list(alive):
        attempt(c, watch)
    for world in alive.values():
        world.end()
    bar.close()
    return measured


def speed(args: argparse.Namespace, model: Model) -> tuple[str, dict[str, Any]]:
    """The tables and all numbers."""
    measured: dict[Configuration, Measurement] = {}
    with worlds() as start:
        times = measure_layers(start, model)
        for k in args.k:
            chosen = configurations(args.methods, args.ranks, k, layers=len(model.specs()))
            measured |= measure(start, model, chosen, times, args.calls * max(args.k), args.repeats)
    rules = [law for ranks in args.ranks for k in args.k for law in laws(ranks, k)]
    cuts: dict[tuple[str, ...], list[str]] = {}
    for c, m in measured.items():
        if c.ranks > 1 and not METHODS[c.method].copies:
            cost = times[METHODS[c.method].cost]
            shares = [sum(cost[a:b]) / sum(cost) for a, b in zip(m.bounds, m.bounds[1:])]
            row = str(c.ranks), str(m.bounds), " / ".join(f"{share:.1%}" for share in shares)
            cuts.setdefault(row, []).append(c.label)
    partitions = table(["methods", "P", "ranks begin at layers", "share of the measured time"],
                       ([", ".join(dict.fromkeys(labels)), *row] for row, labels in cuts.items()))
    text = "\n\n".join([speed_table(measured), law_table(measured, rules), partitions])
    return text, {"measured": as_json(measured), "laws": laws_as_json(measured, rules), "layer_seconds": times}


def figure(args: argparse.Namespace, model: Model, output: Path) -> tuple[str, str, list[dict[str, Any]]]:
    """A figure other than speed: its table, what it is about, all numbers."""
    if args.figure == "memory":
        text, found = bench_figures.memory(model, args.k[0])
        return text, f"{model.describe()}, one stage a block, one rank, k = {args.k[0]}", found
    if args.figure == "depth":
        picture = output.with_suffix(".png")
        return bench_depth.depth(args.micro_batch, args.length, args.width or 64, picture, args.quick)
    if args.figure == "heads":
        text, found = bench_heads.heads(args.model, args.width, args.image_size, args.micro_batch)
        return text, "Heads of stage-local losses, one behind every block but the last", found
    width = args.width or 64
    if args.figure == "precision":
        depths = (1, 2) if args.quick else bench_precision.DEPTHS
        text, found = bench_precision.precision(args.micro_batch, args.length, width, depths)
        return text, f"Couplings of a GPT of width {width}; sequences of {args.length}, micro-batch {args.micro_batch}", found
    text, found = bench_figures.reconstruction(width, args.image_size, args.micro_batch)
    return text, "A reversible run at learning rate 0", found


def main(arguments: list[str] | None = None) -> None:
    """Run, print, write."""
    args = parse_arguments(arguments)
    model = model_of(args)
    about = model.describe()
    output = output_of(args)
    numbers: dict[str, Any]
    try:
        if args.figure == "speed":
            text, numbers = speed(args, model)
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
    common.write_json(output, {"environment": facts, "arguments": {n: str(v) if isinstance(v, Path) else v
                                                                   for n, v in vars(args).items()}, **numbers})
    print(f"\nnumbers: {output}")


if __name__ == "__main__":
    main()
