"""``"wall_clock_breakdown": true``: the seconds that a rank spends in each kind of action.

::

    rank 1, pipe rank 1, after 20 updates, seconds by kind of action since the last line (times):
      ForwardLossBackward 0.412 (80)  RecvActivation 0.106 (80)  SendGradient 0.004 (80)  Update 0.051 (20)

A receive's seconds are the wait for the neighbour. On a device every action is followed by a wait for the device, as in
DeepSpeed's ``SynchronizedWallClockTimer``, so that a run that is looked at is a slower one.
"""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

from deepspeed.accelerator import get_accelerator

from ds_decoupled.schedules import Action
from ds_decoupled.watchers.watcher import Watcher


class Breakdown(Watcher):
    """Seconds and times by kind of action on one rank.

    Attributes:
        total: seconds since the start, by kind.
    """

    def __init__(self, rank: int, pipe_rank: int) -> None:
        self.rank, self.pipe_rank = rank, pipe_rank
        self._start = 0.0
        self.total: dict[str, float] = {}
        self._seconds: dict[str, float] = {}
        self._times: Counter[str] = Counter()

    def before(self, action: Action) -> None:
        self._start = time.perf_counter()

    def after(self, action: Action) -> None:
        get_accelerator().synchronize()
        seconds = time.perf_counter() - self._start
        name = action.kind.name
        self.total[name] = self.total.get(name, 0.0) + seconds
        self._seconds[name] = self._seconds.get(name, 0.0) + seconds
        self._times[name] += 1

    def report(self) -> dict[str, float]:
        return self.total

    def merge(self, reports: list[dict[str, float]]) -> dict[str, Any]:
        return {"seconds_by_action": reports}

    def line(self, updates: int) -> str:
        """What has been spent since the last report, and begin anew."""
        parts = [f"{name} {seconds:.3f} ({self._times[name]})" for name, seconds in sorted(self._seconds.items())]
        self._seconds.clear()
        self._times.clear()
        return (f"rank {self.rank}, pipe rank {self.pipe_rank}, after {updates} updates, seconds by kind of action since the "
                "last line (times):\n  " + "  ".join(parts))
