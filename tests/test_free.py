"""Ranks that run free: nothing lost that was not counted, nothing used twice as new, and nobody waits for anybody."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import engine_cases
import free_cases
import pytest
import torch
import worlds

BASE: dict[str, Any] = {"method": "dgl_async", "net": "reversible", "stages": 4, "calls": 12, "timeout": 60}


def case_of(replay: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    return {**BASE, **more, "block": {"input_shape": [2, 8, 8], "replay": replay or {"size": 3}, **more.get("block", {})}}


def check_counts(results: list[dict[str, Any]], calls: int, k: int = 1) -> None:
    """Every rank has made its own updates; whatever a rank made has come to the next one's ring, or was counted as unsent."""
    by_rank = {result["rank"]: result for result in results if result["replica"] == 0}
    for result in by_rank.values():
        assert all(turns >= calls * k for turns in result["turns"].values())
        assert all(updates >= calls for updates in result["updates"].values())
    for rank, result in by_rank.items():
        for stage, uses in result["rings"].items():
            # What a rank only forwards goes from layer to layer, and through no ring but the first.
            inner = stage - 1 in result["sent"]
            made = result["turns"][stage - 1] if inner else by_rank[rank - 1]["sent"][stage - 1] - by_rank[rank - 1]["unsent"]
            assert sum(uses.values()) == made, (rank, stage)
            assert sum(int(n) * count for n, count in uses.items()) == result["turns" if inner else "sent"][stage]


@pytest.mark.parametrize("ranks, k", [(1, 2), (2, 1), (3, 2)])
def test_counts(ranks: int, k: int) -> None:
    results = worlds.run(ranks, free_cases.train, case_of(k=k))
    check_counts(results, BASE["calls"], k)
    initial, state = (engine_cases.merged(results, key) for key in ("initial", "state"))
    assert sum(not torch.equal(initial[name], state[name]) for name in state) > len(state) // 2
    summary = results[0]["summary"]
    assert len(summary["replay"]) == 3 and len(results[0]["metrics"]) == 4
    assert all(result["in_flight"] == 0 for result in results)


def test_on_one_rank_it_is_the_synchronous_method() -> None:
    """Every stage uses what has just come up: the numbers are those of ``dgl``."""
    free = worlds.run(1, free_cases.train, case_of(calls=8))
    same = worlds.run(1, engine_cases.train, {**BASE, "method": "dgl", "batches": 8, "block": {"input_shape": [2, 8, 8]}})
    a, b = engine_cases.merged(free), engine_cases.merged(same)
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("slow", [0, 1])
def test_a_slow_rank_stops_nobody(slow: int) -> None:
    """One rank sleeps for two seconds; the other has done its calls long before."""
    results = worlds.run(2, free_cases.train, case_of(sleep=(slow, 2.0)))
    check_counts(results, BASE["calls"])
    assert results[slow]["seconds"] >= 2.0 > results[1 - slow]["seconds"]
    if slow == 1:  # it found more than its ring holds
        assert sum(results[1]["before"]["overwritten"].values()) > 0
    else:  # it had nothing new, and used what it had again
        assert max(int(n) for n in results[1]["before"]["rings"][2]) > 1


def test_slow_down() -> None:
    """The setting: stages that are twenty times slower make their rank so."""
    results = worlds.run(2, free_cases.train, case_of(calls=20, block={"slow_down": [1, 1, 20, 20]}))
    assert results[1]["seconds"] > 2 * results[0]["seconds"]


@pytest.mark.parametrize(("ranks", "slow"), [(2, 1), (3, 1), (3, 2)])
def test_a_cap_ends_no_run(ranks: int, slow: int, tmp_path: Path) -> None:
    """A rank that stood still while its ring was overwritten has less to use than calls to make; the ranks below, which have
    made theirs, wait for it in the next call of all ranks."""
    case = case_of({"size": 2, "cap": 1}, waits=slow, done=str(tmp_path / "done"), timeout=20)
    results = worlds.run(ranks, free_cases.train, case)
    by_rank = {result["rank"]: result for result in results}
    assert max(int(n) for result in results for uses in result["rings"].values() for n in uses) == 1
    rings = results[0]["summary"]["replay"]
    lowest = [min(result["turns"]) for _, result in sorted(by_rank.items())]
    for rank in range(ranks):
        idle = rings[lowest[rank] - 1]["idle"] if rank else 0
        assert by_rank[rank]["before"]["turns"][lowest[rank]] == BASE["calls"] - idle
    assert rings[lowest[slow] - 1]["idle"] > 0


