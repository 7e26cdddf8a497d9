"""Whether a rank's further threads help: tried in the first updates of a run, where nobody has said how many there are to be.

Threads that sleep while they wait (:mod:`ds_decoupled.threads`) have to be woken for every larger operation. For a large model
that is nothing; a small one on the same machine is faster with one thread, and a neighbour then takes nothing from it. Which of
the two a job is depends on model, machine and neighbours, so it is measured.

Sums of floats depend on the number of threads: to repeat a run to the last bit, set ``OMP_NUM_THREADS``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median

import torch
from deepspeed.accelerator import get_accelerator
from tqdm import tqdm

from ds_decoupled import threads

#: Updates before anything is timed: the first are slower, and fill the pipeline.
WARM_UP = 4
#: Which updates have all threads: balanced, so that work that grows while the pipeline fills counts for both alike.
TURNS = (True, False, False, True, True, False, False, True)
#: Further threads stay where they save more than a twentieth.
WORTH = 0.95


class ThreadTrial:
    """Times updates with all threads and with one, in turns, and stays with what was faster.

    Args:
        most: threads that the process may use; nothing is tried for one.
        set_threads: changes their number.
        clock: seconds.
        tell: told the one sentence, if one thread is enough.
    """

    def __init__(self, most: int, set_threads: Callable[[int], object] = torch.set_num_threads,
                 clock: Callable[[], float] = time.perf_counter, tell: Callable[[str], object] = tqdm.write) -> None:
        self.most, self.set_threads, self.clock, self.tell = most, set_threads, clock, tell
        self._seen = 0
        self._seconds: dict[bool, list[float]] = {True: [], False: []}

    @staticmethod
    def of_this_process(tell: bool) -> ThreadTrial:
        """Of the recipe's own process: nothing is tried where the user, or a launcher, has said how many threads there are to
        be, or where a device computes."""
        free = threads.settled_here() and get_accelerator().device_name() == "cpu"
        return ThreadTrial(torch.get_num_threads() if free else 1, tell=tqdm.write if tell else lambda text: None)

    @contextmanager
    def update(self) -> Iterator[None]:
        """Within, one update is made."""
        turn = self._seen - WARM_UP
        trying = self.most > 1 and 0 <= turn < len(TURNS)
        if trying:
            self.set_threads(self.most if TURNS[turn] else 1)
        start = self.clock()
        yield
        if trying:
            self._seconds[TURNS[turn]].append(self.clock() - start)
        self._seen += 1
        if self.most > 1 and self._seen == WARM_UP + len(TURNS):
            self._decide()

    def _decide(self) -> None:
        several, one = median(self._seconds[True]), median(self._seconds[False])
        if several < WORTH * one:
            self.set_threads(self.most)
            return
        self.set_threads(1)
        self.tell(f"threads: one in each process from here on: with {self.most} an update took {several:.3g} s, with one "
                  f"{one:.3g} s (set {threads.THREADS} for others)")
