"""A slow replica beside a fast one: what each exchange makes of it, against synchronous data parallelism.

    python recipes/straggler_study.py                       on the digits
    python recipes/straggler_study.py --data CIFAR --images 20000

Two replicas of a six-layer CNN, a core each. Every batch of the second takes ``d`` batch times longer. ``gossip`` and
``average`` (LAPSGD) let the fast one go on, ``allreduce`` and ``synchronous`` (DeepSpeed's own engine) do not. All runs train
on as many micro-batches in all; who does not wait does as many of them as the law says. Results are written as they come, and
a run that the output file holds already is not repeated.
"""

from __future__ import annotations

if __name__ == "__main__":  # before torch loads OpenMP
    from ds_decoupled.threads import share_cores

    share_cores(tell=False)

import argparse
import os
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import fields
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from ds_decoupled.config import parse_block
from ds_decoupled.errors import ConfigError
from run.options import COUNT, SEEDS, number, whole
from run.places import check_file
from run.tables import environment, headline, table
from studies.image_run import decode
from studies.results import Kind, Results
from studies.straggler_run import LINES, Straggler, StragglerStudy, law, train_replica

SIZES = {"images": (0, COUNT, "trained on, of those there are; 0 for all"), "width": (1, 4096, "of the first layer"),
         "image_size": (8, 256, "pixels a side"), "micro_batch": (1, COUNT, "images"),
         "micro_batches": (2, COUNT, "of both replicas together")}


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lines", nargs="+", choices=list(LINES), default=list(LINES), metavar="LINE",
                        help=f"of {', '.join(LINES)} (default: all)")
    parser.add_argument("--delays", type=number(0, 1000), nargs="+", default=[0.0, 1.0, 2.0, 4.0], metavar="D",
                        help="batch times (default: 0 1 2 4)")
    parser.add_argument("--seeds", type=whole(0, SEEDS), nargs="+", default=[0])
    parser.add_argument("--data", default="digits", help="digits, cifar10, or a folder of images or parquet")
    for name, (least, most, what) in SIZES.items():
        parser.add_argument(f"--{name}", type=whole(least, most), default=getattr(StragglerStudy, name),
                            help=f"{what} (default: %(default)s)")
    parser.add_argument("--lr", type=number(0, above=True), default=StragglerStudy.lr, help="peak (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("runs/stragglers.json"), help="results (default: %(default)s)")
    return parser.parse_args(arguments)


def report(runs: Mapping[Straggler, Mapping[str, Any]]) -> str:
    """A row a line and delay: speed, in samples/s and against the law, and accuracy; means over seeds."""
    found: dict[tuple[str, float], list[Mapping[str, Any]]] = {}
    for setting, run in runs.items():
        if "test_accuracy" in run:
            found.setdefault((setting.line, setting.delay), []).append(run)
    rows = []
    for (line, delay), of in sorted(found.items(), key=lambda item: (item[0][1], list(LINES).index(item[0][0]))):
        rate = fmean(run["samples_per_second"] for run in of)
        base = found.get(("synchronous", delay))
        over = "–" if base is None else f"{rate / fmean(run['samples_per_second'] for run in base):.2f}"
        accuracy = [100 * run["test_accuracy"] for run in of]
        spread = f" ± {stdev(accuracy):.1f}" if len(accuracy) > 1 else ""
        rows.append([f"{line}, d = {delay:g}", f"{rate:.0f}", f"{fmean(run['batches_per_batch_time'] for run in of):.2f}", over,
                     f"{law(delay):.2f}" if line in ("gossip", "average") else "1", f"{fmean(accuracy):.1f}{spread}"])
    return table(["exchange", "samples/s", "batches in a batch time", "/ synchronous", "law", "test accuracy of the mean, %"],
                 rows)


def main(arguments: list[str] | None = None) -> None:
    """Run what is missing, then print all that the output file holds."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    args = parse_arguments(arguments)
    study = StragglerStudy(**{f.name: getattr(args, f.name) for f in fields(StragglerStudy)})
    wanted = [Straggler(line, delay, seed) for delay in args.delays for line in args.lines for seed in args.seeds]
    try:
        check_file("--output", args.output)
        for setting in wanted:
            parse_block(setting.config(study))
        with tempfile.TemporaryDirectory() as folder:
            images = Path(folder, "images.pt")
            kind = Kind("straggler study", StragglerStudy, lambda held: Straggler(**held),
                        partial(train_replica, images=str(images)), "test_accuracy",
                        lambda run: f"{run['samples_per_second']:.0f} samples/s, {run['test_accuracy']:.2%}", ranks=2)
            results = Results(args.output, study, kind)
            if missing := results.missing(wanted):
                decode(study.data, study.images, study.image_size, images)
                results.execute(missing, study.micro_batches, jobs=1, threads=1)
    except ConfigError as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
    about = (f"Two replicas of a six-layer CNN of width {study.width}, {study.images or 'all'} images of "
             f"{Path(study.data).name} at {study.image_size}×{study.image_size}, micro-batch {study.micro_batch}, "
             f"{study.micro_batches} micro-batches in all.")
    print(f"\n{headline(environment(), about)}\n{report(results.runs)}\n\nnumbers: {args.output}")
    if any("error" in results.runs[setting] for setting in wanted):
        sys.exit(1)


if __name__ == "__main__":
    main()
