"""Stages at their own pace on a virtual clock: against the definition, and wherever stages are placed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import engine_cases
import pytest
import torch
import worlds
from async_oracle import AsyncOracle
from local_oracle import copies
from nets import batches_for

from ds_decoupled.axes import PRESETS
from ds_decoupled.config import block_of
from ds_decoupled.schedules import Kind, Placement, Plan, format_actions
from ds_decoupled.schedules.asynchronous import AsynchronousOrder, OwnPace
from ds_decoupled.schedules.replay import Replay
from ds_decoupled.schedules.turns import Clock

BASE: dict[str, Any] = {"method": "dgl_async", "net": "reversible", "stages": 4, "batches": 14}


def case_of(replay: dict[str, Any], clock: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    block = {"input_shape": [2, 8, 8], "pace": "clock", "replay": replay, "clock": clock or {}, **more.pop("block", {})}
    return {**BASE, **more, "block": block}


def oracle_of(case: dict[str, Any], results: list[dict[str, Any]]) -> AsyncOracle:
    bounds, block = results[0]["summary"]["stage_layers"], case["block"]
    replay, clock = block["replay"], block["clock"]
    return AsyncOracle(engine_cases.stages_from(engine_cases.merged(results, "initial"), case, bounds),
                       copies(engine_cases.merged(results, "initial_heads"), len(bounds)), size=replay["size"],
                       cap=replay.get("cap"), oldest=replay.get("authors_ring", False), warm=clock.get("warm_start", True),
                       seed=clock.get("seed", 0), durations=clock.get("durations"), slow=block.get("slow_down"),
                       k=case.get("k", 1), stop_after=block.get("stop_after"), lesson=block.get("head_teaching"))


def check(case: dict[str, Any], results: list[dict[str, Any]]) -> AsyncOracle:
    """What the ranks of a world came to, against the definition."""
    oracle = oracle_of(case, results)
    oracle.train(batches_for(case["net"], case["batches"], 4))
    initial, state = (engine_cases.merged(results, key) for key in ("initial", "state"))
    summary = results[0]["summary"]
    expected = {f"{index}.{name}": value for s, layers in enumerate(summary["stage_layers"])
                for index, layer in zip(layers, oracle.stages[s]) for name, value in layer.state_dict().items()}
    assert sum(not torch.equal(initial[name], state[name]) for name in state) > len(state) // 2, "nothing was trained"
    for name, value in expected.items():
        assert torch.equal(state[name], value), name
    for s, head in engine_cases.merged(results, "heads").items():
        for name, value in oracle.heads[s].state_dict().items():
            assert torch.equal(head.state_dict()[name], value), f"head {s}: {name}"
    assert summary["updates"] == oracle.updates
    told = [{int(n): count for n, count in ring["uses"].items()} for ring in summary["replay"]]
    for uses, buffer in zip(told, oracle.buffers[1:]):
        counted = [*buffer.gone, *(entry[1] for entry in buffer.entries)]
        assert uses == {n: counted.count(n) for n in set(counted)}
    return oracle


CASES: dict[str, dict[str, Any]] = {
    "drawn": case_of({"size": 2}, {"seed": 3}),
    "slowed": case_of({"size": 3}, {"seed": 1}, block={"slow_down": [1, 2, 1, 1.5]}, k=2),
    "no warm start": case_of({"size": 2}, {"warm_start": False}),
    "one": case_of({"size": 1}, {"seed": 5}),
    "cap": case_of({"size": 2, "cap": 1}, {"seed": 2}),
    "authors": case_of({"size": 3, "authors_ring": True}, {"seed": 2}),
    "durations": case_of({"size": 2}, {"durations": [1, 0.5, 2, 1]}),
    "durations, cap, no warm start": case_of({"size": 2, "cap": 2}, {"durations": [2, 0.5, 0.25, 3], "warm_start": False}),
    "slowed durations": case_of({"size": 4}, {"durations": [1, 1, 1, 1]}, block={"slow_down": [3, 1, 1, 1]}, k=2),
    "done early": case_of({"size": 2}, {"seed": 4}, block={"stop_after": [4, 6, None, 9]}),
    "fewer than a ring": case_of({"size": 50}),
    "taught": case_of({"size": 2}, {"seed": 3}, block={"head_teaching": {"updates": 2, "lr": 0.03, "warmup": 0.5}}, k=2),
}


@pytest.fixture(scope="module")
def trained() -> dict[str, list[dict[str, Any]]]:
    """All cases, in one world of one rank."""
    [results] = worlds.run(1, engine_cases.train_all, list(CASES.values()), timeout=300)
    return {name: [result] for name, result in zip(CASES, results)}


@pytest.mark.parametrize("name", CASES)
def test_the_definition(name: str, trained: dict[str, list[dict[str, Any]]]) -> None:
    oracle = check(CASES[name], trained[name])
    if name in ("drawn", "slowed", "cap"):
        assert len(set(oracle.turns)) > 1  # they did go at their own pace
    if name == "cap":
        assert sum(oracle.idle) > 0 and all(uses <= 1 for b in oracle.buffers for uses in b.gone)


def test_placement() -> None:
    """The same numbers on 1, 2 and 4 ranks, dropout and all."""
    cases = [{**CASES[name], "net_args": {"dropout": 0.2}} for name in ("slowed", "durations, cap, no warm start")]
    [one] = worlds.run(1, engine_cases.train_all, cases)
    for ranks in (2, 4):
        found = worlds.run(ranks, engine_cases.train_all, cases)
        for alone, results in zip(one, zip(*found)):
            state = engine_cases.merged(list(results))
            assert all(torch.equal(alone["state"][name], state[name]) for name in state) and len(state) == len(alone["state"])
            assert results[0]["summary"]["messages_sent"] > 0


@pytest.mark.parametrize("ranks", [(1, 1), (2, 4)])
def test_resume(ranks: tuple[int, int], tmp_path: Path) -> None:
    """Rings, turns and what is accumulated: as the run that was never stopped."""
    case = {**CASES["slowed"], "stop": 4, "net_args": {"dropout": 0.1}}
    whole = worlds.run(1, engine_cases.train, case)
    worlds.run(ranks[0], engine_cases.train_and_stop, case, str(tmp_path / "a"))
    resumed = worlds.run(ranks[1], engine_cases.resume, case, str(tmp_path / "a"), str(tmp_path / "b"))
    a, b = engine_cases.merged(whole), engine_cases.merged(resumed)
    assert all(torch.equal(a[name], b[name]) for name in a)
    c = engine_cases.merged(worlds.run(1, engine_cases.resume, case, str(tmp_path / "b")))
    assert all(torch.equal(a[name], c[name]) for name in a)


def test_another_k() -> None:
    """Between two calls, where no stage is in the middle of an update: every update is of as many gradients as k says then."""
    placement = Placement.of(2, 1)
    plans = [Plan.make(placement, hops=(0, 1), k=k, recover="graph", flush=False, window=1) for k in (2, 3)]
    order = AsynchronousOrder(plans[0], OwnPace(Replay(size=2), Clock(durations=(1.0, 1.0))))
    before = [action for _ in range(4) for action in order.call()]
    order.plan = plans[1]
    after = [action for _ in range(3) for action in order.call()]
    made = [[action.micro_batch for action in actions if action.kind is Kind.UPDATE and action.stage == 0]
            for actions in (before, after)]
    assert made == [[0, 1], [2]] and order.gradients == [0, 0]


def test_order_reads() -> None:
    """The first turns, as text: a warm start, then who is drawn."""
    order = AsynchronousOrder(Plan.make(Placement.of(3, 2), hops=(0, 1), k=2, recover="graph", flush=False, window=1),
                              OwnPace(Replay(size=2), Clock(durations=(1.0, 1.0, 2.0))))
    assert [format_actions(order.call()) for _ in range(3)] == [
        "0L0 0X0 0SA0 1RA0 1X0 2X0",
        "0L1 0X1 0SA1 1RA1 0U0 1X1 1U0 2X1 2U0",
        "0L2 0X2 0SA2 1RA2 1X2"]


def test_the_pace_follows_the_input() -> None:
    assert PRESETS["dgl_async"].pace == "free"
    block = block_of({"decoupled": {"method": "dgl", "input": "replay"}})
    assert block is not None and block.axes() == PRESETS["dgl_async"]
