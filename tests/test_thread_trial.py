"""Further threads are kept where they help, and nowhere else; what the user has said stays."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from run.thread_trial import TURNS, WARM_UP, ThreadTrial


class Machine:
    """A clock that moves by what an update takes with the threads of the moment."""

    def __init__(self, several: float, one: float, slower_by: float = 0.0) -> None:
        self.seconds = {True: several, False: one}
        self.slower_by = slower_by
        self.now, self.threads, self.calls = 0.0, 8, 0
        self.used: list[int] = []

    def set_threads(self, number: int) -> None:
        self.threads = number

    def train(self) -> None:
        self.used.append(self.threads)
        self.calls += 1
        self.now += self.seconds[self.threads > 1] + self.slower_by * self.calls


def run(machine: Machine, updates: int, most: int = 8) -> list[str]:
    told: list[str] = []
    trial = ThreadTrial(most, machine.set_threads, lambda: machine.now, told.append)
    for _ in range(updates):
        with trial.update():
            machine.train()
    return told


def test_both_are_tried_alike() -> None:
    assert sum(TURNS) * 2 == len(TURNS) and [*TURNS] == [*reversed(TURNS)]


@pytest.mark.parametrize(("several", "one", "stays"), [(0.2, 0.13, 1), (0.13, 0.2, 8), (0.99, 1.0, 1), (0.5, 1.0, 8)])
@pytest.mark.parametrize("slower_by", [0.0, 0.01])
def test_what_was_faster_stays(several: float, one: float, stays: int, slower_by: float) -> None:
    machine = Machine(several, one, slower_by)
    told = run(machine, 30)
    assert machine.used[:WARM_UP] == [8] * WARM_UP
    assert machine.used[WARM_UP:WARM_UP + len(TURNS)] == [8 if all_of_them else 1 for all_of_them in TURNS]
    assert set(machine.used[WARM_UP + len(TURNS):]) == {stays}
    assert len(told) == (stays == 1)


def test_a_short_run_and_a_single_thread_try_nothing() -> None:
    machine = Machine(0.2, 0.1)
    assert run(machine, WARM_UP) == [] and set(machine.used) == {8}
    assert run(Machine(0.2, 0.1), 30, most=1) == []


@pytest.mark.parametrize(("said", "tried"), [({}, True), ({"OMP_NUM_THREADS": "2"}, False)])
def test_what_the_user_has_said_stays(said: dict[str, str], tried: bool) -> None:
    code = ("from ds_decoupled.threads import share_cores; share_cores(tell=False)\n"
            "import os, sys; sys.path.insert(0, 'recipes'); os.environ['DS_ACCELERATOR'] = 'cpu'\n"
            "import torch; torch.set_num_threads(2)\n"
            "from run.thread_trial import ThreadTrial; print('most', ThreadTrial.of_this_process(tell=True).most)")
    clean = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    done = subprocess.run([sys.executable, "-c", code], env=clean | said, cwd=Path(__file__).parent.parent, capture_output=True,
                          text=True, timeout=120)
    assert done.stdout.split()[-2:] == ["most", "2" if tried else "1"], done.stderr
