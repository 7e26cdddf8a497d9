"""The README's main job beside other programs that keep cores busy: seconds an update, by how its threads wait.

    python recipes/busy_neighbour.py              petra and backprop, P = 1 and 2, beside no, one and two busy programs
    python recipes/busy_neighbour.py --quick      one round of one update each, as a check that all of it runs

Ways to start the same job:

- ``default``: as torch is without anybody's word: a thread a core, shared among the ranks, which waits by spinning;
- ``shared``: as the recipes start it (:mod:`ds_decoupled.threads`): the same number of threads, which wait without spinning;
- ``pinned``: the same, and each rank stays on its share of the cores, as with ``deepspeed --bind_cores_to_rank`` (which needs
  numactl; the pinning is done here without it); on several ranks alone;
- ``brief spin``: as ``shared``, but a thread spins a thousand turns before it sleeps;
- ``one thread`` in each rank, which waits for nobody.

All ways of one job are alive at once and take turns, round by round; the busy programs are loops that this script starts and
stops. Data lie in memory, and what is timed is the steady state.
"""

from __future__ import annotations

if __name__ == "__main__":  # before torch loads OpenMP
    from ds_decoupled.threads import share_cores

    share_cores(tell=False)

import argparse
import os
import sys
from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm

from bench.neighbour import CONFIGS, WAYS, Timed, jobs_of, measure, report
from ds_decoupled.errors import ConfigError
from ds_decoupled.threads import usable_cores
from run.options import whole
from run.places import check_file
from run.results import write_json
from run.tables import environment
from run.worlds import WorldFailed


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    of_images = sorted(path.stem for path in CONFIGS.glob("*.json") if not path.stem.endswith("_lm"))
    parser.add_argument("--methods", nargs="+", default=["petra", "backprop"], choices=of_images, metavar="METHOD",
                        help="whose JSON stands in ds_configs (default: petra backprop)")
    parser.add_argument("--ranks", type=whole(1), nargs="+", default=[1, 2], help="pipeline ranks P (default: 1 2)")
    parser.add_argument("--neighbours", type=whole(0, 1000), nargs="+", default=[0, 1, 2],
                        help="busy programs beside the job (default: 0 1 2)")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS, metavar="WAY",
                        help=f"of {', '.join(WAYS)} (default: all)")
    parser.add_argument("--width", type=whole(1, 10_000), default=16, help="channels of the first group (default: 16)")
    parser.add_argument("--image_size", type=whole(8, 10_000), default=16, help="pixels a side (default: 16)")
    parser.add_argument("--rounds", type=whole(1), default=3, help="of which the median is shown (default: 3)")
    parser.add_argument("--seconds", type=whole(0, 1000), default=1, help="about so many a timing (default: 1)")
    parser.add_argument("--output", type=Path, default=Path("runs/busy_neighbour.json"), help="numbers (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="one round of one update each, of a smaller model")
    args = parser.parse_args(arguments)
    if args.quick:
        args.rounds, args.seconds, args.width, args.image_size = 1, 0, 4, 8
    return args


def main(arguments: list[str] | None = None) -> None:
    """Time, print, write."""
    args = parse_arguments(arguments)
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    cores = usable_cores()
    found: list[Timed] = []
    try:
        check_file("--output", args.output)
        grid = [jobs_of(args.ways, method, ranks, cores, args.width, args.image_size)
                for method in args.methods for ranks in args.ranks]
        with tqdm(total=sum(map(len, grid)) * args.rounds * len(args.neighbours), unit="timing") as bar:
            for jobs in grid:
                found += measure(jobs, args.neighbours, args.rounds, args.seconds, cores, bar)
    except (ConfigError, WorldFailed) as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
    facts = environment()
    print(f"\nrevnet18 at width {args.width}, {args.image_size} x {args.image_size} images, k and micro-batch of ds_configs; "
          f"medians of {args.rounds} rounds\n\n{facts['date']}, {cores} cores of {facts['cpu']}, torch {facts['torch']}, "
          f"DeepSpeed {facts['deepspeed']}\n\n    {facts['command']}\n\n{report(args.neighbours, found)}")
    write_json(args.output, {"environment": facts, "measured": [asdict(timed) for timed in found]})
    print(f"\nnumbers: {args.output}")


if __name__ == "__main__":
    main()
