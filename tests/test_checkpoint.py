"""Resuming in mid-flight equals the run that was never stopped, on the same number of ranks and on another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import engine_cases
import pytest
import torch
import worlds

METHODS = ["reversible", "pipedream", "delayed", "dsp", "petra"]


def check(case: dict[str, Any], folder: Path, before: int, after: int) -> None:
    whole = worlds.run(1 if "pipe_ranks" not in case else before, engine_cases.train, case)
    worlds.run(before, engine_cases.train_and_stop, case, str(folder / "a"))
    resumed = worlds.run(after, engine_cases.resume, case, str(folder / "a"), str(folder / "b"))
    a, b = engine_cases.merged(whole), engine_cases.merged(resumed)
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert resumed[0]["steps"] == case["batches"] // case.get("k", 1)
    # a checkpoint of what was just loaded is as good
    again = worlds.run(after, engine_cases.resume, case, str(folder / "b"))
    c = engine_cases.merged(again)
    assert all(torch.equal(a[name], c[name]) for name in a)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("ranks", [(1, 1), (2, 2)])
def test_resume(method: str, ranks: tuple[int, int], tmp_path: Path) -> None:
    """k = 3 stops every stage in the middle of an accumulation; dropout is on."""
    check({"method": method, "k": 3, "batches": 18, "stop": 3, "decay": 0.9, "net_args": {"dropout": 0.1}}, tmp_path, *ranks)


@pytest.mark.parametrize("ranks", [(2, 1), (1, 3)])
def test_resume_on_other_ranks(ranks: tuple[int, int], tmp_path: Path) -> None:
    check({"method": "petra", "k": 2, "batches": 16, "stop": 3}, tmp_path, *ranks)
    check({"method": "delayed", "k": 2, "batches": 16, "stop": 3}, tmp_path / "delayed", *ranks)


def test_data_parallel(tmp_path: Path) -> None:
    check({"method": "petra", "k": 2, "batches": 12, "stop": 3, "pipe_ranks": 2}, tmp_path, 4, 4)


def test_other_stages_are_refused(tmp_path: Path) -> None:
    case = {"method": "petra", "batches": 6, "stop": 2}
    worlds.run(1, engine_cases.train_and_stop, case, str(tmp_path))
    with pytest.raises(worlds.RankFailed, match="saved with stages .*load_module_only"):
        worlds.run(1, engine_cases.resume, {**case, "stages": 3}, str(tmp_path))


@pytest.mark.parametrize("hops", [[2, 1], [1, 2]])
def test_messages_that_take_several_ticks(hops: list[int], tmp_path: Path) -> None:
    """Links then hold more than one message when the run is stopped."""
    check({"method": "petra", "k": 2, "batches": 24, "stop": 5, "block": {"hops": hops}}, tmp_path, 2, 3)
