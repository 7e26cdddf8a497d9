"""Bad input: an error that names the setting, on every rank, at start-up; a rank that dies takes the others along."""

from __future__ import annotations

import time
from typing import Any

import engine_cases
import pytest
import torch
import worlds


@pytest.mark.parametrize("case, words", [
    ({"method": "perta"}, ["decoupled.method", "'perta'", "Did you mean 'petra'"]),
    ({"method": "petra", "block": {"recover": "guess"}}, ["decoupled.recover", "'guess'", "'reconstruct'"]),
    ({"method": "reversible", "block": {"hops": [1, 1]}}, ["decoupled.hops", "flush"]),
    ({"method": "backprop", "block": {"weights": "stashed"}}, ["decoupled.weights", "stashed", "delayed"]),
    ({"method": "petra", "block": {"hops": [0, 0]}}, ["decoupled.hops", "b >= 1"]),
    ({"method": "petra", "block": {"stagse": 3}}, ["stagse", "Did you mean 'stages'"]),
    ({"method": "petra", "stages": 1}, ["decoupled.stages", "1 stages (J) cannot fill 2 pipe ranks (P)"]),
    ({"method": "petra", "stages": 8}, ["decoupled.stages", "8", "the model has 7"]),
    ({"method": "petra", "block": {"partition": [0, 3]}}, ["decoupled.partition", "3 bounds"]),
    ({"method": "petra", "net": "plain", "stages": 2}, ["decoupled.recover", "no layer of this model can be inverted", "dsp"]),
    ({"method": "delayed", "net": "plain", "stages": "blocks"}, ["decoupled.stages", "marks no blocks", "mark_block"]),
    ({"method": "petra", "config": {"zero_optimization": {"stage": 2}}}, ["zero_optimization.stage", "2", "Take stage 1"]),
    ({"method": "petra", "config": {"fp16": {"enabled": True}}}, ["fp16.enabled", "loss scale", "bf16"]),
    ({"method": "petra", "config": {"train_batch_size": 7}}, ["train_batch_size", "7", "4 x 1 x 1", "Leave one"]),
], ids=lambda value: None if isinstance(value, list) else "-".join(map(str, value.values()))[:40])
def test_settings(case: dict[str, Any], words: list[str]) -> None:
    start = time.monotonic()
    with pytest.raises(worlds.RankFailed) as failure:
        worlds.run(2, engine_cases.only_build, {"batches": 2, **case}, timeout=60)
    assert time.monotonic() - start < 40
    for error in failure.value.errors:
        assert error is not None and error.startswith("ConfigError"), failure.value
        for word in words:
            assert word in error.splitlines()[0], error.splitlines()[0]


@pytest.mark.parametrize("method", ["delayed", "reversible"])
def test_tied_layers_are_refused(method: str) -> None:
    case = {"method": method, "stages": 2, "batches": 2, "tied": True,
            **({"block": {"recover": "input"}} if method == "reversible" else {})}
    with pytest.raises(worlds.RankFailed) as failure:
        worlds.run(2, engine_cases.plain_pipeline, case, timeout=60)
    assert all(e is not None and "tied" in e and "ConfigError" in e for e in failure.value.errors)


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_rank_that_dies_takes_the_others_down(rank: int) -> None:
    case = {"method": "petra", "batches": 400, "timeout": 20}
    start = time.monotonic()
    with pytest.raises(worlds.RankFailed) as failure:
        worlds.run(3, engine_cases.die_at, case, rank, 12, timeout=60)
    assert time.monotonic() - start < 50
    others = [e for r, e in enumerate(failure.value.errors) if r != rank]
    assert all(e is not None and e.startswith(("LinkError", "PeerError")) for e in others), failure.value
    assert any("was waiting for the" in e and "of micro-batch" in e for e in others if e), failure.value


def test_a_rank_that_hangs_runs_into_the_time_out() -> None:
    case = {"method": "delayed", "batches": 400, "timeout": 3, "hang": 9}
    with pytest.raises(worlds.RankFailed) as failure:
        worlds.run(2, engine_cases.die_at, case, 1, 6, timeout=60)
    first = failure.value.errors[0]
    assert first is not None and "stage" in first and "was waiting for the gradient of micro-batch" in first
    assert "within 3 s" in first


def head_fails_on_rank_1(case: dict[str, Any]) -> None:
    """Not by its settings, which is a ConfigError, but as a full disk or memory fails."""
    from ds_decoupled.stages import head_builder

    make = head_builder.make_head

    def make_head(*args: Any) -> Any:
        if torch.distributed.get_rank() == 1:
            raise MemoryError("no room on this rank")
        return make(*args)

    head_builder.make_head = make_head
    engine_cases.only_build(case)


def test_a_head_that_one_rank_cannot_make() -> None:
    """Whatever it fails with, every rank says it, and none waits for the others."""
    case = {"method": "dgl", "net": "counted", "stages": 4, "batches": 2, "block": {"head": "odd_layers:linear_head"}}
    with pytest.raises(worlds.RankFailed) as failure:
        worlds.run(2, head_fails_on_rank_1, case, timeout=30)
    assert all(error is not None and "no room on this rank" in error for error in failure.value.errors), failure.value
