"""What delay costs a language model: validation loss of a small reversible GPT by stages, hops, k, method and optimizer.

    python recipes/delay_study.py --data shakespeare.txt --jobs 2
    python recipes/delay_study.py --data shakespeare.txt --methods petra backprop --stages 8 --seeds 0 1 2

Every run trains with the engine on one rank, where the numbers are those of any number of ranks. Results are written as they
come, and a run that the output file holds already is not repeated: call it again with other options to fill a table up.
"""

from __future__ import annotations

if __name__ == "__main__":  # before torch loads OpenMP
    from ds_decoupled.threads import share_cores

    share_cores(tell=False)

import argparse
import itertools
import json
import sys
from dataclasses import fields
from pathlib import Path

from data.text import read_text
from data.tokens import Bytes
from data.windows import Corpus
from ds_decoupled.config import PRESETS, parse_block
from ds_decoupled.errors import ConfigError
from ds_decoupled.threads import usable_cores
from run.options import COUNT, SEEDS, number, refuse_beyond_memory, refuse_unused, whole
from run.places import check_file, check_picture
from run.tables import environment, headline
from studies.one_run import train_alone
from studies.report import draw, tables
from studies.results import Kind, Results
from studies.settings import OPTIMIZERS, Setting, Study

SIZES = {
    "micro_batches": ("to train on", COUNT), "blocks": ("of two half-blocks", 10_000), "width": ("of each stream", 1_000_000),
    "heads": ("of attention", 1_000_000), "sequence": ("bytes", COUNT), "micro_batch": ("sequences", COUNT),
    "eval_micro_batches": ("to validate on", COUNT),
    "probe_every": ("micro-batches between two looks at what petra rebuilds", COUNT),
}
"""What all runs share, and the most that is taken of each."""
GRID = {"stages": [2, 4, 8], "hops": ["0,1"], "lr_by_delay": [0], "block": ["{}"]}
"""What the grid goes through, unless told otherwise; not every method knows each."""
LEARNING_RATE = {"adamw": 1e-3, "muon": 1e-3, "nadam": 1e-3, "soap": 3e-3}


