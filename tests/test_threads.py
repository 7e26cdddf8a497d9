"""Threads of OpenMP: how many, how they wait, who decides, and that it is done before torch is there."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ds_decoupled.slow_updates import IN_A_ROW, SlowUpdates
from ds_decoupled.threads import THREADS, WAITING, ranks_here, settings, share_cores, told, usable_cores

ROOT = Path(__file__).parent.parent
SCRIPTS = ("train_resnet", "train_lm", "finetune_lm", "benchmark", "compare_runs", "delay_study", "busy_neighbour")
PASSIVE = {"OMP_WAIT_POLICY": "passive"}


# -- how many cores ----------------------------------------------------------------------------------------------------------

def cores(folder: Path, groups: str, files: dict[str, str], seen: int = 8) -> int:
    """What ``usable_cores`` says of ``seen`` cores, with these files in the place of the system's."""
    own, mounted = folder / "cgroup", folder / "mounted"
    own.write_text(groups)
    mounted.mkdir()
    for name, text in files.items():
        path = mounted / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return usable_cores(seen, own, mounted)


@pytest.mark.parametrize(("groups", "files", "expected"), [
    ("0::/\n", {}, 8),
    ("0::/\n", {"cpu.max": "max 100000\n"}, 8),
    ("0::/\n", {"cpu.max": "300000 100000\n"}, 3),
    ("0::/\n", {"cpu.max": "250000 100000\n"}, 2),
    ("0::/\n", {"cpu.max": "50000 100000\n"}, 1),
    ("0::/\n", {"cpu.max": "1600000 100000\n"}, 8),
    ("0::/job\n", {"job/cpu.max": "400000 100000\n"}, 4),
    ("0::/batch/job\n", {"batch/cpu.max": "200000 100000\n", "batch/job/cpu.max": "max 100000\n"}, 2),
    ("0::/batch/job\n", {"batch/cpu.max": "600000 100000\n", "batch/job/cpu.max": "500000 100000\n"}, 5),
    ("0::/outside/only\n", {"cpu.max": "200000 100000\n"}, 2),
    ("0::/../..\n", {"cpu.max": "200000 100000\n"}, 2),
    ("0::/\n", {"cpu.max": "nonsense\n"}, 8),
    ("", {"cpu.max": "200000 100000\n"}, 8),
], ids=["no files", "no quota", "3", "2.5", "0.5", "more than there are", "of the group", "of the group above", "the smaller",
        "inside a container", "above the container", "nonsense", "in no group"])
def test_quota_of_version_2(tmp_path: Path, groups: str, files: dict[str, str], expected: int) -> None:
    assert cores(tmp_path, groups, files) == expected


@pytest.mark.parametrize(("groups", "folder", "quota", "expected"), [
    ("4:cpu,cpuacct:/\n", "cpu,cpuacct", "200000", 2),
    ("4:cpu,cpuacct:/docker/1\n", "cpu", "200000", 2),
    ("4:cpu:/docker/1\n", "cpu/docker/1", "350000", 3),
    ("4:cpu:/\n", "cpu", "-1", 8),
    ("4:cpuset:/\n", "cpu", "200000", 8),
    ("1:cpu:/\n0::/\n", "cpu", "200000", 2),
], ids=["both controllers", "inside a container", "of the group", "no quota", "no such controller", "beside version 2"])
def test_quota_of_version_1(tmp_path: Path, groups: str, folder: str, quota: str, expected: int) -> None:
    files = {f"{folder}/cpu.cfs_quota_us": f"{quota}\n", f"{folder}/cpu.cfs_period_us": "100000\n"}
    assert cores(tmp_path, groups, files) == expected


def test_version_2_beside_version_1(tmp_path: Path) -> None:
    assert cores(tmp_path, "1:cpu:/\n0::/job\n", {"unified/job/cpu.max": "300000 100000\n"}) == 3


