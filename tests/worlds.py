"""Real processes for the tests: worlds of ranks, forked from a server that has imported everything once."""

from __future__ import annotations

import contextlib
import multiprocessing as mp
import os
import random
import shutil
import socket
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

_context = mp.get_context("forkserver")
_context.set_forkserver_preload(["preloaded"])


def free_port() -> int:
    """A port that is free now; tests that run side by side take theirs from different ones.

    Below those that the kernel gives to connections, one of which might take it before a world's first rank listens.
    """
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    while True:
        port = random.SystemRandom().randrange(15000 + worker % 8, 32000, 8)
        with socket.socket() as s, contextlib.suppress(OSError):
            s.bind(("127.0.0.1", port))
            return port


def _rank_main(pipe: Connection, rank: int, world: int, port: int, log: str, fn: Callable[..., Any],
               args: tuple[Any, ...]) -> None:
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=str(port), DS_ACCELERATOR="cpu")
    torch.set_num_threads(1)
    # As in a user's process. A rank would inherit the fork server's way, in which a lock keeps its name in shared memory until
    # its process ends in order; this one does not.
    mp.set_start_method("fork", force=True)
    mp.current_process()._config["daemon"] = False  # DeepSpeed's data loader starts workers, which daemons may not
    try:
        torch.save(fn(*args), log + ".result")  # by file: tensors in a pipe would need this process to live on
        error = None
    except BaseException as failure:
        error = f"{type(failure).__name__}: {failure}\n{traceback.format_exc()}"
    pipe.send(error)
    pipe.close()
    os._exit(0)  # a rank that failed must not wait in a destructor for the others


class RankFailed(AssertionError):
    """What every rank said; ``errors[r]`` is None where rank r did well."""

    def __init__(self, errors: list[str | None]) -> None:
        self.errors = errors
        super().__init__("\n".join(f"rank {r}: {e}" for r, e in enumerate(errors) if e))


def start(world: int, fn: Callable[..., Any], *args: Any) -> list[tuple[Any, Connection, str]]:
    """Start ``fn(*args)`` on every rank; returns processes, pipes and log files."""
    port = free_port()
    folder = tempfile.mkdtemp(prefix="world-")
    ranks = []
    for rank in range(world):
        here, there = _context.Pipe()
        log = os.path.join(folder, f"rank{rank}.log")
        process = _context.Process(target=_rank_main, args=(there, rank, world, port, log, fn, args), daemon=True)
        process.start()
        there.close()
        ranks.append((process, here, log))
    return ranks


def finish(ranks: list[tuple[Any, Connection, str]], timeout: float = 120) -> list[Any]:
    """The ranks' results. Raises :class:`RankFailed` with every rank's error, and if one does not answer in time."""
    results: list[Any] = []
    errors: list[str | None] = []
    for _, pipe, log in ranks:
        value, error = None, None
        try:
            if pipe.poll(timeout):
                error = pipe.recv()
                value = None if error else torch.load(log + ".result", weights_only=False)
            else:
                error = f"no answer within {timeout} s\n{Path(log).read_text()[-2000:]}"
        except EOFError:
            error = f"died without a word\n{Path(log).read_text()[-2000:]}"
        results.append(value)
        errors.append(error)
    for process, _, _ in ranks:
        process.join(5)
        if process.is_alive():
            process.kill()
    for _, _, log in ranks:
        shutil.rmtree(Path(log).parent, ignore_errors=True)
    if any(errors):
        raise RankFailed(errors)
    return results


def run(world: int, fn: Callable[..., Any], *args: Any, timeout: float = 120) -> list[Any]:
    """``fn(*args)`` on every rank of a new world; the results by rank."""
    return finish(start(world, fn, *args), timeout)
