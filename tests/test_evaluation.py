"""Evaluation at any time, of any size, leaves what is in flight untouched."""

from __future__ import annotations

import engine_cases
import pytest
import torch
import worlds


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("method", ["petra", "delayed"])
def test_in_mid_flight(ranks: int, method: str) -> None:
    case = {"method": method, "batches": 8, "net_args": {"dropout": 0.1}}
    with_it = worlds.run(ranks, engine_cases.train_with_evaluation, {**case, "evaluate": True})
    without = worlds.run(1, engine_cases.train_with_evaluation, {**case, "evaluate": False})
    a, b = engine_cases.merged(with_it), engine_cases.merged(without)
    assert all(torch.equal(a[name], b[name]) for name in b)
    assert all(r["values"] == with_it[0]["values"] for r in with_it) and len(set(with_it[0]["values"])) > 1
    assert with_it[-1]["logits"] == [[4, 3, 4]] * 8
    assert with_it[-1]["last"].shape == (4, 3) and torch.equal(with_it[-1]["last"], without[0]["last"])
    torch.testing.assert_close(with_it[0]["loss"], without[0]["loss"])