def test_affinity_and_the_system_without_groups(tmp_path: Path) -> None:
    nowhere = tmp_path / "nowhere"
    assert usable_cores(3, nowhere, nowhere) == 3
    if hasattr(os, "sched_getaffinity"):
        assert 1 <= usable_cores() <= len(os.sched_getaffinity(0))


# -- how many threads --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("environ", "threads"), [
    ({}, 8), ({"LOCAL_SIZE": "1"}, 8), ({"LOCAL_SIZE": "2"}, 4), ({"LOCAL_SIZE": "3"}, 2), ({"LOCAL_WORLD_SIZE": "4"}, 2),
    ({"LOCAL_SIZE": "16"}, 1), ({"LOCAL_SIZE": "none"}, 8), ({"WORLD_SIZE": "4"}, 8),
])
def test_cores_are_shared_among_the_ranks_of_the_machine(environ: dict[str, str], threads: int) -> None:
    assert settings(environ, cores=8) == {THREADS: str(threads), **PASSIVE}


@pytest.mark.parametrize("name", WAITING)
def test_who_has_said_how_to_wait_is_obeyed(name: str) -> None:
    assert settings({name: "0"}, cores=8) == {THREADS: "8"}


def test_who_has_said_how_many_is_obeyed() -> None:
    assert settings({THREADS: "64"}, cores=8) == PASSIVE
    assert settings({THREADS: "64", "GOMP_SPINCOUNT": "infinite"}, cores=8) == {}


def test_one_rank_tells_it_in_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("ds_decoupled.threads.usable_cores", lambda: 4)
    for rank in ("0", "1"):
        environ = {"RANK": rank, "LOCAL_SIZE": "2"}
        share_cores(environ)
        assert environ == {"RANK": rank, "LOCAL_SIZE": "2", THREADS: "2", **PASSIVE}
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err == ("threads: 2 in each of 2 processes on 4 cores, waiting without spinning (set OMP_NUM_THREADS, "
                        "OMP_WAIT_POLICY for others)\n")
    share_cores({"RANK": "0", "LOCAL_SIZE": "2"}, tell=False)
    share_cores({THREADS: "1", **PASSIVE})
    assert capsys.readouterr().err == ""


def test_what_is_told_is_what_was_settled() -> None:
    assert told({THREADS: "1"}, 1, 1, False) == "threads: 1 in one process on 1 core (set OMP_NUM_THREADS for others)"
    assert told(PASSIVE, 2, 1, True) == "threads: waiting without spinning (set OMP_WAIT_POLICY for others)"
    assert ranks_here({"LOCAL_SIZE": "0", "LOCAL_WORLD_SIZE": "2"}) == 2


# -- before torch ------------------------------------------------------------------------------------------------------------

def environment(**more: str) -> dict[str, str]:
    """This process's, as if nobody had settled anything."""
    return {name: value for name, value in os.environ.items() if name not in (THREADS, *WAITING)} | more


def python(code: str, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment(**more), capture_output=True, text=True,
                          timeout=120)


def test_an_import_changes_nothing() -> None:
    code = ("import os\nbefore = dict(os.environ)\nimport ds_decoupled, ds_decoupled.threads, ds_decoupled.slow_updates, sys\n"
            "assert 'torch' not in sys.modules\nassert dict(os.environ) == before\n"
            "import torch\nthreads = torch.get_num_threads()\nimport ds_decoupled.engine\n"
            "from ds_decoupled.threads import share_cores\nshare_cores()\n"
            "names = ('OMP_NUM_THREADS', 'OMP_WAIT_POLICY', 'GOMP_SPINCOUNT', 'KMP_BLOCKTIME')\n"
            "assert not set(names) & set(os.environ)\nassert torch.get_num_threads() == threads")
    done = python(code)
    assert done.returncode == 0, done.stderr
    assert "threads:" not in done.stderr


RECIPE = ("import runpy, sys\nsys.path.insert(0, 'recipes')\nsys.argv = ['train_resnet.py', '--help']\n"
          "try:\n    runpy.run_path('recipes/train_resnet.py', run_name='__main__')\nexcept SystemExit:\n    pass\n"
          "import torch\nprint('threads of torch:', torch.get_num_threads())")


