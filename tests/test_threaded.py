"""Threads that go forward and threads that go back: nothing lost, nothing twice, and nothing stands still."""

from __future__ import annotations

from typing import Any

import pytest
import threaded_cases  # noqa: F401  (its nets join NETS)
import torch
import worlds

BASE: dict[str, Any] = {"method": "pd_asgd", "net": "reversible", "stages": 7, "batches": 12}
# torch's: DeepSpeed's own is compiled first, which takes as long as all else here.
ADAM = {"type": "AdamW", "params": {"lr": 0.01, "torch_adam": True}}
COUNTED = {"1:2": ({"forward": 1, "backward": 2}, 1000, 1), "2:2": ({"forward": 2, "backward": 2, "queue": 1}, 1000, 1),
           "no lock, alone": ({"backward": 1, "lock": "none"}, 300, 1),
           "workers": ({"workers": 3}, 400, 1), "workers, no lock": ({"workers": 1, "lock": "none"}, 100, 1),
           "1:4, k": ({"backward": 4, "queue": 3}, 400, 4), "auto": ("auto", 100, 1)}


REFUSED: dict[str, dict[str, Any]] = {
    '"wall_clock_breakdown": True': {**BASE, "config": {"wall_clock_breakdown": True}},
    '"decoupled.threads.lock": \'none\' cannot be used: k = 2': {**BASE, "k": 2, "block": {"threads": {"lock": "none"}}},
    '"decoupled.threads.lock": \'none\' cannot be used: BF16': {**BASE, "block": {"threads": {"lock": "none"}},
                                                               "config": {"bf16": {"enabled": True}}},
    '"decoupled.exchange": \'gossip\' cannot be used: there is one replica': {**BASE, "block": {"exchange": "gossip"}},
    '"decoupled.threads.workers": 2': {**BASE, "block": {"threads": {"workers": 2, "queue": 1}}},
}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """All of it, in one world of one rank."""
    middle = {**BASE, "k": 2, "decay": 0.5, "clip": 1.0, "block": {"threads": {"backward": 2, "queue": 1}}}
    jobs: dict[str, tuple[str, list[Any]]] = {
        **{name: ("count_updates", list(args)) for name, args in COUNTED.items()},
        "no lock": ("count_updates", [{"forward": 1, "backward": 3, "queue": 1, "lock": "none"}, 1000, 1, 64]),
        "lock step, no lock": ("lock_step", [{**BASE, "block": {"threads": {"lock": "none"}}}]),
        "lock step": ("lock_step", [{**BASE, "block": {"threads": {"backward": 1}}}]),
        "lock step, copies": ("lock_step", [{**BASE, "block": {"weights": "stashed"}}]),
        "in place": ("lock_step", [{**BASE, "net": "plain", "stages": 6}]),
        "middle": ("in_the_middle", [middle, str(tmp_path_factory.mktemp("saved"))]),
        "forward": ("breaks", [7.0]), "backward": ("breaks", [9.0]), "Ctrl-C": ("interrupted", []),
        "dropout": ("trains", [{**BASE, "net_args": {"dropout": 0.3}, "block": {"threads": {"forward": 2}}}]),
        "bf16": ("trains", [{**BASE, "net": "norm_free", "stages": 3, "config": {"bf16": {"enabled": True}}}]),
        "zero": ("trains", [{**BASE, "net": "norm_free", "stages": 3, "optimizer": ADAM,
                             "config": {"bf16": {"enabled": True}, "zero_optimization": {"stage": 1}}}]),
        "watched": ("watched", [{"backward": 2}, 50]), "watched, no lock": ("watched", [{"backward": 2, "lock": "none"}, 50]),
        "refused": ("refusals", [list(REFUSED.values())]),
        "autocast": ("trains", [{**BASE, "net": "gpt", "stages": 6, "optimizer": ADAM,
                                 "config": {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}}]),
    }
    [results] = worlds.run(1, threaded_cases.many, list(jobs.values()), timeout=300)
    return dict(zip(jobs, results))


