"""Every stage steps with the rate that the user's schedule gives for that stage's update, whoever made the objects."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import rate_cases
import worlds

SGD = {"type": "SGD", "params": {"lr": 0.1, "momentum": 0.9}}
BASE: dict[str, Any] = {"method": "delayed", "batches": 9, "optimizer": SGD}
#: How optimizer and scheduler come, where every stage counts its own updates.
COUNTED = [("instance", "instance"), ("instance", "assigned"), ("instance", "assigned for the instance"),
           ("instance", "callable"), ("callable", "callable"), ("callable", "assigned"), ("json", "callable"),
           ("json", "assigned")]


def check(case: dict[str, Any], results: list[dict[str, Any]], updates: int = 9) -> None:
    """Each stage's u-th step finds the u-th rates of its groups."""
    wanted = rate_cases.expected(case["scheduler"], updates)
    for result in results:
        for stage, noted in result["used"].items():
            assert len(noted) == updates, (case, stage, len(noted))
            for update, groups in enumerate(noted):
                for kind, found in groups.items():
                    assert found == pytest.approx(wanted[update][kind]), (case, stage, update, kind)


@pytest.mark.parametrize(("ranks", "stages"), [(1, "blocks"), (2, "blocks"), (2, "ranks"), (1, "ranks")])
def test_every_combination(ranks: int, stages: str) -> None:
    """More stages than ranks, one a rank, one in all; groups with rates of their own, some empty on a rank or a stage."""
    made = [{**BASE, "optimizer_as": optimizer, "scheduler_as": scheduler, "scheduler": name, "stages": stages}
            for i, (optimizer, scheduler) in enumerate(COUNTED)
            for name in list(rate_cases.SCHEDULERS)[i % 2::2]]
    ranks_results = worlds.run(ranks, rate_cases.all_rates, made)
    for i, case in enumerate(made):
        check(case, [results[i] for results in ranks_results])


@pytest.mark.parametrize("ranks", [1, 2])
def test_what_the_user_holds_follows(ranks: int) -> None:
    """The user's own scheduler and optimizer show where the rank's topmost stage is."""
    case = {**BASE, "optimizer_as": "instance", "scheduler_as": "instance", "scheduler": "halves"}
    for result in worlds.run(ranks, rate_cases.rates, case):
        updates = sum(len(call[max(result["used"])]) for call in result["calls"])
        wanted = [rate for rate, _ in rate_cases.expected("halves", updates + 1)[updates]]
        assert result["shown"] == pytest.approx(wanted) and result["face"] == pytest.approx(wanted)


@pytest.mark.parametrize("ranks", [1, 2])
def test_by_hand(ranks: int) -> None:
    """A rate that the user sets, or a scheduler that the user steps, holds from then on for every stage."""
    made = [{**BASE, "optimizer_as": optimizer, "scheduler_as": how, "scheduler": name}
            for optimizer, how in (("instance", "by hand for the instance"), ("instance", "by hand"), ("json", "by hand"))
            for name in ("halves", "cycle")]
    made += [{**BASE, "optimizer_as": optimizer, "scheduler_as": "none", "scheduler": "halves", "set": 4}
             for optimizer in ("instance", "json")]
    ranks_results = worlds.run(ranks, rate_cases.all_rates, made)
    for i, case in enumerate(made):
        wanted = rate_cases.expected(case["scheduler"], 9)
        for result in (results[i] for results in ranks_results):
            assert any(sum(len(noted) for noted in call.values()) for call in result["calls"])
            for number, call in enumerate(result["calls"]):
                for groups in (groups for noted in call.values() for groups in noted):
                    for kind, found in groups.items():
                        if case.get("set") is None:
                            assert found == pytest.approx(wanted[number][kind]), (case, number, kind)
                        else:
                            assert found[0] == (0.007 if number >= 4 else pytest.approx(wanted[0][kind][0]))


@pytest.mark.parametrize("ranks", [1, 2])
def test_taken_out_and_put_back(ranks: int) -> None:
    """``engine.lr_scheduler = None`` stops every stage's schedule where it is; put back, each goes on from there."""
    made = [{**BASE, "method": "reversible", "optimizer_as": optimizer, "scheduler_as": how, "scheduler": "halves", "remove": 3,
             "put_back": back} for optimizer, how in (("instance", "instance"), ("json", "callable"), ("json", "assigned"))
            for back in (None, 6)]
    ranks_results = worlds.run(ranks, rate_cases.all_rates, made)
    for i, case in enumerate(made):
        steps = [0, 1, 2, 3, 3, 3, 3, *([4, 5] if case["put_back"] else [3, 3])]
        rates = rate_cases.expected("halves", 9)
        for result in (results[i] for results in ranks_results):
            for stage, noted in result["used"].items():
                for update, groups in enumerate(noted):
                    for kind, found in groups.items():
                        assert found == pytest.approx(rates[steps[update]][kind]), (case, stage, update)


