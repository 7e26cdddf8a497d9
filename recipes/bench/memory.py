"""What methods keep in memory: peak bytes on one rank with one stage a block."""

from __future__ import annotations

from typing import Any

from tqdm import tqdm

from bench.models import Model
from bench.plan import METHODS, Configuration
from bench.rank import serve
from run.tables import MIB, table
from run.worlds import World, WorldFailed

MEMORY_METHODS = ("petra", "petra-01", "dsp", "delayed", "pipedream")


def memory(model: Model, k: int) -> tuple[str, list[dict[str, Any]]]:
    """Peak bytes held on one rank with one stage a block, over ticks in the steady state: a table, and the numbers."""
    found: list[dict[str, Any]] = []
    for name in tqdm(MEMORY_METHODS, unit="method"):
        with World(1, serve, Configuration(name, 1, k), model, [0, len(model.specs())], pinned=True) as world:
            try:
                world.answers()
                found.append({"method": METHODS[name].label, **world.ask(("watch", 1))[0]})
            except WorldFailed as error:
                found.append({"method": METHODS[name].label, "error": str(error)})
    return memory_table(found), found


def memory_table(found: list[dict[str, Any]]) -> str:
    """Peaks, and their ratio to ``delayed``."""
    base = next((row for row in found if row["method"] == METHODS["delayed"].label and "kept" in row), None)
    rows: list[list[str]] = []
    for row in found:
        if "error" in row:
            rows.append([row["method"], row["error"].splitlines()[0][:80], "", "", "", "", ""])
            continue
        shares = ["" if base is None else f"{row[name] / base[name]:.3f}" for name in ("kept", "with_messages")]
        rows.append([row["method"], f"{row['kept'] / MIB:.1f}", shares[0], f"{row['with_messages'] / MIB:.1f}", shares[1],
                     f"{row['stashed'] / MIB:.1f}", f"{row['peak_memory_bytes'] / MIB:.0f}"])
    return table(["method", "activations kept by stages, MiB", "/ delayed", "with messages on their way, MiB", "/ delayed",
                  "stashed weights, MiB", "process, above the start, MiB"], rows)
