"""Micro-batches of different lengths and sizes, against the definition: every message carries its shapes."""

from __future__ import annotations

from typing import Any

import engine_cases
import pytest
import torch
import worlds
from test_oracle import METHODS, compare

TOKENS: dict[str, Any] = {"net": "gpt", "varied": True, "batches": 14, "k": 2}
PICTURES: dict[str, Any] = {"varied": True, "batches": 14, "k": 2}


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("method", METHODS)
def test_sequences(method: str, ranks: int) -> None:
    """No two micro-batches that follow one another are alike in length or number of sequences."""
    compare({**TOKENS, "method": method}, ranks)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("method", ["petra", "delayed"])
def test_pictures(method: str, ranks: int) -> None:
    """Batch norm and a downsampling among the layers."""
    compare({**PICTURES, "method": method}, ranks)


def test_dropout_and_every_number_of_ranks() -> None:
    """Masks of every shape, drawn again where the forward is run again, the same for 1, 2 and 3 ranks."""
    case = {**TOKENS, "method": "petra", "net_args": {"dropout": 0.3}}
    one, two, three = (engine_cases.merged(worlds.run(ranks, engine_cases.train, case)) for ranks in (1, 2, 3))
    for name, value in one.items():
        assert torch.equal(value, two[name]) and torch.equal(value, three[name]), name


@pytest.mark.parametrize("options", [{"codec": "bf16"}, {"split_backward": True}, {"track_gradients": 3}])
def test_with_other_settings(options: dict[str, Any]) -> None:
    """What else looks at shapes: a codec's buffers, weights' gradients that are put off, the exact gradient's messages."""
    results = worlds.run(2, engine_cases.train, {**TOKENS, "method": "petra", "block": options})
    state = engine_cases.merged(results)
    plain = engine_cases.merged(worlds.run(2, engine_cases.train, {**TOKENS, "method": "petra"}))
    exact = {"rtol": 2e-2, "atol": 2e-3} if "codec" in options else {"rtol": 1e-5, "atol": 1e-6}
    for name, value in plain.items():
        torch.testing.assert_close(state[name], value, **exact)


@pytest.mark.parametrize("method", ["petra", "delayed"])
def test_resume_between_lengths(method: str, tmp_path: Any) -> None:
    """Micro-batches of different shapes are in flight when the run stops."""
    case = {**TOKENS, "method": method, "stop": 3}
    whole = engine_cases.merged(worlds.run(2, engine_cases.train, case))
    worlds.run(2, engine_cases.train_and_stop, case, str(tmp_path))
    resumed = engine_cases.merged(worlds.run(2, engine_cases.resume, case, str(tmp_path)))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
