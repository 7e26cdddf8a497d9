"""Replicas whose threads run free: the mean is conserved, nothing stands still, and who fails is told everywhere."""

from __future__ import annotations

from typing import Any

import exchange_cases
import pytest
import torch
import worlds

GOSSIP, AVERAGE, ALLREDUCE = "gossip", {"kind": "average", "every": 4}, "allreduce"
KINDS: dict[str, Any] = {"gossip": GOSSIP, "average": AVERAGE, "allreduce": ALLREDUCE}
#: Exchange, threads, micro-batches of each replica, k, method.
COUNTED: dict[str, tuple[Any, dict[str, Any], list[int], int, str]] = {
    "gossip, 1:2": (GOSSIP, {"backward": 2}, [300, 200], 1, "pd_asgd"),
    "gossip, workers, k": ({"kind": "gossip", "every": 2}, {"workers": 2}, [200, 120], 2, "hogwild"),
    "average, 1:2": (AVERAGE, {"backward": 2, "queue": 1}, [300, 200], 1, "pd_asgd"),
    "average, lapsgd": (None, {}, [100, 160], 1, "lapsgd"),
    "allreduce, 1:2": (ALLREDUCE, {"backward": 2}, [200, 200], 1, "pd_asgd"),
    "allreduce, 2:2, k": (ALLREDUCE, {"forward": 2, "backward": 2, "queue": 1}, [120, 120], 4, "pd_asgd"),
}
PLAIN = {"allreduce": {"batches": 5, "block": {"threads": {"backward": 1}, "exchange": "allreduce"}}}
REFUSED: dict[str, dict[str, Any]] = {
    '"decoupled.exchange": \'gossip\' cannot be used: BF16_Optimizer': {"config": {"bf16": {"enabled": True}}},
}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """All that two replicas can do in one world, by replica."""
    jobs: dict[str, tuple[str, list[Any]]] = {name: ("count_updates", list(args)) for name, args in COUNTED.items()}
    for name, exchange in KINDS.items():
        block = {"threads": {"backward": 2, "queue": 1}, "exchange": exchange}
        jobs |= {f"{name}, middle": ("in_the_middle", [{"block": block, "k": 2}, str(tmp_path_factory.mktemp("saved"))]),
                 f"{name}, Ctrl-C": ("interrupted", [exchange]), f"{name}, breaks": ("breaks", [exchange]),
                 f"{name}, waits": ("waits_for_one_that_breaks", [exchange])}
    jobs |= {f"{name}, plain": ("lock_step", [case]) for name, case in PLAIN.items()}
    jobs |= {"lapsgd": ("lapsgd", []), "refused": ("refusals", [list(REFUSED.values())])}
    results = worlds.run(2, exchange_cases.many, list(jobs.values()), timeout=300)
    return {name: [result[i] for result in results] for i, name in enumerate(jobs)}


def check_sums(results: list[dict[str, Any]], counts: list[int], k: int) -> None:
    """What all gradients add up to is what replicas have in the mean, before the drain and behind it."""
    expected = -sum(n * (n + 1) / 2 for n in counts) / k / len(counts)
    for layers in zip(*(result["sums"] for result in results)):
        before = torch.tensor([own for own, _ in layers]).mean(0)
        assert torch.allclose(before, torch.full_like(before, expected), rtol=1e-5), (before, expected)
        drained = [torch.tensor(mean) for _, mean in layers]
        assert all(torch.equal(one, drained[0]) for one in drained)
        assert torch.allclose(drained[0], before, rtol=1e-5)


