"""Training over a cable that is too slow: samples/s of methods behind 1 Gb/s, 100 Mb/s and no limit. Needs root, and Linux.

    sudo python recipes/limited_link.py           DeepSpeed's 1F1B, petra and dgl, as they are and in int8
    sudo python recipes/limited_link.py --quick   a tiny model, one round, as a check that all of it runs
    sudo python recipes/limited_link.py --methods 1f1b petra:bf16 --mbits 300

Two ranks, each in a network namespace of its own; the two are joined by a pair of virtual Ethernet interfaces, at either end
of which the kernel's token bucket lets so many bits a second through. Namespaces and interfaces are gone when this ends,
however it ends; what a killed run could not remove, the next one does. All methods are alive at once and take turns, each
behind one speed after another, round by round; ratios are taken within a round, and medians over the rounds. One thread and one
core a rank.
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

from bench.limited import as_json, look_at, measure, read_method, report
from bench.models import GPTS, NAMES, Model, make_model
from bench.namespaces import NoNamespaces, cable
from bench.plan import Configuration
from bench.speed import measure_layers
from ds_decoupled.errors import ConfigError
from run.options import refuse_unused, whole
from run.places import check_file
from run.results import write_json
from run.tables import environment, headline
from run.worlds import WorldFailed, import_once

METHODS = ["1f1b", "petra", "petra:int8", "dgl", "dgl:int8"]
QUICK: dict[str, Any] = {"width": 8, "image_size": 8, "micro_batch": 4, "rounds": 1, "calls": 1}
DEFAULTS: dict[str, Any] = {"width": None, "image_size": 22, "rounds": 7, "calls": 3}


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=METHODS, metavar="METHOD[:CODEC]",
                        help=f"as benchmark.py names them, with the codec of their links (default: {' '.join(METHODS)})")
    parser.add_argument("--mbits", type=whole(1, 1_000_000), nargs="+", default=[1000, 100], metavar="MBITS",
                        help="megabits a second in each direction, beside no limit (default: 1000 100)")
    parser.add_argument("--model", choices=NAMES, default="revnet18", metavar="MODEL", help="(default: revnet18)")
    parser.add_argument("--width", type=whole(1, 1_000_000),
                        help="channels of the first group, or a GPT's width (default: 64, its size's)")
    parser.add_argument("--image_size", type=whole(8, 100_000), help="pixels a side (default: 22)")
    parser.add_argument("--micro_batch", type=whole(1), help="images or sequences (default: 32, GPTs: 8)")
    parser.add_argument("--k", type=whole(1), default=4, help="micro-batches an update (default: 4)")
    parser.add_argument("--rounds", type=whole(1), help="of which the median is shown (default: 7)")
    parser.add_argument("--calls", type=whole(1), help="of train_batch a timing (default: 3)")
    parser.add_argument("--output", type=Path, default=Path("runs/limited_link.json"), help="numbers (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="a tiny model and one round")
    args = parser.parse_args(arguments)
    if args.model in GPTS:
        refuse_unused(args, ["image_size"], f"{args.model} has no such size")
    for name, value in (DEFAULTS | {"micro_batch": 8 if args.model in GPTS else 32} | (QUICK if args.quick else {})).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


def chosen(args: argparse.Namespace) -> tuple[Model, list[Configuration]]:
    """What the arguments say. Raises :class:`ConfigError`."""
    check_file("--output", args.output)
    model = make_model(args.model, args.micro_batch, width=args.width, image_size=args.image_size)
    layers = len(model.specs())
    return model, list(dict.fromkeys(read_method(text, args.k, layers) for text in args.methods))


def main(arguments: list[str] | None = None) -> None:
    """Time, print, write."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ["OMP_NUM_THREADS"] = "1"
    import_once("bench.rank")
    try:
        args = parse_arguments(arguments)
        model, methods = chosen(args)
        speeds = [None, *dict.fromkeys(args.mbits)]
        with cable() as laid:
            link = look_at(laid, speeds)
            found = measure(laid, model, methods, measure_layers(model), speeds, args.rounds, args.calls)
    except (ConfigError, NoNamespaces, WorldFailed) as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
    facts = environment()
    about = f"{model.describe()}; two ranks, k = {args.k}; medians of {args.rounds} rounds"
    print(f"\n{headline(facts, about)}\n{report(found, link)}")
    cables = [{"mbits": speed, "measured": value} for speed, value in link.items()]
    write_json(args.output, {"environment": facts, "cable": cables, "measured": as_json(found)})
    print(f"\nnumbers: {args.output}")


if __name__ == "__main__":
    main()
