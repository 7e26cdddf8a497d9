"""Worlds of processes that wait their turn: started once, told to time themselves again and again, ended together."""

from __future__ import annotations

import multiprocessing as mp
import os
import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from bench_rank import rank_main

ANSWER_SECONDS = 900


class WorldFailed(Exception):
    """A rank has failed or does not answer; the text says what it said."""


class World:
    """P processes that are one world of torch.distributed on this machine.

    Args:
        ranks: P.
        task: a function of ``bench_rank``: ``task(pipe, *args)`` on every rank.
        args: its further arguments.
        folder: for the ranks' logs.
    """

    def __init__(self, ranks: int, task: Callable[..., None], args: tuple[Any, ...], folder: Path) -> None:
        context = mp.get_context("forkserver")
        context.set_forkserver_preload(["bench_rank"])  # all that is imported is shared
        port = _free_port()
        self._pipes: list[Connection] = []
        self._processes: list[Any] = []
        self._logs: list[Path] = []
        for rank in range(ranks):
            here, there = context.Pipe()
            log = Path(tempfile.mkstemp(dir=folder, suffix=f"-rank{rank}.log")[1])
            process = context.Process(target=rank_main, args=(there, rank, ranks, port, str(log), task, args), daemon=True)
            process.start()
            there.close()
            self._pipes.append(here)
            self._processes.append(process)
            self._logs.append(log)

    def ask(self, *command: Any) -> list[Any]:
        """Send ``command`` to every rank and wait for every answer."""
        try:
            for pipe in self._pipes:
                pipe.send(command)
        except OSError as error:
            raise WorldFailed(f"a rank is gone ({error})") from error
        return self.answers()

    def answers(self) -> list[Any]:
        """One answer from every rank. Raises :class:`WorldFailed`."""
        values: list[Any] = [None] * len(self._pipes)
        errors: list[str] = []
        waiting = dict(zip(self._pipes, range(len(self._pipes))))
        while waiting:
            # Once a rank has failed, the others wait for it in vain: they have a little time to say more.
            ready = wait(list(waiting), 5 if errors else ANSWER_SECONDS)
            if not ready:
                errors += [f"rank {rank}: no answer" for rank in waiting.values()]
                break
            for pipe in ready:
                assert isinstance(pipe, Connection)
                rank = waiting.pop(pipe)
                try:
                    kind, values[rank] = pipe.recv()
                except (EOFError, OSError):
                    kind = "error"
                    values[rank] = f"the process died; the end of its log:\n{self._logs[rank].read_text()[-1000:]}"
                if kind == "error":
                    errors.append(f"rank {rank}: {values[rank]}")
        if errors:
            raise WorldFailed("\n".join(errors))
        return values

    def end(self) -> None:
        """End the processes."""
        for process, pipe in zip(self._processes, self._pipes):
            pipe.close()
            process.kill()
        for process in self._processes:
            process.join(10)


@contextmanager
def worlds() -> Iterator[Callable[..., World]]:
    """Within, ``start(ranks, task, *args)`` starts worlds; at the end, or on Ctrl-C, all of them are ended."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ["OMP_NUM_THREADS"] = "1"
    # The server that forks the ranks imports its modules by this path alone.
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    started: list[World] = []
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        def start(ranks: int, task: Callable[..., None], *args: Any) -> World:
            world = World(ranks, task, args, Path(folder))
            started.append(world)
            return world

        try:
            yield start
        finally:
            for world in started:
                world.end()


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])