@pytest.mark.parametrize("name", COUNTED)
def test_the_mean_is_conserved(name: str, found: dict[str, list[Any]]) -> None:
    """Updates go on while layers travel, and at the end nothing is under way; a gradient is a number here."""
    _, _, counts, k, _ = COUNTED[name]
    check_sums(found[name], counts, k)
    for result in found[name]:
        assert result["running"] == []
    told = found[name][0]["summary"]["exchange"]
    assert [replica["micro_batches"] for replica in told["replicas"]] == counts
    if "allreduce" in name:
        assert [replica["averaged"] for replica in told["replicas"]] == [count // k * 4 for count in counts]
    else:
        first, second = told["replicas"]
        assert first["asked"] > 0 and second["asked"] > 0
        assert first["asked"] + second["asked"] == sum(one["answered"] + one["crossed"] for one in told["replicas"])
        assert "asked: " in found[name][0]["told"]
        assert found[name][0]["summary"]["bytes_sent"] > 0
        every = told["every"]
        due = [count // every * 4 for count in counts] if told["kind"] == "average" else [
            count // k // every * 4 for count in counts] if "workers" not in name else None
        if due is not None:
            assert [one["asked"] + one["skipped"] for one in told["replicas"]] == due


def test_three_replicas() -> None:
    results = worlds.run(3, exchange_cases.many, [("count_updates", [exchange, {"backward": 1}, [80, 60, 40]])
                                                  for exchange in (GOSSIP, AVERAGE)])
    for i in range(2):
        check_sums([result[i] for result in results], [80, 60, 40], 1)


@pytest.mark.parametrize("name", PLAIN)
def test_it_is_a_plain_loop(name: str, found: dict[str, list[Any]]) -> None:
    """In lock step, gradients averaged at every batch. Of the others there is no such loop: a replica averages with what
    another has at that moment, be it in the middle of a batch."""
    for result in found[f"{name}, plain"]:
        for n, value in result["expected"].items():
            assert torch.equal(result["state"][n], value), n


def trained(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {n: value for n, value in state.items() if "running" not in n and "tracked" not in n}


@pytest.mark.parametrize("kind", KINDS)
def test_in_the_middle_of_it(kind: str, found: dict[str, list[Any]]) -> None:
    results = found[f"{kind}, middle"]
    means = {n: torch.stack([result["saved"][n] for result in results]).mean(0) for n in trained(results[0]["saved"])}
    differ = [n for n in means if not torch.equal(*(result["saved"][n] for result in results))]
    assert bool(differ) == (kind != "allreduce")
    for replica, result in enumerate(results):
        assert all(value == value for value in result["values"]) and "the data ended" in result["told"]
        assert result["calls"] == (4 if kind == "allreduce" else 4 + 3 * replica)
        assert result["counts"] == [11] * 7 and result["updates"] == [11 + result["calls"] + 1] * 7
        for n in means:
            assert torch.equal(result["saved"][n], result["loaded"][n])
            assert torch.equal(result["saved"][n], result["resumed"][n])
            torch.testing.assert_close(result["written"][n], means[n])
            assert torch.equal(result["drained"][n], results[0]["drained"][n])
            assert torch.equal(result["after"][n], results[0]["after"][n])
        assert any(not torch.equal(result["drained"][n], result["after"][n]) for n in means)


@pytest.mark.parametrize("kind", KINDS)
def test_an_interrupt(kind: str, found: dict[str, list[Any]]) -> None:
    results = found[f"{kind}, Ctrl-C"]
    assert all(result["told"] for result in results)
    expected = -sum(result["fed"] * (result["fed"] + 1) / 2 for result in results) / 2
    for result in results:
        for layer, after in zip(result["sums"], result["after"]):
            assert layer == pytest.approx([expected] * 8) and after == pytest.approx([expected - 1] * 8)


@pytest.mark.parametrize("job", ["breaks", "waits"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_replica_that_fails(kind: str, job: str, found: dict[str, list[Any]]) -> None:
    other, own = found[f"{kind}, {job}"]
    assert own == "ValueError: a layer broke"
    assert other.startswith("PeerError: ") and "replica 1 failed: ValueError: a layer broke" in other


@pytest.mark.parametrize("kind", KINDS)
def test_a_replica_that_is_killed(kind: str) -> None:
    with pytest.raises(worlds.RankFailed) as failed:
        worlds.run(2, exchange_cases.many, [("killed", [KINDS[kind]])], timeout=40)
    assert failed.value.errors[0] is None and "the process died" in (failed.value.errors[1] or "")


def test_a_replica_that_leaves() -> None:
    """The other trains on, alone."""
    [[gossip], _] = worlds.run(2, exchange_cases.many, [("leaves_early", [GOSSIP])])
    assert "replica 1 has left" in gossip["told"] and gossip["updates"] == 33
    assert gossip["counts"]["skipped"] >= 30 * 4


def test_lapsgd(found: dict[str, list[Any]]) -> None:
    for result in found["lapsgd"]:
        assert result["summary"]["exchange"]["kind"] == "average" and result["summary"]["exchange"]["every"] == 16
        assert result["summary"]["threads"]["forward"] == 2 and result["summary"]["threads"]["backward"] == 0
        weights = trained(result["state"])
        assert all(value.isfinite().all() for value in weights.values())
        assert all(torch.equal(value, found["lapsgd"][0]["state"][n]) for n, value in weights.items())
        assert sum(not torch.equal(value, result["initial"][n]) for n, value in weights.items()) > len(weights) // 2


def test_what_cannot_work_is_refused(found: dict[str, list[Any]]) -> None:
    for told in found["refused"]:
        assert all(sentence.startswith(words) for sentence, words in zip(told, REFUSED))
