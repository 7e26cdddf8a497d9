"""Worlds of processes on this machine: started, listened to, and ended, whatever happens in them.

A world is P processes that can meet in torch.distributed. Each runs the same task, which may talk with the process that
started it, and whose result is the last thing that it says::

    def task(parent: Parent, factor: int) -> str:
        while (number := parent.told()) is not None:
            parent.tell(factor * number)
        return "done"

    with World(2, task, 7) as world:
        world.ask(6)         # [42, 42]
        world.ask(None)      # ["done", "done"]
"""

from __future__ import annotations

import gc
import io
import multiprocessing as mp
import os
import random
import signal
import socket
import tempfile
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

_CONTEXT = mp.get_context("forkserver")
_CONTEXT.set_forkserver_preload([])  # by itself, it would import the main module

ANSWER_SECONDS = 900.0
GRACE_SECONDS = 5.0
"""Once a rank has failed, the others may wait for it in vain: they have so long to say more."""
LOG_END = 2000
"""Characters of a dead rank's output that are told."""


class WorldFailed(Exception):
    """A rank has failed, has died or does not answer.

    Attributes:
        errors: what each rank said, by rank; None where it did well.
    """

    def __init__(self, errors: Sequence[str | None]) -> None:
        self.errors = list(errors)
        super().__init__("\n".join(f"rank {rank}: {error}" for rank, error in enumerate(errors) if error is not None))


