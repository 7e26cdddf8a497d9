"""What the ranks of a free-running world do in the tests."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import engine_cases
import torch
import torch.distributed as dist
from nets import batches
from torch import Tensor


def endless(engine: Any, count: int = 8) -> Iterator[tuple[Tensor, Tensor]] | None:
    replica = engine.mpu.get_data_parallel_rank()
    replicas = engine.mpu.get_data_parallel_world_size()
    return cycle(batches(count, 4, replica=replica, replicas=replicas)) if engine.is_first_stage() else None


def counts(engine: Any) -> dict[str, Any]:
    """What this rank has done, without asking the others."""
    report = engine.network.report(engine.plan.k)
    return {"rank": engine.stage_id, "turns": dict(engine.runner.turns), "sent": dict(engine.runner.sent),
            "updates": {s: worker.optimizer.updates for s, worker in engine.workers.items()},
            "rings": {s: ring["uses"] for s, ring in report["rings"].items()},
            "overwritten": {s: ring["overwritten_unseen"] for s, ring in report["rings"].items()},
            "unsent": report["unsent"], "held": report["held"], "replica": engine.mpu.get_data_parallel_rank()}


def train(case: dict[str, Any]) -> dict[str, Any]:
    """``calls`` calls, a drain, and the counts. ``waits``: this rank waits in the middle until rank 0 has made its calls, which
    says so by the file ``done``."""
    engine = engine_cases.build(case)
    data, initial = endless(engine), engine_cases.state_of(engine)
    started = time.monotonic()
    losses = []
    for step in range(case["calls"]):
        losses.append(engine.train_batch(data).item())
        if step == 2 and case.get("sleep", (None, 0))[0] == engine.stage_id:
            time.sleep(case["sleep"][1])
        while step == 2 and case.get("waits") == engine.stage_id and not Path(case["done"]).exists():
            time.sleep(0.01)
    if "done" in case and engine.stage_id == 0:
        Path(case["done"]).touch()
    done = time.monotonic() - started
    before = counts(engine)
    engine.drain()
    summary, metrics = engine.decoupled_summary(), engine.stage_metrics()
    return {**counts(engine), "before": before, "losses": losses, "seconds": done, "summary": summary, "metrics": metrics,
            "initial": initial, "state": engine_cases.state_of(engine), "in_flight": engine.in_flight}


def in_the_middle(case: dict[str, Any], folder: str) -> dict[str, Any]:
    """Evaluation, a checkpoint and a drain in the middle of it; then resume, in the same process and in a new engine."""
    engine = engine_cases.build(case)
    data = endless(engine)
    values = []
    for _ in range(3):
        for _ in range(4):
            engine.train_batch(data)
        values.append(engine.eval_batch(iter(batches(2, 4, seed=99)), num_micro_batches=2).item())
    engine.save_checkpoint(folder)
    at_save, saved = engine_cases.state_of(engine), _counted(engine)
    dist.barrier()  # nobody goes on before all have looked
    for _ in range(4):
        engine.train_batch(data)
    engine.drain()
    if engine.stage_id == 1:
        _slow_to_load(engine.network.rings[engine.network.bottom])
    engine.load_checkpoint(folder)
    loaded, unsent = engine_cases.state_of(engine), counts(engine)["unsent"]
    differing = [name for name, value in at_save.items() if not torch.equal(value, loaded[name])]
    for _ in range(3):  # rank 0 sends at once
        engine.train_batch(data)
    engine.drain()
    after = _counted(engine)
    return _leaving(engine, {"rank": engine.stage_id, "values": values, "differing": differing, "replica": 0, "saved": saved,
                             "after": after, "unsent_before": unsent})


def _counted(engine: Any) -> dict[str, Any]:
    """What the topmost stage has made, how much of it was not sent, and what has come into the bottom stage's ring."""
    found = counts(engine)
    return {"made": found["sent"][engine.network.top], "unsent": found["unsent"],
            "came": {stage: sum(uses.values()) for stage, uses in found["rings"].items()}.get(engine.network.bottom)}


def _slow_to_load(ring: Any) -> None:
    load = ring.load_state_dict

    def slow(state: Any) -> None:
        time.sleep(0.5)
        load(state)

    ring.load_state_dict = slow


def data_that_end(case: dict[str, Any]) -> dict[str, Any]:
    """Every rank trains until it learns of the end; then all drain, and go on with new data."""
    engine = engine_cases.build(case)
    calls, told = _until_the_end(engine, 7)
    engine.drain()
    seen = counts(engine)
    dist.barrier()  # nobody goes on before all have counted
    fresh = endless(engine)
    for _ in range(3):
        engine.train_batch(fresh)
    engine.drain()
    return _leaving(engine, {"calls": calls, "told": told, "seen": seen, "after": counts(engine), "replica": 0})


