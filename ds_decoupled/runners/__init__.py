"""Who acts next on a rank: the only place that knows order or time."""

from ds_decoupled.axes import Axes
from ds_decoupled.runners.free import FreeRunner
from ds_decoupled.runners.layerwise import LayerwiseRunner
from ds_decoupled.runners.planned import PlannedRunner
from ds_decoupled.runners.runner import DataEnd, Fetch, Runner
from ds_decoupled.runners.simulated import SimulatedRunner
from ds_decoupled.runners.threaded import ThreadedRunner

#: By the pace of a method: where the order of actions comes from.
RUNNERS: dict[str, type[Runner]] = {"ticks": PlannedRunner, "clock": SimulatedRunner, "free": FreeRunner}

#: The same where the update is layer-wise.
LAYERWISE: dict[str, type[Runner]] = {"clock": LayerwiseRunner, "free": ThreadedRunner}


def runner_of(axes: Axes) -> type[Runner]:
    """Who decides what is next."""
    return (LAYERWISE if axes.layerwise else RUNNERS)[axes.pace]


__all__ = ["LAYERWISE", "RUNNERS", "DataEnd", "Fetch", "FreeRunner", "LayerwiseRunner", "PlannedRunner", "Runner",
           "SimulatedRunner", "ThreadedRunner", "runner_of"]
