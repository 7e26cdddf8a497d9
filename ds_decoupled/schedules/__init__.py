"""Who does what, when: plans as data, in pure Python."""

from ds_decoupled.schedules.actions import Action, format_actions, parse_actions
from ds_decoupled.schedules.communication import add_communication
from ds_decoupled.schedules.kinds import KINDS, Kind, Slot
from ds_decoupled.schedules.partition import Placement, balanced_bounds, uniform_bounds
from ds_decoupled.schedules.plan import Plan
from ds_decoupled.schedules.ticks import Ticks

__all__ = ["KINDS", "Action", "Kind", "Placement", "Plan", "Slot", "Ticks", "add_communication", "balanced_bounds",
           "format_actions", "parse_actions", "uniform_bounds"]