DELAYS = Kind("delay study", Study, lambda held: Setting(**{**held, "hops": tuple(held["hops"])}), train_alone,
              "validation_loss", lambda run: f"{run['validation_loss']:.3f} nats")


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    grid = parser.add_argument_group("the grid: every combination is a run")
    grid.add_argument("--methods", nargs="+", default=["backprop", "petra", "dsp", "delayed"], choices=sorted(PRESETS))
    grid.add_argument("--stages", type=whole(1), nargs="+", metavar="J", help="with the embedding in the first "
                      "and the head in the last one; two more than half-blocks: as stages of their own (default: 2 4 8)")
    grid.add_argument("--hops", nargs="+", metavar="A,B", help="forward, backward (default: 0,1)")
    grid.add_argument("--k", type=whole(1), nargs="+", default=[1], help="micro-batches an update (default: 1)")
    grid.add_argument("--optimizers", nargs="+", default=["muon", "adamw"],
                      help=f"of {', '.join(OPTIMIZERS)}, or import paths (default: muon adamw)")
    grid.add_argument("--lr", type=number(0), nargs="+", help="peak (default: the optimizer's own, 1e-3 for most)")
    grid.add_argument("--embedding_std", type=number(0, above=True), nargs="+", default=[0.3],
                      help="scale of the streams (default: 0.3)")
    grid.add_argument("--lr_by_delay", type=whole(0), nargs="+", help="updates of damping (default: 0, none)")
    grid.add_argument("--params", nargs="+", default=["{}"], help="further parameters of the optimizer, as JSON")
    grid.add_argument("--block", nargs="+", help="further settings of the decoupled block, as JSON")
    grid.add_argument("--seeds", type=whole(0, SEEDS), nargs="+", default=[0])
    study = parser.add_argument_group("what all runs share")
    study.add_argument("--data", default="topics", help="topics (of Python's documentation), a text file or a folder of them")
    for name, (what, most) in SIZES.items():
        study.add_argument(f"--{name}", type=whole(1, most), default=getattr(Study, name),
                           help=f"{what} (default: %(default)s)")
    study.add_argument("--warmup", type=number(0, 1), default=Study.warmup, help="share of all updates (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("runs/delay_study.json"), help="results (default: %(default)s)")
    parser.add_argument("--plot", type=Path, help="picture (default: beside the output)")
    parser.add_argument("--jobs", type=whole(1, 10_000), default=1, help="runs side by side (default: 1)")
    parser.add_argument("--threads", type=whole(1, 10_000), help="of each run (default: cores / jobs)")
    return parser.parse_args(arguments)


def settings_of(args: argparse.Namespace) -> list[Setting]:
    """Every combination once; backpropagation, which all are compared with, first."""
    flushing = [method for method in args.methods if PRESETS[method].flush]
    if len(flushing) == len(args.methods):
        refuse_unused(args, ["hops", "lr_by_delay", "block"], f"{', '.join(flushing)} update all at once, as they are",
                      "Add a method with delayed updates")
    if args.methods == ["backprop"]:
        refuse_unused(args, ["stages"], "backprop has the same numbers for every J", "Add another method")
    for name, default in GRID.items():
        if getattr(args, name) is None:
            setattr(args, name, default)
    for option, texts, example in (("--params", args.params, '{"momentum": 0.9}'),
                                   ("--block", args.block, '{"head": "shared"}')):
        for text in texts:
            try:
                if not isinstance(json.loads(text), dict):
                    raise ValueError("not an object")
            except ValueError as error:
                raise ConfigError(option, text, f"a JSON object is needed ({error})", f"For example {example}") from error
    hops = []
    for text in args.hops:
        parts = text.split(",")
        if len(parts) != 2 or not all(part.isdigit() for part in parts):
            raise ConfigError("--hops", text, "two whole numbers with a comma between them", "For example 0,1 or 1,1")
        hops.append((int(parts[0]), int(parts[1])))
    grid = itertools.product(args.seeds, args.optimizers, args.k, args.methods, args.stages, hops, args.embedding_std,
                             args.lr_by_delay, args.params, args.block)
    found = [Setting(method, stages, hop, k, optimizer, lr, std, fade, params, seed, block).simplified()
             for seed, optimizer, k, method, stages, hop, std, fade, params, block in grid
             for lr in args.lr or [LEARNING_RATE.get(optimizer, 1e-3)]]
    return sorted(dict.fromkeys(found), key=lambda setting: setting.method != "backprop")


def check_study(args: argparse.Namespace, study: Study) -> None:
    """Refuse what every run would fail with, and what could not be written in the end."""
    if study.width % (2 * study.heads):
        raise ConfigError("--heads", study.heads, f"they must divide the width {study.width} into even parts")
    if study.micro_batches < max(args.k):
        raise ConfigError("--micro_batches", study.micro_batches, f"an update takes up to k = {max(args.k)}", "Give more")
    refuse_beyond_memory("--width", study.width, 4.0 * study.blocks * 12 * study.width**2, "the model's weights")
    refuse_beyond_memory("--micro_batch", study.micro_batch, 4.0 * study.micro_batch * study.sequence * study.width,
                         "one activation of a micro-batch")
    Corpus.of(read_text(study.data), Bytes(), study.sequence)
    check_file("--output", args.output)
    check_picture("--plot", args.plot or args.output.with_suffix(".png"))
    if args.output == (args.plot or args.output.with_suffix(".png")):
        raise ConfigError("--output", str(args.output), "the picture would go to the same file", "End its name with .json")


def main(arguments: list[str] | None = None) -> None:
    """Run what is missing, then print and draw all that the output file holds."""
    args = parse_arguments(arguments)
    study = Study(**{f.name: getattr(args, f.name) for f in fields(Study)})
    cores = usable_cores()
    try:
        wanted = settings_of(args)
        results = Results(args.output, study, DELAYS)
        for setting in wanted:
            parse_block(setting.config(study))  # also refuses numbers of stages that the model does not have
        check_study(args, study)
        missing = results.missing(wanted)
        results.execute(missing, study.micro_batches, args.jobs, args.threads or max(1, cores // args.jobs))
    except ConfigError as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
    about = (f"Reversible GPT of {study.blocks} blocks, width {study.width}, sequences of {study.sequence} bytes, micro-batch "
             f"{study.micro_batch}, {study.micro_batches} micro-batches, on {Path(study.data).name}.")
    print(f"\n{headline(environment(), about)}\n{tables(results.runs)}")
    plot = args.plot or args.output.with_suffix(".png")
    draw(results.runs, plot)
    print(f"\nnumbers: {args.output}\npicture: {plot}")
    if any("error" in results.runs[setting] for setting in wanted):
        sys.exit(1)


if __name__ == "__main__":
    main()
