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
from collections.abc import Callable, Mapping
from typing import Any

from deepspeed.accelerator import get_accelerator


class Breakdown:
    """Seconds and times by kind of action on one rank.

    Attributes:
        total: seconds since the start, by kind.
    """

    def __init__(self, rank: int, pipe_rank: int) -> None:
        self.rank, self.pipe_rank = rank, pipe_rank
        self.total: dict[str, float] = {}
        self._seconds: dict[str, float] = {}
        self._times: Counter[str] = Counter()

    def timed(self, actions: Mapping[type, Callable[..., None]]) -> dict[type, Callable[..., None]]:
        """The same actions, each of which is timed; DeepSpeed binds them to the engine, so they are functions."""
        return {kind: self._timed(kind.__name__, action) for kind, action in actions.items()}

    def _timed(self, name: str, action: Callable[..., None]) -> Callable[..., None]:
        synchronize = get_accelerator().synchronize

        def run(engine: Any, **kwargs: Any) -> None:
            start = time.perf_counter()
            action(engine, **kwargs)
            synchronize()
            seconds = time.perf_counter() - start
            self.total[name] = self.total.get(name, 0.0) + seconds
            self._seconds[name] = self._seconds.get(name, 0.0) + seconds
            self._times[name] += 1

        return run

    def report(self, updates: int) -> str:
        """What has been spent since the last report, and begin anew."""
        parts = [f"{name} {seconds:.3f} ({self._times[name]})" for name, seconds in sorted(self._seconds.items())]
        self._seconds.clear()
        self._times.clear()
        return (f"rank {self.rank}, pipe rank {self.pipe_rank}, after {updates} updates, seconds by kind of action since the "
                "last line (times):\n  " + "  ".join(parts))
