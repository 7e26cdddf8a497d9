"""Long runs: what a rank holds after hundreds and after thousands of updates, under every method. All of it should be flat.

Resident memory, the messages that links hold, file handles and threads of every rank, with a fitted slope of the memory.
"""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import linear_regression
from typing import Any

from torch import nn
from tqdm import tqdm

import ds_decoupled
from bench.models import make_model
from ds_decoupled.config import PRESETS
from ds_decoupled.flushed import FlushedPipelineEngine
from ds_decoupled.models import next_token_loss
from run.tables import MIB, table
from run.worlds import Parent, World, WorldFailed

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


def watch(parent: Parent, method: str, net: str, updates: int) -> None:
    """Train, look, tell: a rank's task."""
    name, sizes = REVERSIBLE_NETS[net]
    model = make_model(name, 2, **sizes)
    config = {"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 1, "steps_per_print": 1 << 30,
              "optimizer": {"type": "SGD", "params": {"lr": 1e-5, "momentum": 0.9}},
              "decoupled": {"method": method, "stages": "blocks"}}
    module = ds_decoupled.DecoupledPipelineModule(model.specs(), config=config, sample_input=next(model.batches())[0],
                                                  loss_fn=next_token_loss if net == "gpt" else nn.CrossEntropyLoss())
    engine, *_ = ds_decoupled.initialize(model=module, config=config, model_parameters=list(module.parameters()))
    batches = model.batches()
    every = max(1, updates // SAMPLES)
    for update in range(1, updates + 1):
        engine.train_batch(batches)
        if update % every == 0:
            parent.tell(asdict(_look(engine, update)))
            if update % (10 * every) == 0 and method != "backprop":
                engine.eval_batch(batches, num_micro_batches=1)
    engine.drain()
    if method != "backprop":
        parent.tell(asdict(_look(engine, updates + 1)))
        engine.network.leave()  # a rank of a world ends without what Python does at exit


def _look(engine: Any, update: int) -> Look:
    held = {} if isinstance(engine, FlushedPipelineEngine) else engine.network.held()  # DeepSpeed keeps nothing to count
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return Look(update, resident, len(os.listdir("/proc/self/fd")), threading.active_count(),
                held.get("sent", 0), held.get("arrived", 0), held.get("queued", 0))


def slope(looks: list[dict[str, int]]) -> float:
    """Bytes of resident memory an update, fitted over the second half of the run; 0 where that is a single look."""
    half = looks[len(looks) // 2:]
    updates, resident = ([look[name] for look in half] for name in ("update", "resident"))
    return linear_regression(updates, resident).slope if len(half) > 1 else 0.0


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


def long(methods: Sequence[str], ranks: Sequence[int], updates: int) -> tuple[str, list[dict[str, Any]]]:
    """Every method on every net and number of ranks, one run after the other: a table, and all looks."""
    rows, found = [], []
    runs = [(method, net, p) for method, net, p in itertools.product(methods, REVERSIBLE_NETS, ranks)
            if p == 1 or not PRESETS[method].layerwise]  # threads share a model that lies on one rank
    for method, net, p in tqdm(runs, unit="run"):
        with World(p, watch, method, net, updates, pinned=True) as world:
            try:
                told = list(iter(lambda: world.answers(), [None] * p))  # noqa: B023  (used up at once)
                looks = [list(of_rank) for of_rank in zip(*told)]
                rows.append(row(method, net, p, looks))
                found.append({"method": method, "net": net, "ranks": p, "looks": looks})
            except WorldFailed as error:
                rows.append([method, net, str(p), str(error).splitlines()[0][:120], *[""] * 5])
                found.append({"method": method, "net": net, "ranks": p, "error": str(error)})
    return table(HEADINGS, rows), found
