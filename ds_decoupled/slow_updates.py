"""A warning, once, where updates have become far slower than they were: threads that spin on a machine that others use too."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping

from ds_decoupled.threads import THREADS, WAITING

#: Times the quickest update from which an update counts as slow. A neighbour that takes half the cores doubles the time of one
#: that waits without spinning; one that spins was seen to take ten times as long.
SLOW = 5.0
#: Slow updates in a row before anything is said: a checkpoint or a busy second is none of this.
IN_A_ROW = 5


class SlowUpdates:
    """Looks at what every update takes.

    A library leaves the environment of its user's process as it is, and OpenMP has read it already; so all that it can do is to
    say what helps at the next start (:mod:`ds_decoupled.threads` has the reason). It says nothing where one thread computes, or
    where the user has settled threads or their waiting.

    Args:
        threads: that torch computes with (``torch.get_num_threads()``).
        environ: the environment, if not the process's own.
        warn: told the one sentence.
    """

    def __init__(self, threads: int, environ: Mapping[str, str] | None = None,
                 warn: Callable[[str], object] = warnings.warn) -> None:
        environ = os.environ if environ is None else environ
        self.warn = warn
        self.watching = threads > 1 and not any(name in environ for name in (THREADS, *WAITING))
        self.restart()

    def restart(self) -> None:
        """What an update does has changed: others than before are the quickest from here on."""
        self.best = float("inf")
        self.slow = 0

    def add(self, seconds: float) -> None:
        """One more update took ``seconds``. To be told only of whole ones: while a pipeline fills, calls do less."""
        if not self.watching:
            return
        self.best = min(self.best, seconds)
        self.slow = self.slow + 1 if seconds > SLOW * self.best else 0
        if self.slow == IN_A_ROW:
            self.watching = False
            self.warn(f"{IN_A_ROW} updates in a row were more than {SLOW:g} times as slow as the quickest ({seconds:.3g} s, "
                      f"and {self.best:.3g} s). If other programs run on this machine, threads that wait by spinning take the "
                      f"time: start again with {WAITING[0]}=passive, and {THREADS} no more than the cores that are free for "
                      "each process.")
