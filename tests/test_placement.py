"""The same J, seed and data give the same parameters for every P, bit for bit; and data parallel 2 is twice the batch."""

from __future__ import annotations

from typing import Any

import engine_cases
import pytest
import torch
import worlds

from ds_decoupled.errors import ConfigError
from ds_decoupled.module import check_partition, place_within
from ds_decoupled.schedules import Placement

METHODS = ["reversible", "pipedream", "delayed", "dsp", "petra"]


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def run(ranks: int, case: dict[str, Any]) -> list[dict[str, Any]]:
    return worlds.run(ranks, engine_cases.train, case)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("k", [1, 3])
def test_ranks_do_not_matter(method: str, k: int) -> None:
    """Dropout on: masks do not depend on the placement either."""
    case = {"method": method, "k": k, "batches": 18, "net_args": {"dropout": 0.2}}
    states = [engine_cases.merged(run(ranks, case)) for ranks in (1, 2, 4)]
    assert_same(states[0], states[1])
    assert_same(states[0], states[2])


@pytest.mark.parametrize("method", ["petra", "dsp"])
def test_gpt_with_dropout(method: str) -> None:
    case = {"method": method, "net": "gpt", "batches": 12, "k": 2, "net_args": {"dropout": 0.2}}
    assert_same(engine_cases.merged(run(1, case)), engine_cases.merged(run(3, case)))


def test_one_rank_a_stage() -> None:
    case = {"method": "petra", "stages": 4, "batches": 12, "net_args": {"dropout": 0.2}}
    assert_same(engine_cases.merged(run(1, case)), engine_cases.merged(run(4, case)))


@pytest.mark.parametrize("partition", ["uniform", [0, 1, 7], "profile"])
def test_partition_does_not_matter(partition: str | list[int]) -> None:
    case = {"method": "petra", "batches": 10}
    assert_same(engine_cases.merged(run(1, case)),
                engine_cases.merged(run(2, {**case, "block": {"partition": partition}})))


def test_stages_follow_the_ranks_given() -> None:
    """A list says where ranks begin; one stage a rank, or a number of stages, is cut within it."""
    case = {"method": "dsp", "batches": 10}
    assert_same(engine_cases.merged(run(1, {**case, "stages": [0, 2, 7]})),
                engine_cases.merged(run(2, {**case, "stages": "ranks", "block": {"partition": [0, 2, 7]}})))
    weights = [1.0] * 7
    assert place_within([0, 2, 7], "ranks", weights, []) == Placement((0, 2, 7), (0, 1, 2))
    assert place_within([0, 2, 7], 3, weights, []) == Placement((0, 2, 4, 7), (0, 1, 3))
    assert place_within([0, 2, 7], [0, 1, 2, 7], weights, []) == Placement((0, 1, 2, 7), (0, 2, 3))
    assert place_within([0, 2, 7], "blocks", weights, [0, 2, 3, 4]) == Placement((0, 2, 3, 4, 7), (0, 1, 4))
    with pytest.raises(ConfigError, match=r"no stage begins at \[2\]. Stages begin at \[0, 3\]"):
        place_within([0, 2, 7], [0, 3, 7], weights, [])
    for partition, why in (([0, 2, 2, 7], "starts at 0 and grows"), ([1, 2, 3, 7], "starts at 0 and grows"),
                           ([0, 2, 7], "3 ranks need 4 bounds"), ([0, 1, 2, 6], "the number of layers, 7")):
        with pytest.raises(ConfigError, match=why):
            check_partition(partition, 3, 7)


@pytest.mark.parametrize("block", [{"hops": [2, 1]}, {"hops": [0, 1]}, {"hops": [0, 1], "split_backward": True}])
def test_hops_and_split_backward(block: dict[str, Any]) -> None:
    """A split backward computes the same gradients, later; sums may round otherwise."""
    case = {"method": "petra", "batches": 12, "k": 2}
    plain = {**case, "block": {"hops": block["hops"]}}
    one, two = engine_cases.merged(run(1, plain)), engine_cases.merged(run(2, {**case, "block": block}))
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-4, atol=1e-5)
    if "split_backward" not in block:
        assert_same(one, two)


def test_losses_are_reported_without_waiting() -> None:
    """The last rank reports a call's losses; the first reports those whose gradient has come down."""
    case = {"method": "petra", "stages": 4, "batches": 12}
    [whole] = run(1, case)
    first, last = run(2, case)
    assert len([x for x in whole["losses"] if x != x]) == 3  # the pipeline fills: (J-1) ticks forward
    torch.testing.assert_close(whole["losses"][3:], last["losses"][3:])
    filled = [x for x in first["losses"] if x == x]
    assert filled and filled == whole["losses"][3:3 + len(filled)]


@pytest.mark.parametrize("method", ["petra", "delayed", "reversible"])
def test_data_parallel_is_twice_the_batch(method: str) -> None:
    """Without batch norm's batch statistics in the way, 2 x 2 ranks agree with one pipeline of twice the batch."""
    case = {"method": method, "batches": 12, "k": 2, "size": 4, "net": "norm_free"}
    both = run(4, {**case, "pipe_ranks": 2})
    one = run(2, {**case, "size": 8})
    for name, value in engine_cases.merged(one).items():
        torch.testing.assert_close(engine_cases.merged(both)[name], value, rtol=1e-4, atol=1e-5)
    replicas = [{k: v for r in both if r["replica"] == i for k, v in r["state"].items()} for i in (0, 1)]
    assert_same(*replicas)
    torch.testing.assert_close(both[2]["losses"][6:], one[1]["losses"][6:], rtol=1e-3, atol=1e-4, equal_nan=True)