class Parent:
    """The process that started this rank, as the rank's task sees it."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe

    def tell(self, value: Any) -> None:
        """Answer with ``value``: anything that can be pickled; tensors travel as copies."""
        self._pipe.send_bytes(_packed(value, None))

    def told(self) -> Any:
        """Wait for the next thing that it asks; ends this process once it has let go."""
        try:
            return self._pipe.recv()
        except EOFError:
            os._exit(0)


@dataclass(frozen=True)
class Said:
    """One thing that a rank said: a value, or what it failed with."""

    value: Any = None
    error: str | None = None


class World:
    """P processes that are one world of torch.distributed; they end with the block that this stands in, or by :meth:`end`.

    Args:
        ranks: P.
        task: a function of a module, called as ``task(parent, *args)`` on every rank.
        args: its further arguments.
        threads: of torch, on every rank; None leaves them as the environment has them.
        pinned: a core for each rank alone, if there are as many.
        environ: variables that the ranks start with, None for one that they lack. OpenMP reads its own once, when torch is
            loaded, so that ranks with an environment of their own are not forked from the server, which has loaded it, but
            spawned.
    """

    def __init__(self, ranks: int, task: Callable[..., Any], *args: Any, threads: int | None = 1, pinned: bool = False,
                 environ: Mapping[str, str | None] | None = None) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="world-", ignore_cleanup_errors=True)
        self._logs = [Path(self._folder.name) / f"rank{rank}.log" for rank in range(ranks)]
        self._pipes: list[Connection] = []
        self._processes: list[Any] = []
        place = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        context: Any = _CONTEXT if environ is None else mp.get_context("spawn")
        try:
            for rank, log in enumerate(self._logs):
                here, there = context.Pipe()
                self._pipes.append(here)
                process = context.Process(target=_rank, daemon=True, args=(
                    there, {**place, "RANK": str(rank), "LOCAL_RANK": str(rank)}, str(log), threads, pinned, task, args))
                with _variables(environ or {}):
                    process.start()
                there.close()
                self._processes.append(process)
        except BaseException:
            self.end()
            raise

    def __enter__(self) -> World:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def ask(self, question: Any) -> list[Any]:
        """What every rank answers to ``question``, by rank. Raises :class:`WorldFailed`."""
        self.tell(question)
        return self.answers()

    def tell(self, question: Any) -> None:
        """Put ``question`` to every rank; one that is gone shows when it is listened to."""
        for pipe in self._pipes:
            with suppress(OSError):
                pipe.send(question)

    def answers(self, seconds: float = ANSWER_SECONDS, grace: float = GRACE_SECONDS) -> list[Any]:
        """As :meth:`listen`, the values alone.

        Raises:
            WorldFailed: if any rank has failed.
        """
        said = self.listen(seconds, grace)
        if any(one.error is not None for one in said):
            raise WorldFailed([one.error for one in said])
        return [one.value for one in said]

    def listen(self, seconds: float = ANSWER_SECONDS, grace: float = GRACE_SECONDS) -> list[Said]:
        """The next thing that each rank says, by rank.

        Args:
            seconds: to wait for one rank after the other.
            grace: the same, once a rank has failed.
        """
        said: dict[int, Said] = {}
        waiting: dict[Any, int] = {pipe: rank for rank, pipe in enumerate(self._pipes)}
        while waiting:
            limit = min(seconds, grace) if any(one.error is not None for one in said.values()) else seconds
            ready = wait(list(waiting), limit)
            if not ready:
                said |= {rank: Said(error=f"no answer within {limit:g} s{self._end_of_log(rank)}") for rank in waiting.values()}
                break
            for pipe in ready:
                rank = waiting.pop(pipe)
                try:
                    said[rank] = torch.load(io.BytesIO(self._pipes[rank].recv_bytes()), weights_only=False)
                except (EOFError, OSError):
                    said[rank] = Said(error=f"the process died{self._end_of_log(rank)}")
        return [said[rank] for rank in range(len(self._pipes))]

    def _end_of_log(self, rank: int) -> str:
        log = self._logs[rank]
        return f"; the end of its output:\n{log.read_text(errors='replace')[-LOG_END:]}" if log.exists() else ""

    def end(self) -> None:
        """End the processes, wherever they are."""
        for process, pipe in zip(self._processes, self._pipes):
            pipe.close()
            process.kill()
        for process in self._processes:
            process.join(10)
        self._folder.cleanup()


@contextmanager
def _variables(values: Mapping[str, str | None]) -> Iterator[None]:
    """Within, the environment has these; None for one that it lacks."""
    before = {name: os.environ.get(name) for name in values}

    def put(wanted: Mapping[str, str | None]) -> None:
        for name, value in wanted.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value

    put(values)
    try:
        yield
    finally:
        put(before)


def first_to_speak(worlds: Iterable[World]) -> list[World]:
    """Wait until a rank of some world has something to say; those worlds."""
    owners: dict[Any, World] = {pipe: world for world in worlds for pipe in world._pipes}
    return list(dict.fromkeys(owners[pipe] for pipe in wait(list(owners))))


def import_once(module: str) -> None:
    """Let the server that ranks are forked from import ``module``, before the first world: what it imports, ranks have.

    It must not look for a GPU, as DeepSpeed does unless it is told to take the CPU: forked processes could not use one.
    """
    # The server finds modules by this path alone.
    path = [str(Path(__file__).parent.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(path)
    _CONTEXT.set_forkserver_preload([module])


def free_port() -> int:
    """A port that is free now; processes side by side take theirs from different ones.

    Below those that the kernel gives to connections, one of which might take it before a world's first rank listens.
    """
    while True:
        port = random.SystemRandom().randrange(15000 + os.getpid() % 8, 32000, 8)
        with socket.socket() as s, suppress(OSError):
            s.bind(("127.0.0.1", port))
            return port


def _rank(pipe: Connection, place: dict[str, str], log: str, threads: int | None, pinned: bool, task: Callable[..., Any],
          args: tuple[Any, ...]) -> None:
    """A rank's whole life."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its ranks
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.update(place)
    # No garbage is looked for in what was inherited: the search would copy all of the server's memory, and DeepSpeed asks for
    # it four times for each of its bf16 optimizers (see_memory_usage).
    gc.freeze()
    if pinned and hasattr(os, "sched_setaffinity"):
        cores, rank = sorted(os.sched_getaffinity(0)), int(place["RANK"])
        if int(place["WORLD_SIZE"]) <= len(cores):
            os.sched_setaffinity(0, {cores[rank]})
    if threads is not None:
        torch.set_num_threads(threads)
    # As in a user's process. A rank would inherit the server's way to start processes, in which a lock keeps its name in shared
    # memory until its process ends in order; this one does not.
    mp.set_start_method("fork", force=True)
    mp.current_process()._config["daemon"] = False  # type: ignore[attr-defined]  # daemons may start no data loader's workers
    try:
        last = _packed(task(Parent(pipe), *args), None)
    except BaseException as error:
        last = _packed(None, f"{type(error).__name__}: {error}\n{traceback.format_exc()}")
    with suppress(OSError):
        pipe.send_bytes(last)
    os._exit(0)  # no destructor waits for the other ranks


def _packed(value: Any, error: str | None) -> bytes:
    """With tensors by value: multiprocessing's own way needs the sender to live on."""
    buffer = io.BytesIO()
    torch.save(Said(value, error), buffer)
    return buffer.getvalue()
