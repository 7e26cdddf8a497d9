"""Layer-wise updates on a virtual clock: against the definition, and staleness by its law."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import engine_cases
import layerwise_cases
import pytest
import torch
import worlds
from nets import batches_for
from pd_oracle import LayerwiseOracle

from ds_decoupled.schedules import Placement, Plan, format_actions
from ds_decoupled.schedules.layerwise import LayerwiseOrder, Threads

BASE: dict[str, Any] = {"method": "pd_asgd", "net": "reversible", "stages": 7, "batches": 12}
ONES, TWOS = [1] * 7, [2] * 7


def case_of(threads: Any = None, times: tuple[list[int], list[int]] | None = None, **more: Any) -> dict[str, Any]:
    block = {"pace": "clock", "threads": threads or {}, **more.pop("block", {})}
    if times is not None:
        block["pass_times"] = {"forward": times[0], "backward": times[1]}
    return {**BASE, **more, "block": block}


def oracle_of(case: dict[str, Any], results: list[dict[str, Any]]) -> LayerwiseOracle:
    bounds, block = results[0]["summary"]["stage_layers"], case["block"]
    threads = {"backward": "auto"} if block["threads"] == "auto" else block["threads"]
    times = block.get("pass_times", {})
    backward = threads.get("backward", 2)
    workers = threads.get("workers")
    counted = (workers, workers) if workers else (threads.get("forward", 1), 2 if backward == "auto" else backward)
    return LayerwiseOracle(
        engine_cases.stages_from(engine_cases.merged(results, "initial"), case, bounds),
        forward=times.get("forward", [1] * len(bounds)), backward=times.get("backward", [2] * len(bounds)),
        threads=counted, queue=threads.get("queue", 0), most=workers or 10**9,
        snapshot=block.get("weights") == "stashed", k=case.get("k", 1), clip=case.get("clip", 0.0))


CASES: dict[str, dict[str, Any]] = {
    "1:2": case_of(),
    "1:1": case_of({"backward": 1}),
    "2:1, queue": case_of({"forward": 2, "backward": 1, "queue": 2}),
    "1:1, queue, k": case_of({"backward": 1, "queue": 3}, k=2, clip=0.1),
    "2:2, uneven": case_of({"forward": 2, "backward": 2, "queue": 1}, ([2, 1, 3, 1, 1, 2, 1], [3, 2, 5, 1, 4, 2, 3])),
    "1:3, uneven": case_of({"backward": 3}, ([2, 1, 3, 1, 1, 2, 1], [3, 2, 5, 1, 4, 2, 3])),
    "snapshot": case_of({"backward": 2, "queue": 1}, block={"weights": "stashed"}),
    "block updates": case_of({"backward": 2}, stages=1),
    "auto": case_of("auto", stages=3),
    "in place": case_of({"backward": 2}, net="plain", stages=6),
    "workers": case_of({"workers": 3}, stages=1),
    "workers, layer by layer": case_of({"workers": 3}),
    "slow backward": case_of({"backward": 1}, (ONES, [5] * 7)),
}

#: As many forward passes as backward threads can take, so that updates follow one another evenly.
EVEN = ("1:2", "1:1", "2:1, queue", "1:1, queue, k", "snapshot", "block updates", "auto", "in place", "slow backward")


@pytest.fixture(scope="module")
def trained() -> dict[str, tuple[dict[str, Any], LayerwiseOracle]]:
    """All cases, in one world of one rank; and what the definition says."""
    [results] = worlds.run(1, engine_cases.train_all, list(CASES.values()), timeout=300)
    found = {}
    for (name, case), result in zip(CASES.items(), results):
        oracle = oracle_of(case, [result])
        oracle.train(batches_for(case["net"], case["batches"], 4))
        found[name] = result, oracle
    return found


@pytest.mark.parametrize("name", CASES)
def test_the_definition(name: str, trained: dict[str, tuple[dict[str, Any], LayerwiseOracle]]) -> None:
    result, oracle = trained[name]
    initial, state, summary = result["initial"], result["state"], result["summary"]
    assert sum(not torch.equal(initial[n], state[n]) for n in state) > len(state) // 2, "nothing was trained"
    for s, layers in enumerate(summary["stage_layers"]):
        for index, layer in zip(layers, oracle.layers[s]):
            for n, value in layer.state_dict().items():
                assert torch.equal(state[f"{index}.{n}"], value), (index, n)
    assert summary["updates"] == oracle.versions and summary["delays"] == [None] * len(oracle.layers)
    for told, stale in zip(summary["staleness"], oracle.stale):
        assert told["often"] == {n: stale.count(n) for n in sorted(set(stale))}
        assert told["max"] == max(stale) and told["mean"] == pytest.approx(sum(stale) / len(stale))


@pytest.mark.parametrize("name", EVEN)
def test_staleness_obeys_its_law(name: str, trained: dict[str, tuple[dict[str, Any], LayerwiseOracle]]) -> None:
    """ceil(R D) - 1 on every layer, once the threads are in their stride."""
    _, oracle = trained[name]
    k, m = oracle.k, CASES[name]["batches"] - 2 * oracle.k - 1
    for i, written in enumerate(oracle.written):
        period = (written[m] - written[m - 2]) / 2 * k
        if k == 1:
            assert oracle.stale[i][m] == oracle.law(i, m, period), (name, i)
        else:  # an update is that of the k-th: on the mean of k micro-batches
            assert abs(sum(oracle.stale[i][m - k + 1:m + 1]) / k - (written[m] - oracle.read[i][m]) / period) <= 1
    if name == "block updates":
        assert oracle.stale[0][m] == 2


def test_layerwise_updates_are_fresher() -> None:
    """Eight layers, a backward pass of two forward passes (papers: 1.12 updates for 1:2, and 2 for updates of the whole)."""
    def mean_of(stages: int, per_stage: int) -> float:
        order = LayerwiseOrder(Plan.make(Placement.of(stages, 1), hops=(0, 1), k=1, recover="graph", flush=False),
                               Threads(1, 2, forward_times=(per_stage,) * stages, backward_times=(2 * per_stage,) * stages))
        updates, seen, stale = [0] * stages, [{} for _ in range(stages)], [[] for _ in range(stages)]
        for _ in range(40):
            for action in order.call():
                if action.kind.letter == "F":
                    seen[action.stage][action.micro_batch] = updates[action.stage]
                elif action.kind.letter == "B":
                    stale[action.stage].append(updates[action.stage] - seen[action.stage][action.micro_batch])
                elif action.kind.letter == "U":
                    updates[action.stage] += 1
        return sum(late[-1] for late in stale) / stages

    assert mean_of(8, 1) == pytest.approx(1.125) and mean_of(1, 8) == 2


def test_order_reads() -> None:
    order = LayerwiseOrder(Plan.make(Placement.of(2, 1), hops=(0, 1), k=1, recover="graph", flush=False), Threads(1, 2))
    assert [format_actions(order.call()) for _ in range(4)] == [
        "0L0 0F0 1F0", "0L1 0F1 1F1 1B0 1U0", "0L2 0F2 1F2 0B0 0U0 1B1 1U1", "0L3 0F3 1F3 0B1 0U1 1B2 1U2"]


def test_replicas() -> None:
    """Every stage's gradients are averaged, in one order on all of them."""
    found = worlds.run(2, layerwise_cases.replicas, {**CASES["1:2"], "pipe_ranks": 1})
    results = [result for result, _ in found]
    weights = [name for name in results[0]["state"] if "running" not in name and "tracked" not in name]
    assert all(torch.equal(results[0]["state"][name], results[1]["state"][name]) for name in weights)
    assert not torch.equal(results[0]["state"]["0.norm.running_mean"], results[1]["state"]["0.norm.running_mean"])
    for _, pipe in found:
        assert '"decoupled.update": \'layerwise\'' in pipe and "2 pipe ranks" in pipe


def test_resume(tmp_path: Path) -> None:
    """Whatever is in flight, half a forward pass and all: as the run that was never stopped, dropout too."""
    cases = [{**CASES[name], "stop": 4, "net_args": {"dropout": 0.1}} for name in ("2:2, uneven", "1:1, queue, k")]
    [found] = worlds.run(1, layerwise_cases.stopped_and_not, cases, str(tmp_path))
    for whole, resumed in found:
        assert all(torch.equal(whole["state"][n], resumed["state"][n]) for n in whole["state"])
