"""The processes of a run: joined and left together, and the place of each among all."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import deepspeed
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

from ds_decoupled.errors import ConfigError
from ds_decoupled.shared_memory import release_names
from run.failures import NoticeBoard, program


@contextmanager
def distributed(backend: str | None) -> Iterator[None]:
    """Join the processes that the launcher started (or run alone), and leave cleanly.

    A setting that cannot work ends every process with its message, whichever rank found it (:mod:`failures`); Ctrl-C ends
    without one.
    """
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29500")
    accelerator = get_accelerator()
    local_rank = int(os.environ["LOCAL_RANK"])
    if accelerator.device_name() != "cpu":
        # With fewer devices than processes (and gloo) several share one; DeepSpeed reads the device from here.
        os.environ["LOCAL_RANK"] = str(local_rank % accelerator.device_count())
        accelerator.set_device(local_rank % accelerator.device_count())
    board: NoticeBoard | None = None
    try:
        _check_backend(backend)
        deepspeed.init_distributed(dist_backend=backend, rank=int(os.environ["RANK"]))
        release_names()
        board = NoticeBoard()
        yield
        dist.barrier()
        board.leave()
        dist.destroy_process_group()
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if board is not None:
            board.end(error)
        elif isinstance(error, ConfigError):
            sys.exit(f"{program()}: {error}")
        raise


def _check_backend(backend: str | None) -> None:
    if backend is None:
        return
    known = [name for name in dist.Backend.backend_list
             if name not in ("undefined", "fake") and dist.is_backend_available(name)]
    if backend not in known:
        raise ConfigError("--backend", backend, f"torch.distributed has {', '.join(known)} here", "Leave it out")
    if backend == "nccl" and get_accelerator().device_name() != "cuda":
        raise ConfigError("--backend", backend, "it moves tensors of GPUs, and there are none here", "Take gloo")


def pipe_position(pipe_ranks: int | None) -> tuple[int, int, int, int]:
    """``(pipe_ranks, pipe rank, replicas, replica)`` of this process; the replicas of a stage are neighbours."""
    world = dist.get_world_size()
    ranks = world if pipe_ranks is None else pipe_ranks
    if ranks < 1 or world % ranks:
        raise ConfigError("--pipe_ranks", ranks, f"it must divide the number of processes, which is {world}")
    replicas = world // ranks
    pipe_rank, replica = divmod(dist.get_rank(), replicas)
    return ranks, pipe_rank, replicas, replica
