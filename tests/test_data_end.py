"""Data that end: StopIteration on every rank, nothing in flight is lost, training can go on."""

from __future__ import annotations

import engine_cases
import pytest
import torch
import worlds


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("method", ["petra", "delayed", "reversible"])
def test_every_rank_stops(ranks: int, method: str) -> None:
    """14 micro-batches at k = 4: the last two are not enough for a call."""
    case = {"method": method, "k": 4, "batches": 14}
    results = worlds.run(ranks, engine_cases.data_that_end, case)
    whole = worlds.run(1, engine_cases.train, {**case, "batches": 12})
    assert all("the data ended before micro-batch 12" in r["message"] for r in results)
    assert results[0]["calls"] == 3
    a, b = engine_cases.merged(results), engine_cases.merged(whole)
    assert all(torch.equal(a[name], b[name]) for name in b)
    after = engine_cases.merged(results, "after")
    assert any(not torch.equal(after[name], a[name]) for name in a)
