"""``torch_autocast`` holds for every pass of a micro-batch, whenever it runs; a context around one call is refused."""

from __future__ import annotations

from typing import Any

import autocast_cases
import engine_cases
import pytest
import torch
import worlds

AUTOCAST: dict[str, Any] = {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}
BASE: dict[str, Any] = {"net": "norm_free", "batches": 10, "k": 2, "config": AUTOCAST}


def test_as_deepspeeds_own_engine() -> None:
    """One stage: the numbers of plain DeepSpeed, to the bit, and not those of float32."""
    made = [{**BASE, "stages": "ranks", "method": method, "config": config}
            for method, config in (("backprop", AUTOCAST), ("delayed", AUTOCAST), ("petra", AUTOCAST), ("delayed", {}))]
    [[plain, *ours, float32]] = worlds.run(1, autocast_cases.learn_many, made)
    for result in ours:
        assert all(torch.equal(value, result["state"][name]) for name, value in plain["state"].items())
    assert not all(torch.equal(value, float32["state"][name]) for name, value in plain["state"].items())


def test_every_pass_on_any_number_of_ranks() -> None:
    """Forward, recomputation, reconstruction, heads and evaluation."""
    ways: list[tuple[str, dict[str, Any]]] = [("delayed", {}), ("dsp", {}), ("petra", {}), ("pipedream", {}),
                                              ("reversible", {}), ("overlapping", {"input_shape": [2, 8, 8]})]
    made = [{**BASE, "method": method, "block": block} for method, block in ways]
    one, two = (worlds.run(ranks, autocast_cases.learn_many, made) for ranks in (1, 2))
    for i, case in enumerate(made):
        a, b = (engine_cases.merged([results[i] for results in world]) for world in (one, two))
        assert all(torch.equal(a[name], b[name]) for name in a), case
        assert all(results[i]["seen"] == {True} for results in (*one, *two)), case


def test_flushed_gradients_are_backpropagations() -> None:
    """At any number of stages a reversible flush gives DeepSpeed's own gradients, up to the streams' rounding."""
    made = [{**BASE, "method": "backprop", "stages": "ranks"}, {**BASE, "method": "reversible"}]
    [[plain, ours]] = worlds.run(1, autocast_cases.learn_many, made)
    for name, value in plain["state"].items():
        torch.testing.assert_close(ours["state"][name], value, rtol=1e-2, atol=1e-3)


def test_graphs_keep_no_cast_weights() -> None:
    """Current weights are cast when the backward pass asks for them: no square matrix is kept, and what is trained differs from
    stashed weights."""
    made = [{**BASE, "k": 1, "method": method} for method in ("delayed", "pipedream")]
    [[current, stashed]] = worlds.run(1, autocast_cases.learn_many, made)
    assert current["kept"] == stashed["kept"] == 0
    assert not all(torch.equal(value, stashed["state"][name]) for name, value in current["state"].items())


@pytest.mark.parametrize("config", [{}, AUTOCAST])
def test_a_context_around_calls_is_refused(config: dict[str, Any]) -> None:
    for messages in worlds.run(2, autocast_cases.ambient, {**BASE, "method": "delayed", "config": config}):
        for message, call in zip(messages, ("train_batch", "eval_batch", "drain")):
            assert f"torch.autocast around {call}()" in message and '"torch_autocast"' in message, message


@pytest.mark.parametrize(("case", "words"), [
    ({"config": {"torch_autocast": {"enabled": True, "dtype": "float16"}}}, ["torch_autocast.dtype", "loss scale", "bfloat16"]),
    ({"block": {"compile": {"backend": "aot_eager"}}}, ["torch_autocast.enabled", "dsp"]),
])
def test_refused_by_name(case: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(worlds.RankFailed) as failure:
        worlds.run(2, autocast_cases.only_build, {**BASE, "method": "delayed", **case})
    for error in failure.value.errors:
        assert error is not None and error.startswith("ConfigError") and all(word in error for word in words), error