def _until_the_end(engine: Any, batches: int) -> tuple[int, str]:
    """Calls, and what the last one raised."""
    data = None if engine.stage_id else islice(endless(engine), batches)  # type: ignore[arg-type]
    for calls in range(10**9):
        try:
            engine.train_batch(data)
        except StopIteration as end:
            return calls, str(end)
    raise AssertionError


def end_again(case: dict[str, Any]) -> list[str]:
    """New data end as soon as rank 0 has drained, while the others are slow to."""
    engine = engine_cases.build(case)
    told = [_until_the_end(engine, 3)[1]]
    if engine.stage_id:
        use_up = engine.runner._use_up
        engine.runner._use_up = lambda: (time.sleep(0.5), use_up())
    engine.drain()
    told.append(_until_the_end(engine, 2)[1])
    engine.drain()
    engine.network.leave()
    return told


def leave_early(case: dict[str, Any], folder: str) -> dict[str, Any]:
    """Rank ``leaves`` does three calls and its process ends; the others go on, until long after that."""
    engine = engine_cases.build(case)
    data, gone = endless(engine), Path(folder, "gone")
    if engine.stage_id == case["leaves"]:
        for _ in range(3):
            engine.train_batch(data)
        gone.write_text(str(os.getpid()))
        return _leaving(engine, counts(engine))
    calls = 0
    while calls < 20 or not _is_over(gone):
        engine.train_batch(data)
        calls += 1
    for _ in range(30):
        engine.train_batch(data)
    return _leaving(engine, {**counts(engine), "calls": calls + 30})


def _leaving(engine: Any, result: dict[str, Any]) -> dict[str, Any]:
    """A test's ranks leave without what Python does at exit; a script's ranks come by here then."""
    engine.network.leave()
    return result


def _is_over(file: Path) -> bool:
    """Whether the process whose number stands in ``file`` has ended."""
    if not file.exists() or not file.read_text():
        return False
    status = Path(f"/proc/{file.read_text()}/stat")
    return not status.exists() or status.read_text().rsplit(")", 1)[1].split()[0] == "Z"


def fail_at(case: dict[str, Any]) -> list[str]:
    """Rank ``fails`` raises, or is gone without a word, after three calls; the others go on until they learn of it."""
    engine = engine_cases.build(case)
    data = endless(engine)
    for step in range(100_000):
        if engine.stage_id == case["fails"] and step == 3:
            if case.get("killed"):
                os._exit(1)
            engine.stages[engine.network.bottom].layers[0].forward = _broken
        engine.train_batch(data)
    return []


def _broken(*_: Any) -> Any:
    raise ValueError("a layer broke")


def stalls(case: dict[str, Any], folder: str) -> dict[str, Any]:
    """Rank 1's whole process stands still while rank 0 trains on, and then goes on."""
    engine = engine_cases.build(case)
    data, file = endless(engine), Path(folder, "pid")
    if engine.stage_id == 1:
        file.write_text(str(os.getpid()))
    for _ in range(5):
        engine.train_batch(data)
    seconds = 0.0
    most = {"sent": 0, "queued": 0}
    if engine.stage_id == 0:
        while not file.exists() or not file.read_text():
            time.sleep(0.01)
        os.kill(int(file.read_text()), signal.SIGSTOP)
        try:
            started = time.monotonic()
            for _ in range(case["calls"]):
                engine.train_batch(data)
                held = engine.network.held()
                most = {key: max(most[key], held[key]) for key in most}
            seconds = time.monotonic() - started
        finally:
            os.kill(int(file.read_text()), signal.SIGCONT)
    for _ in range(5):
        engine.train_batch(data)
    engine.drain()
    return _leaving(engine, {**counts(engine), "seconds": seconds, "most": most})


def long(case: dict[str, Any]) -> dict[str, Any]:
    """Many calls of a fast rank before a slow one; the most that was ever held."""
    engine = engine_cases.build(case)
    data = endless(engine)
    most = {"sent": 0, "sent_bytes": 0, "arrived": 0, "queued": 0}
    for _ in range(case["calls"] // (1 if engine.stage_id == 0 else case["slower"])):
        engine.train_batch(data)
        held = engine.network.held()
        most = {key: max(most[key], held[key]) for key in most}
    engine.drain()
    ring = engine.network.rings.get(engine.network.bottom)
    return _leaving(engine, {**counts(engine), "most": most, "ring": 0 if ring is None else len(ring.order.uses)})