@pytest.mark.parametrize(("given", "threads", "waits"), [
    ({}, usable_cores(), True),
    ({"LOCAL_SIZE": "64", "RANK": "1"}, 1, True),
    ({"OMP_NUM_THREADS": "1", "GOMP_SPINCOUNT": "1000"}, 1, False),
], ids=["alone", "one of many", "the user's"])
def test_a_recipe_settles_them_before_torch_is_loaded(given: dict[str, str], threads: int, waits: bool) -> None:
    done = python(RECIPE, OMP_DISPLAY_ENV="verbose", **given)
    found = re.search(r"threads of torch: (\d+)\n", done.stdout)
    assert found, done.stderr
    assert 1 <= int(found[1]) <= threads  # MKL takes no more than there are physical cores
    # What OpenMP itself has read, when it was loaded: GNU's says so, another has no spin count.
    if "GOMP_SPINCOUNT" in done.stderr:
        assert re.search(rf"OMP_NUM_THREADS = '{threads}'", done.stderr)
        assert re.search(rf"GOMP_SPINCOUNT = '{0 if waits else 1000}'", done.stderr)
    assert done.stderr.count("threads: ") == (1 if not given else 0)


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_settles_them_first(script: str) -> None:
    """But only where it is the program: to import it changes nothing."""
    body = ast.parse((ROOT / "recipes" / f"{script}.py").read_text()).body[1:]
    assert isinstance(body[0], ast.ImportFrom) and body[0].module == "__future__"
    assert isinstance(body[1], ast.If) and ast.unparse(body[1].test) == "__name__ == '__main__'"
    first, call = body[1].body
    assert ast.unparse(first) == "from ds_decoupled.threads import share_cores"
    assert ast.unparse(call).startswith("share_cores(")


def test_tests_wait_without_spinning_too() -> None:
    assert any(name in os.environ for name in WAITING)
    assert os.environ[THREADS] == "1"


# -- a warning where nothing was settled -------------------------------------------------------------------------------------

def warnings_of(seconds: list[float], threads: int = 2, **environ: str) -> list[str]:
    said: list[str] = []
    watcher = SlowUpdates(threads, environ, said.append)
    for value in seconds:
        watcher.add(value)
    return said


def test_slow_updates_are_told_once() -> None:
    quick, slow = [0.5, 0.4, 0.6], [2.1] * IN_A_ROW
    said, = warnings_of(quick + slow + quick + slow)
    assert "OMP_WAIT_POLICY=passive" in said and "OMP_NUM_THREADS" in said
    assert "(2.1 s, and 0.4 s)" in said


@pytest.mark.parametrize("seconds", [
    [9.0, *[0.4] * 20], [0.4, *[1.9] * 20], [0.4, *([3.0] * (IN_A_ROW - 1) + [1.0]) * 5], [],
], ids=["a slow start", "not slow enough", "never long enough", "none"])
def test_others_are_not_told(seconds: list[float]) -> None:
    assert warnings_of(seconds) == []


@pytest.mark.parametrize("name", [THREADS, *WAITING])
def test_who_has_settled_something_is_not_told(name: str) -> None:
    seconds = [0.4, *[4.0] * 20]
    assert warnings_of(seconds) and not warnings_of(seconds, **{name: "1"})
    assert not warnings_of(seconds, threads=1)


def test_another_kind_of_update_starts_anew() -> None:
    said: list[str] = []
    watcher = SlowUpdates(2, {}, said.append)
    watcher.add(0.1)
    watcher.restart()
    for _ in range(2 * IN_A_ROW):
        watcher.add(1.0)
    assert not said


def test_the_warning_is_pythons() -> None:
    watcher = SlowUpdates(2, {})
    watcher.add(0.1)
    with pytest.warns(UserWarning, match="OMP_WAIT_POLICY"):
        for _ in range(IN_A_ROW):
            watcher.add(1.0)