def test_in_the_middle(tmp_path: Path) -> None:
    """Behind a checkpoint is what was there, also where rank 0 has loaded and sends before rank 1 has loaded its ring."""
    below, above = worlds.run(2, free_cases.in_the_middle, case_of(), str(tmp_path))
    for result in (below, above):
        assert len(result["values"]) == 3 and not result["differing"]
        assert all(value == value for value in result["values"])
    assert above["saved"]["came"] == below["saved"]["made"] - below["saved"]["unsent"]
    dropped = below["saved"]["unsent"] + below["after"]["unsent"] - below["unsent_before"]
    assert above["after"]["came"] == below["after"]["made"] - dropped > above["saved"]["came"]


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_data_that_end(ranks: int) -> None:
    results = worlds.run(ranks, free_cases.data_that_end, case_of())
    assert results[0]["calls"] == 7
    for result in results:
        assert "the data ended" in result["told"]
        # What came is used, by the calls or by the drain: no message is left that nobody has seen.
        assert all("0" not in uses or result["seen"]["overwritten"][s] == uses["0"]
                   for s, uses in result["seen"]["rings"].items())
        assert all(n >= result["seen"]["turns"][s] + 3 for s, n in result["after"]["turns"].items())


def test_data_that_end_again() -> None:
    """What rank 0 says behind a drain is not taken for something of before it, however long others take."""
    for told in worlds.run(2, free_cases.end_again, case_of(timeout=15)):
        assert len(told) == 2 and all("the data ended" in words for words in told)


@pytest.mark.parametrize("leaves", [0, 1])
def test_a_rank_that_leaves_stops_nobody(leaves: int, tmp_path: Path) -> None:
    results = worlds.run(2, free_cases.leave_early, case_of(leaves=leaves), str(tmp_path))
    assert results[1 - leaves]["calls"] >= 50
    if leaves == 1:
        assert results[0]["unsent"] > 0


@pytest.mark.parametrize("fails", [0, 1, 2])
@pytest.mark.parametrize("killed", [False, True])
def test_a_rank_that_fails_is_told_of(fails: int, killed: bool) -> None:
    with pytest.raises(worlds.RankFailed) as failed:
        worlds.run(3, free_cases.fail_at, case_of(fails=fails, killed=killed), timeout=100)
    words = str(failed.value)
    for rank in range(3):
        if killed and rank == fails:
            continue
        assert f"rank {rank}" in words
    assert ("gone" in words) if killed else words.count("a layer broke") >= 3, words


def test_a_process_that_stands_still(tmp_path: Path) -> None:
    """The sender goes on, holds no more than its queue, and counts what it dropped."""
    results = worlds.run(2, free_cases.stalls, case_of({"size": 2}, calls=60, block={"queue": 3}), str(tmp_path))
    check_counts(results, 10)
    assert results[0]["unsent"] > 0 and results[0]["most"]["sent"] <= 3 + 2  # an announcement beside a message, at most


def test_bounded() -> None:
    results = worlds.run(2, free_cases.long, case_of({"size": 2}, calls=600, slower=5, block={"queue": 4}))
    check_counts(results, 120)
    for result in results:
        assert result["most"]["sent"] <= 4 + 2 and result["most"]["arrived"] <= 1 and result["ring"] <= 2


def test_replicas() -> None:
    results = worlds.run(4, free_cases.train, case_of(pipe_ranks=2))
    a, b = (sorted((r for r in results if r["replica"] == n), key=lambda r: r["rank"]) for n in (0, 1))
    for one, other in zip(a, b):
        weights = [name for name in one["state"] if "running" not in name and "tracked" not in name]
        assert all(torch.equal(one["state"][name], other["state"][name]) for name in weights)


def test_a_cap_and_replicas() -> None:
    with pytest.raises(worlds.RankFailed, match="step together"):
        worlds.run(4, free_cases.train, case_of({"size": 2, "cap": 2}, pipe_ranks=2))
