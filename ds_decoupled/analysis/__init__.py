"""What a plan will do, before anything runs: pure Python, no torch."""

from ds_decoupled.analysis.simulate import play, simulate
from ds_decoupled.analysis.simulation import Costs, Event, Simulation, Traffic
from ds_decoupled.analysis.staircase import staircase

__all__ = ["Costs", "Event", "Simulation", "Traffic", "play", "simulate", "staircase"]