@pytest.mark.parametrize("name", COUNTED)
def test_no_update_is_lost_or_made_twice(name: str, found: dict[str, Any]) -> None:
    """Sums of whole numbers: any other order gives the same, any other set does not."""
    _, count, k = COUNTED[name]
    result = found[name]
    for sums in result["sums"]:
        assert sums == [-count * (count + 1) / 2 / k] * 8
    summary = result["summary"]
    assert summary["updates"] == [count // k] * 4 and result["running"] == []
    for told in summary["staleness"]:
        assert sum(told["often"].values()) == count
    threads = summary["threads"]
    assert len(threads["forward_busy"]) == threads["forward"] and len(threads["backward_busy"]) == threads["backward"]
    assert all(0 < share <= 1 for share in threads["backward_busy"] + threads["forward_busy"])
    assert max(threads["queue_depths"], default=0) <= threads["queue"] + threads["backward"]


def test_without_locks_what_may_be_lost_is_counted(found: dict[str, Any]) -> None:
    """Of 1,000 updates a stage at most those are missing that met another one."""
    summary, count = found["no lock"]["summary"], 1000
    assert summary["updates"] == [count] * 4
    for sums, overlaps in zip(found["no lock"]["sums"], summary["threads"]["overlapping_updates"]):
        missing = [total + count * (count + 1) / 2 for total in sums]
        assert all(0 <= lost <= 2 * count * overlaps for lost in missing), (missing, overlaps)


@pytest.mark.parametrize("name", ["lock step", "lock step, no lock", "lock step, copies", "in place"])
def test_in_lock_step_it_is_plain_sgd(name: str, found: dict[str, Any]) -> None:
    result = found[name]
    assert result["losses"] == result["plain"]
    for n, value in result["expected"].items():
        assert torch.equal(result["state"][n], value), n
    assert all(told["max"] == 0 for told in result["summary"]["staleness"])


def test_in_the_middle_of_it(found: dict[str, Any]) -> None:
    result = found["middle"]
    assert all(value == value for value in result["values"]) and result["at_rest"] == 0
    assert result["same"] and result["expected"] == result["again"] == result["third"]
    assert result["counts"] == [13] * 7 and result["calls"] == 5 and "the data ended" in result["told"]
    assert result["after"] == [18] * 7 and result["lrs"] == pytest.approx([0.1 * 0.5 ** 18] * 7)
    assert result["tracked"] == {36}  # once a micro-batch


@pytest.mark.parametrize(("name", "words"), [("forward", "a layer broke"), ("backward", "a layer broke on its way back")])
def test_a_thread_that_fails(name: str, words: str, found: dict[str, Any]) -> None:
    result = found[name]
    assert result["told"] == words == result["second"] and "threaded_cases.py" in result["words"]
    assert "raise ValueError" in result["words"] and result["ended"] == []
    assert result["shift"] == [-(1.0 + 3 + 3 + 3)] * 8


def test_an_interrupt(found: dict[str, Any]) -> None:
    result = found["Ctrl-C"]
    fed = result["fed"]
    assert result["told"] and 0 <= fed - result["calls"] <= 1 and result["running"] == []
    assert result["sums"] == [[-fed * (fed + 1) / 2] * 8] * 2


@pytest.mark.parametrize("name", ["dropout", "bf16", "zero", "autocast"])
def test_it_trains(name: str, found: dict[str, Any]) -> None:
    result = found[name]
    assert sum(not torch.equal(result["initial"][n], result["state"][n]) for n in result["state"]) > len(result["state"]) // 2
    assert any(loss == loss for loss in result["losses"])
    assert result["summary"]["updates"] == [12] * len(result["summary"]["updates"])


@pytest.mark.parametrize("name", ["watched", "watched, no lock"])
def test_watchers_hear_of_everything(name: str, found: dict[str, Any]) -> None:
    assert found[name] == {f"{when} {letter}": 50 * 4 for when in ("before", "acted", "after") for letter in "FBU"}


def test_what_threads_cannot_do_is_refused(found: dict[str, Any]) -> None:
    for words, said in zip(REFUSED, found["refused"]):
        assert words in said, said
