"""DeepSpeed's all-reduce buffer in shared memory, whose name would outlive every process.

On CPUs, where all ranks are on one machine, each rank makes ``/dev/shm/deepspeed_allreduce_buffer_UID_ADDRESS_PORT_RANK``
(66 MiB) and maps those of the others; nobody ever unlinks them (``shm_initialize`` in DeepSpeed's csrc/cpu/comm/shm.cpp). Once
all ranks have mapped all of them the names serve nothing: they are taken away then, and the memory goes with the last process
that maps it, however that one ends.
"""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

import torch.distributed as dist

_FOLDER = Path("/dev/shm")
_NAME = "deepspeed_allreduce_buffer"
#: Seconds after which a buffer that no process maps was left behind: its ranks map it as soon as it is there.
_LEFT_BEHIND = 60.0


def release_names() -> None:
    """Take away the names of this job's buffers, and of those that dead processes of this user left. A collective call."""
    if not dist.is_initialized():
        return
    dist.barrier()  # every rank has mapped every buffer
    if _FOLDER.is_dir():
        address, port = (os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT"))
        _unlink(_FOLDER / f"{_NAME}_{os.getuid()}_{address}_{port}_{dist.get_rank()}")
        if dist.get_rank() == 0:
            for file in left_behind(_FOLDER):
                _unlink(file)


def left_behind(folder: Path) -> list[Path]:
    """Buffers of this user in ``folder`` that no process maps."""
    found = []
    for file in folder.glob(f"{_NAME}_{os.getuid()}_*"):
        with contextlib.suppress(OSError):
            if time.time() - file.stat().st_mtime > _LEFT_BEHIND:
                found.append(file)
    if not found:
        return []
    mapped = _mapped_names()
    return [file for file in found if str(file) not in mapped]


def _mapped_names() -> set[str]:
    """The files that this user's processes map (those of other users cannot be read, and have buffers of their own)."""
    names: set[str] = set()
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with contextlib.suppress(OSError):  # it may have ended meanwhile
            for line in maps.read_text().splitlines():
                path = line.partition("/")[1:]
                if path[0]:
                    names.add("".join(path).removesuffix(" (deleted)"))
    return names


def _unlink(file: Path) -> None:
    with contextlib.suppress(OSError):
        file.unlink()
