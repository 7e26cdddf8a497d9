"""A ``loss_fn`` with parameters learns: with the last stage, and under local losses in a copy for every stage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import engine_cases
import loss_cases
import pytest
import torch
import worlds

BASE: dict[str, Any] = {"batches": 12, "k": 2, "clip": 0.5}
BF16: dict[str, Any] = {"bf16": {"enabled": True}}
ZERO: dict[str, Any] = {"zero_optimization": {"stage": 1}, "zero_allow_untested_optimizer": True}


def test_as_deepspeeds_own_engine() -> None:
    """With one stage every method is DeepSpeed's training, to the bit."""
    made = [{**BASE, "method": method, "stages": "ranks", "clip": 0.0} for method in ("backprop", "delayed", "petra")]
    [[plain, *ours]] = worlds.run(1, loss_cases.learn_many, made)
    assert any(name.startswith("last.") for name in plain["state"])
    for result in ours:
        assert all(torch.equal(value, result["state"][name]) for name, value in plain["state"].items())


@pytest.mark.parametrize("config", [{}, BF16, ZERO], ids=["float32", "bf16", "zero1"])
def test_it_learns_on_any_number_of_ranks(config: dict[str, Any]) -> None:
    made = [{**BASE, "method": method, "config": config, "block": block}
            for method, block in (("delayed", {}), ("petra", {"split_backward": True}), ("reversible", {}),
                                  ("pipedream", {"track_gradients": 3}))]
    one, two = (worlds.run(ranks, loss_cases.learn_many, made) for ranks in (1, 2))
    for i, case in enumerate(made):
        a, b = (engine_cases.merged([results[i] for results in world]) for world in (one, two))
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
        for name, value in one[0][i]["start"].items():
            assert not torch.equal(a[name], value), (case, name)
        for results in (*one, *two):
            assert results[i]["modes"] == ((0, 1) if results[i]["last"] else (0, 0))


def test_local_losses() -> None:
    """Every stage with a head has a copy that learns on its own."""
    made = [{**BASE, "method": method, "block": {"input_shape": [2, 8, 8], "head": "nets:slow_head"}}
            for method in ("dgl", "overlapping")]
    one, two = (worlds.run(ranks, loss_cases.learn_many, made) for ranks in (1, 2))
    for i in range(len(made)):
        a, b = (engine_cases.merged([results[i] for results in world]) for world in (one, two))
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
        temperatures = {name: value for name, value in a.items() if name.endswith("temperature")}
        assert len(temperatures) == 6
        assert len({value.item() for value in temperatures.values()} | {1.5}) == len(temperatures) + 1


@pytest.mark.parametrize(("method", "block"), [("delayed", {}), ("dgl", {"input_shape": [2, 8, 8], "head": "nets:slow_head"})])
def test_checkpoints(method: str, block: dict[str, Any], tmp_path: Path) -> None:
    case = {**BASE, "method": method, "stop": 3, "block": block}
    whole = engine_cases.merged(worlds.run(2, loss_cases.learn, case, str(tmp_path)))
    results = worlds.run(2, loss_cases.go_on, case, str(tmp_path))
    again = engine_cases.merged(results)
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    for result in results:
        assert all(torch.equal(result["alone"][name], value) for name, value in result["loaded"].items()
                   if name.startswith("last."))


def test_shared_parameters_are_refused() -> None:
    with pytest.raises(worlds.RankFailed) as failure:
        worlds.run(1, loss_cases.share, {**BASE, "method": "delayed"})
    assert failure.value.errors[0] is not None and '"loss_fn"' in failure.value.errors[0]