@pytest.mark.parametrize("how", [("instance", "instance"), ("callable", "callable")])
def test_as_deepspeeds_own_engine(how: tuple[str, str]) -> None:
    """One stage on one rank: the same objects give the rates, and the weights, of plain DeepSpeed."""
    made = [{**BASE, "optimizer_as": how[0], "scheduler_as": how[1], "scheduler": name, "stages": "ranks", "method": method}
            for name in ("halves", "cycle", "sequence") for method in ("backprop", "delayed")]
    [results] = worlds.run(1, rate_cases.all_rates, made)
    for plain, ours in zip(results[::2], results[1::2]):
        assert plain["used"] == ours["used"] and plain["lr"] == ours["lr"]
        assert all(value.equal(ours["state"][name]) for name, value in plain["state"].items())


def test_any_number_of_ranks() -> None:
    made = [{**BASE, "optimizer_as": "instance", "scheduler_as": "instance", "scheduler": name}
            for name in ("cycle", "sequence")]
    one, two = (worlds.run(ranks, rate_cases.all_rates, made) for ranks in (1, 2))
    for i in range(len(made)):
        whole = {name: value for results in two for name, value in results[i]["state"].items()}
        assert all(value.equal(whole[name]) for name, value in one[0][i]["state"].items())


@pytest.mark.parametrize("ranks", [1, 2])
def test_resume(ranks: int, tmp_path: Path) -> None:
    """New objects of the user's go on where the saved ones were, stage by stage."""
    case = {**BASE, "optimizer_as": "instance", "stop": 4}
    for i, (how, name) in enumerate((("instance", "halves"), ("assigned", "sequence"), ("instance", "cycle"))):
        one = {**case, "scheduler_as": how, "scheduler": name}
        whole = worlds.run(ranks, rate_cases.rates, {**one, "save": f"{tmp_path}/{i}"})
        again = worlds.run(ranks, rate_cases.rates, {**one, "load": f"{tmp_path}/{i}"})
        for a, b in zip(whole, again):
            assert a["shown"] == b["shown"] and a["face"] == b["face"]
            assert all(noted[-len(b["used"][stage]):] == b["used"][stage] for stage, noted in a["used"].items())
            assert all(value.equal(b["state"][key]) for key, value in a["state"].items())


@pytest.mark.parametrize("ranks", [1, 2])
def test_flattened_parameters(ranks: int) -> None:
    """DeepSpeed's bf16 and ZeRO-1 put their own parameters into the groups; the rates are the user's all the same."""
    bf16, zero = {"bf16": {"enabled": True}}, {"zero_optimization": {"stage": 1}, "zero_allow_untested_optimizer": True}
    made = [{**BASE, "optimizer_as": "instance", "scheduler_as": "instance", "scheduler": "halves", "config": config}
            for config in (bf16, zero, {**bf16, **zero})]
    ranks_results = worlds.run(ranks, rate_cases.all_rates, made)
    for i, case in enumerate(made):
        check(case, [results[i] for results in ranks_results])


@pytest.mark.parametrize("ranks", [1, 2])
def test_heads_learn_from_the_users_optimizer(ranks: int) -> None:
    """Heads of stage-local losses join its groups: they move, by the same schedule."""
    for result in worlds.run(ranks, rate_cases.heads_moved, {**BASE, "net": "gpt", "net_args": {"reversible": False}}):
        assert all(result["moved"]) and result["rates"] == [pytest.approx(0.1 * 0.5 ** 9)] * len(result["rates"])


def test_refused_by_name() -> None:
    made = [{**BASE, "optimizer_as": "instance", "scheduler": "halves", "scheduler_as": how}
            for how in ("for another", "plateau", "another group")]
    for messages in worlds.run(2, rate_cases.refused, made):
        for message, words in zip(messages, (["lr_scheduler", "StepLR", "another optimizer", "engine.optimizer"],
                                             ["lr_scheduler", "ReduceLROnPlateau", "metric"], ["another group", "initialize"])):
            assert all(word in message for word in words), message
