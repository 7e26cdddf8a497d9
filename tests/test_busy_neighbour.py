"""The measurement beside busy programs: what it starts how, that it ends what it started, and a tiny run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

import busy_neighbour
from bench.neighbour import WAYS, Job, Timed, jobs_of, neighbours, report, variables
from ds_decoupled.threads import THREADS, WAITING
from run.worlds import Parent, World

RECIPES = Path(__file__).parent.parent / "recipes"


def set_by(way: str) -> dict[str, str]:
    said = variables(way, 2, cores=8)
    assert set(said) == {THREADS, *WAITING}, "what is not set must be taken away"
    return {name: value for name, value in said.items() if value is not None}


def test_ways() -> None:
    assert set_by("default") == {}
    assert set_by("one thread") == {THREADS: "1"}
    assert set_by("brief spin") == {THREADS: "4", "GOMP_SPINCOUNT": "1000"}
    assert set_by("shared") == set_by("pinned") == {THREADS: "4", WAITING[0]: "passive"}


@pytest.mark.parametrize(("ranks", "cores", "more"), [
    (1, 8, ["brief spin", "one thread"]), (2, 8, ["pinned", "brief spin", "one thread"]), (2, 2, ["pinned"]), (4, 2, []),
    (1, 1, []),
])
def test_ways_that_make_a_difference(ranks: int, cores: int, more: list[str]) -> None:
    ways = [job.way for job in jobs_of(WAYS, "petra", ranks, cores, 16, 16)]
    assert ways == ["default", "shared", *more]


def environment_of(parent: Parent) -> dict[str, str | None]:
    return {name: os.environ.get(name) for name in (THREADS, *WAITING)}


def test_a_world_has_an_environment_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(THREADS, "7")
    monkeypatch.setenv("GOMP_SPINCOUNT", "9")
    before = dict(os.environ)
    wanted = {THREADS: None, WAITING[0]: "passive", "GOMP_SPINCOUNT": None, "KMP_BLOCKTIME": None}
    with World(2, environment_of, threads=None, environ=wanted) as world:
        assert dict(os.environ) == before
        assert world.answers() == [wanted, wanted]


def test_busy_programs_end_with_the_timing() -> None:
    with pytest.raises(KeyboardInterrupt), neighbours(2) as started:
        assert [process.poll() for process in started] == [None, None]
        raise KeyboardInterrupt
    assert all(process.poll() is not None for process in started)


def test_busy_programs_end_with_what_started_them() -> None:
    code = ("import os, sys\nsys.path.insert(0, 'recipes')\nfrom bench.neighbour import neighbours\n"
            "with neighbours(1) as started:\n    print(started[0].pid, flush=True)\n    os._exit(9)")
    done = subprocess.run([sys.executable, "-c", code], cwd=RECIPES.parent, capture_output=True, text=True, timeout=120)
    process = Path(f"/proc/{int(done.stdout.split()[-1])}")
    for _ in range(100):
        if not process.exists():
            return
        time.sleep(0.1)
    raise AssertionError(f"{process} is still there")


def test_table() -> None:
    found = [Timed(Job("petra", 2, "shared", 16, 16), 1, {0: [0.1, 0.3, 0.2], 1: [0.5, 0.4, 0.9]})]
    assert report([0, 1], found).splitlines()[-1] == "| petra | 2 | shared | 1 | 0.200 | 0.500 |"


def test_tiny_run(tmp_path: Path) -> None:
    output = tmp_path / "busy.json"
    done = subprocess.run([sys.executable, str(RECIPES / "busy_neighbour.py"), "--quick", "--methods", "petra", "--ranks", "2",
                           "--neighbours", "0", "1", "--ways", "default", "shared", "--output", str(output)],
                          capture_output=True, text=True, timeout=220)
    assert done.returncode == 0, done.stderr
    measured = json.loads(output.read_text())["measured"]
    assert [(row["job"]["way"], row["job"]["ranks"], sorted(row["seconds"])) for row in measured] == [
        ("default", 2, ["0", "1"]), ("shared", 2, ["0", "1"])]
    assert all(seconds[0] > 0 for row in measured for seconds in row["seconds"].values())
    assert "| petra | 2 | shared |" in done.stdout


def test_what_cannot_work_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="--output"):
        busy_neighbour.main(["--output", str(tmp_path)])
