"""Who looks on: watchers are told of every action of a rank, and change nothing that training depends on.

``engine.watch(watcher)`` adds one.
"""

from ds_decoupled.watchers.auxnet import AuxNetCost
from ds_decoupled.watchers.breakdown import Breakdown
from ds_decoupled.watchers.gradients import GradientTracker
from ds_decoupled.watchers.watcher import Watcher

__all__ = ["AuxNetCost", "Breakdown", "GradientTracker", "Watcher"]
