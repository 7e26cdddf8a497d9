"""How many threads a process computes with, and that they wait without spinning: settled before torch loads OpenMP.

torch cuts every larger operation into a part for each thread of OpenMP. A thread that is done with its part waits for the
others by spinning, 300,000 turns by default (https://gcc.gnu.org/onlinedocs/libgomp/GOMP_005fSPINCOUNT.html). That saves a few
microseconds where every thread has a core of its own. Where another program runs on one of the cores, or a container may use
fewer cores than it sees, a thread that has lost its core is waited for by spinning, for whole time slices, at every one of the
thousands of operations of an update; with one busy program on a machine of two cores, updates were seen to take ten times as
long. ``OMP_WAIT_POLICY=passive`` lets waiting threads sleep, and leaves their cores to whoever has work. OpenMP reads its
variables once, when torch is loaded; so a script calls :func:`share_cores` in its first lines::

    from ds_decoupled.threads import share_cores

    share_cores()

    import torch

This module imports nothing of torch. Importing :mod:`ds_decoupled` calls nothing here: the environment is the program's.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator, Mapping, MutableMapping
from pathlib import Path

THREADS = "OMP_NUM_THREADS"
#: What says how threads wait: OpenMP's own variable, GNU's, and that of LLVM and Intel.
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


#: What :func:`share_cores` has set in this process.
_settled: set[str] = set()


def settled_here() -> bool:
    """Whether :func:`share_cores` has settled the number of threads of this process, so that nobody else has."""
    return THREADS in _settled


def share_cores(environ: MutableMapping[str, str] | None = None, tell: bool = True) -> None:
    """Settle the threads of this process and of those that it starts, where the user has not: see :func:`settings`.

    Args:
        environ: the environment, if not the process's own.
        tell: one line on stderr, of rank 0, if anything was settled.
    """
    environ = os.environ if environ is None else environ
    if environ is os.environ and "torch" in sys.modules:  # OpenMP has read its variables, with which this process goes on
        return
    cores = usable_cores()
    settled = settings(environ, cores)
    environ.update(settled)
    if environ is os.environ:
        _settled.update(settled)
    if settled and tell and environ.get("RANK", "0") == "0":
        asleep = environ.get(WAITING[0], "").lower() == "passive"
        print(told(settled, cores, ranks_here(environ), asleep), file=sys.stderr, flush=True)


def settings(environ: Mapping[str, str], cores: int) -> dict[str, str]:
    """The variables to set: as many threads as there are cores for this rank, which sleep while they wait. What the user, or a
    launcher, has set stays.

    >>> settings({"LOCAL_SIZE": "2"}, cores=8)
    {'OMP_NUM_THREADS': '4', 'OMP_WAIT_POLICY': 'passive'}
    >>> settings({"LOCAL_SIZE": "2", "OMP_NUM_THREADS": "3"}, cores=8)
    {'OMP_WAIT_POLICY': 'passive'}
    """
    settled = {}
    if THREADS not in environ:
        settled[THREADS] = str(max(1, cores // ranks_here(environ)))
    if not any(name in environ for name in WAITING):
        settled[WAITING[0]] = "passive"
    return settled


def told(settled: Mapping[str, str], cores: int, ranks: int, asleep: bool) -> str:
    """What was settled, in one line.

    >>> told({'OMP_NUM_THREADS': '4', 'OMP_WAIT_POLICY': 'passive'}, cores=8, ranks=2, asleep=True)
    'threads: 4 in each of 2 processes on 8 cores, waiting without spinning (set OMP_NUM_THREADS, OMP_WAIT_POLICY for others)'
    """
    said = []
    if THREADS in settled:
        each = "in one process" if ranks == 1 else f"in each of {ranks} processes"
        said.append(f"{settled[THREADS]} {each} on {cores} core{'' if cores == 1 else 's'}")
    if asleep:
        said.append("waiting without spinning")
    return f"threads: {', '.join(said)} (set {', '.join(settled)} for others)"


def ranks_here(environ: Mapping[str, str]) -> int:
    """Processes of this job on this machine, as DeepSpeed's launcher and torchrun say; 1 where nobody does."""
    for name in ("LOCAL_SIZE", "LOCAL_WORLD_SIZE"):
        text = environ.get(name, "")
        if text.isdigit() and int(text) > 0:
            return int(text)
    return 1


def usable_cores(seen: int | None = None, own: Path = Path("/proc/self/cgroup"), mounted: Path = Path("/sys/fs/cgroup")) -> int:
    """Whole cores that this process may use, at least 1: those of its affinity, and no more than its cgroups' quota.

    Args:
        seen: the cores of its affinity, if not as the system says.
        own: the file that names the process's cgroups.
        mounted: where cgroups are.
    """
    if seen is None:
        seen = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.floor(min([float(seen), *_quotas(own, mounted)])))


# joblib.cpu_count() and its like read a quota in the root of /sys/fs/cgroup alone, where a container sees its own; that of a
# service or a batch job stands in the folder of its group, or in one above it.
def _quotas(own: Path, mounted: Path) -> Iterator[float]:
    """The quotas, in cores, of this process's cgroups and of those above them, of both versions.

    https://docs.kernel.org/admin-guide/cgroup-v2.html#cpu-interface-files, https://docs.kernel.org/scheduler/sched-bwc.html
    """
    for folder, *files in _groups(own, mounted):
        while True:
            try:
                quota, period = " ".join((folder / name).read_text().strip() for name in files).split()
                if quota not in ("max", "-1"):
                    yield float(quota) / float(period)
            except (OSError, ValueError, ZeroDivisionError):
                pass  # the root has no such file, and a container does not see the folder that the group has outside
            if folder == mounted or mounted not in folder.parents:
                break
            folder = folder.parent


def _groups(own: Path, mounted: Path) -> Iterator[tuple[Path, str] | tuple[Path, str, str]]:
    """The folders of this process's cgroups, with the files that say a quota and its period."""
    try:
        lines = own.read_text().splitlines()
    except OSError:  # not Linux
        return
    for line in lines:
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            for root in (mounted, mounted / "unified"):
                yield root / path.lstrip("/"), "cpu.max"
        elif "cpu" in controllers.split(","):
            for name in dict.fromkeys((controllers, "cpu")):
                yield mounted / name / path.lstrip("/"), "cpu.cfs_quota_us", "cpu.cfs_period_us"
