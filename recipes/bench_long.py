"""Long runs: what a rank holds after hundreds and after thousands of updates, under every method. All of it should be flat.

    OMP_NUM_THREADS=1 python recipes/bench_long.py --updates 5000

Resident memory, the messages that links hold, file handles and threads of every rank, with a fitted slope of the memory.
"""

from __future__ import annotations

import argparse
import itertools
import os
import threading
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from bench_models import make_model
from bench_report import table
from bench_worlds import WorldFailed, worlds
from common import write_json
from torch import nn
from tqdm import tqdm

import ds_decoupled
from ds_decoupled.config import PRESETS
from ds_decoupled.models import next_token_loss

MIB = 1 << 20
REVERSIBLE_NETS = {"revnet": ("revnet18", {"width": 4, "image_size": 8}), "gpt": ("gpt-tiny", {"width": 16, "length": 16})}
SAMPLES = 50
"""Times that a rank looks at itself over the run."""


@dataclass(frozen=True)
class Look:
    """What one rank held after so many updates."""

    update: int
    resident: int
    handles: int
    threads: int
    sent: int
    arrived: int
    queued: int


def watch(pipe: Connection, method: str, net: str, updates: int) -> None:
    """Train, look, report: a rank's task."""
    name, sizes = REVERSIBLE_NETS[net]
    model = make_model(name, 2, **sizes)
    config = {"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 1, "steps_per_print": 1 << 30,
              "optimizer": {"type": "SGD", "params": {"lr": 1e-5, "momentum": 0.9}},
              "decoupled": {"method": method, "stages": "blocks"}}
    module = ds_decoupled.DecoupledPipelineModule(model.specs(), config=config, sample_input=next(model.batches())[0],
                                                  loss_fn=next_token_loss if net == "gpt" else nn.CrossEntropyLoss())
    engine, *_ = ds_decoupled.initialize(model=module, config=config, model_parameters=list(module.parameters()))
    batches = model.batches()
    looks = []
    every = max(1, updates // SAMPLES)
    for update in range(1, updates + 1):
        engine.train_batch(batches)
        if update % every == 0:
            looks.append(asdict(_look(engine, update)))
            if update % (10 * every) == 0 and method != "backprop":
                engine.eval_batch(batches, num_micro_batches=1)
    if hasattr(engine, "network"):
        engine.drain()
        looks.append(asdict(_look(engine, updates + 1)))
    pipe.send(("watched", looks))


def _look(engine: Any, update: int) -> Look:
    held = engine.network.held() if hasattr(engine, "network") else {"sent": 0, "arrived": 0, "queued": 0}
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return Look(update, resident, len(os.listdir("/proc/self/fd")), threading.active_count(),
                held["sent"], held["arrived"], held["queued"])


def slope(looks: list[dict[str, int]]) -> float:
    """Bytes of resident memory an update, fitted over the second half of the run."""
    half = looks[len(looks) // 2:]
    x, y = ([float(look[name]) for look in half] for name in ("update", "resident"))
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y)) / max(1.0, sum((a - mean_x) ** 2 for a in x))


def row(method: str, net: str, ranks: int, looks: list[list[dict[str, int]]]) -> list[str]:
    """One line of the table; numbers of all ranks, by rank."""
    def by_rank(text: Any) -> str:
        return " / ".join(str(text(of_rank)) for of_rank in looks)

    early = [next(look for look in of_rank if look["update"] >= of_rank[-1]["update"] // 10) for of_rank in looks]
    late = [of_rank[-2] if len(of_rank) > 1 else of_rank[-1] for of_rank in looks]

    def pairs(name: str, unit: int = 1) -> str:
        return " / ".join(f"{a[name] // unit}–{b[name] // unit}" for a, b in zip(early, late))

    most = by_rank(lambda of_rank: "+".join(str(max(look[name] for look in of_rank)) for name in ("sent", "arrived", "queued")))
    after = by_rank(lambda of_rank: sum(of_rank[-1][name] for name in ("sent", "arrived", "queued")))
    slopes = by_rank(lambda of_rank: f"{slope(of_rank) / 1024:.2f}")
    return [method, net, str(ranks), pairs("resident", MIB), slopes, most, after, pairs("handles"), pairs("threads")]


HEADINGS = ["method", "net", "P", "resident MiB, at a tenth – at the end", "slope, KiB an update",
            "most messages sent + arrived + queued", "after the drain", "file handles", "threads"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=5000, help="of every run (default: %(default)s)")
    parser.add_argument("--methods", nargs="+", default=list(PRESETS), choices=list(PRESETS))
    parser.add_argument("--nets", nargs="+", default=list(REVERSIBLE_NETS), choices=list(REVERSIBLE_NETS))
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--summary", type=Path, default=Path("runs/long.json"))
    args = parser.parse_args()
    todo = list(itertools.product(args.methods, args.nets, args.ranks))
    rows, found = [], []
    with worlds() as start, tqdm(todo, unit="run") as bar:
        for method, net, ranks in bar:
            bar.set_postfix_str(f"{method}, {net}, P = {ranks}")
            world = start(ranks, watch, method, net, args.updates)
            try:
                looks = world.answers()
                rows.append(row(method, net, ranks, looks))
                found.append({"method": method, "net": net, "ranks": ranks, "looks": looks})
            except WorldFailed as error:
                rows.append([method, net, str(ranks), str(error).splitlines()[0][:120], *[""] * 5])
            world.end()
    write_json(args.summary, {"updates": args.updates, "runs": found})
    print(f"{args.updates} updates of one micro-batch of 2; numbers of all ranks, by rank\n\n{table(HEADINGS, rows)}")


if __name__ == "__main__":
    main()
