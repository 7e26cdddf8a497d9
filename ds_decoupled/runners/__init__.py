"""Who acts next on a rank: the only place that knows order or time."""

from ds_decoupled.runners.free import FreeRunner
from ds_decoupled.runners.planned import PlannedRunner
from ds_decoupled.runners.runner import DataEnd, Fetch, Runner
from ds_decoupled.runners.simulated import SimulatedRunner

#: By the pace of a method: where the order of actions comes from.
RUNNERS: dict[str, type[Runner]] = {"ticks": PlannedRunner, "clock": SimulatedRunner, "free": FreeRunner}

__all__ = ["RUNNERS", "DataEnd", "Fetch", "FreeRunner", "PlannedRunner", "Runner", "SimulatedRunner"]
