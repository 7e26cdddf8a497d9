"""Worlds of processes: what ranks say, how they fail, and that nothing of them is left."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import worlds

from run.worlds import Parent, World, WorldFailed, first_to_speak


def times(parent: Parent, factor: int) -> str:
    parent.tell("ready")
    while (number := parent.told()) is not None:
        parent.tell(factor * number)
    return f"rank {os.environ['RANK']} is done"


def second_rank(_: Parent, does: str) -> None:
    if os.environ["RANK"] == "1":
        print("a last word", flush=True)
        if does == "dies":
            os._exit(3)
        if does == "fails":
            raise ValueError("no such thing")
    time.sleep(1000)


def meet(_: Parent) -> tuple[torch.Tensor, int, int]:
    """What all ranks gather: a tensor, and this rank's threads and cores."""
    dist.init_process_group("gloo")
    x = torch.full((1 << 18,), float(dist.get_rank() + 1))
    dist.all_reduce(x)
    return x, torch.get_num_threads(), len(os.sched_getaffinity(0))


def of_world(world: World) -> tuple[list[Any], Path]:
    return world._processes, Path(world._folder.name)


def test_ranks_talk_and_return() -> None:
    with World(2, times, 7) as world:
        assert world.answers() == ["ready", "ready"]
        assert world.ask(6) == [42, 42]
        assert world.ask(None) == ["rank 0 is done", "rank 1 is done"]


def test_ranks_meet_and_tensors_outlive_them() -> None:
    with World(2, meet, threads=3) as world:
        results = world.answers()
    for x, threads, _ in results:
        assert torch.equal(x, torch.full((1 << 18,), 3.0)) and threads == 3
    if len(os.sched_getaffinity(0)) > 1:
        with World(2, meet, pinned=True) as world:
            assert [cores for _, _, cores in world.answers()] == [1, 1]


@pytest.mark.parametrize("does, said", [
    ("fails", "ValueError: no such thing\nTraceback"), ("dies", "the process died.*a last word")])
def test_a_failed_world_says_why_and_the_others_go_on(does: str, said: str) -> None:
    begun = time.monotonic()
    with World(2, times, 7) as well, World(2, second_rank, does) as ill:
        with pytest.raises(WorldFailed, match=f"(?s)rank 1: {said}") as failure:
            ill.answers(grace=0.5)
        assert failure.value.errors[0] == "no answer within 0.5 s; the end of its output:\n"
        assert well.answers() == ["ready", "ready"]
        well.tell(6)
        assert first_to_speak([well]) == [well]
        assert well.answers() == [42, 42]
        left = [of_world(well), of_world(ill)]
    assert time.monotonic() - begun < 60
    for processes, folder in left:
        assert not any(process.is_alive() for process in processes) and not folder.exists()


def test_worlds_end_with_the_block_that_fails() -> None:
    with pytest.raises(ZeroDivisionError), World(2, second_rank, "waits") as world:
        processes, folder = of_world(world)
        raise ZeroDivisionError
    assert not any(process.is_alive() for process in processes) and not folder.exists()


def locks() -> int:
    """How many names a rank's lock and queue leave in shared memory while the rank lives."""
    import multiprocessing as mp

    before = set(os.listdir("/dev/shm"))
    held = mp.Lock(), mp.Queue()
    return len(set(os.listdir("/dev/shm")) - before) if held else -1


def test_ranks_leave_no_names_in_shared_memory() -> None:
    assert worlds.run(1, locks) == [0]
