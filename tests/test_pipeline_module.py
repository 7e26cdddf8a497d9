"""Drop-in use: a plain DeepSpeed ``PipelineModule``, with a block and without."""

from __future__ import annotations

from typing import Any

import engine_cases
import pytest
import torch
import worlds


def test_without_a_block_it_is_deepspeed() -> None:
    """DeepSpeed's engine class, and the same losses as the ``backprop`` preset, which is left to it as well."""
    case = {"method": "backprop", "batches": 8, "k": 2, "net": "plain", "stages": "ranks"}
    plain = worlds.run(2, engine_cases.plain_pipeline, {**case, "no_block": True})
    preset = worlds.run(2, engine_cases.plain_pipeline, case)
    assert {r["engine"] for r in plain} == {"PipelineEngine"} and {r["engine"] for r in preset} == {"FlushedPipelineEngine"}
    assert plain[0]["losses"] == preset[0]["losses"]


@pytest.mark.parametrize("ranks", [1, 2])
def test_every_engine_from_a_block_answers(ranks: int) -> None:
    """Draining, the summary's entries and the stages' metrics, whoever runs the method."""
    case = {"net": "plain", "stages": "ranks", "batches": 4}
    flushed, ours = (worlds.run(ranks, engine_cases.train, {**case, "method": method})[0] for method in ("backprop", "delayed"))
    assert flushed["summary"].keys() == ours["summary"].keys() and flushed["metrics"] == ours["metrics"] == []
    for name, value in ours["summary"].items():
        told = flushed["summary"][name]
        assert told is None or type(told) is type(value) and (not isinstance(value, list) or len(told) == len(value)), name
    for name in ("stages", "updates", "rank_stages"):
        assert flushed["summary"][name] == ours["summary"][name]


def what_is_sent(case: dict[str, Any]) -> list[tuple[int, int]]:
    """Messages and bytes after one update, and after an evaluation, as the summary tells them on a rank of a world."""
    engine = engine_cases.build(case)
    engine.train_batch(engine_cases.data_of(case, engine))
    told = [engine.decoupled_summary()]
    engine.eval_batch(engine_cases.data_of(case, engine))
    told.append(engine.decoupled_summary())
    return [(summary["messages_sent"], summary["bytes_sent"]) for summary in told]


def test_what_1f1b_sends_is_counted() -> None:
    """A micro-batch is 4,096 bytes of activations up, and as many of gradients down; evaluations do not count, as elsewhere."""
    case = {"net": "plain", "stages": "ranks", "method": "backprop", "batches": 4, "k": 4}
    assert worlds.run(2, what_is_sent, case) == [[(8, 8 * 4096)] * 2] * 2
    assert worlds.run(1, what_is_sent, case) == [[(0, 0)] * 2]


@pytest.mark.parametrize("method", ["pipedream", "delayed", "dsp"])
def test_modules_functions_and_in_place_layers(method: str) -> None:
    """J = P ranks by default; on one rank the same two stages."""
    case = {"method": method, "batches": 10, "stages": "ranks"}
    two = worlds.run(2, engine_cases.plain_pipeline, case)
    assert two[0]["engine"] == "DecoupledPipelineEngine" and [r["stages"] for r in two] == [[0], [1]]
    one = worlds.run(1, engine_cases.plain_pipeline, {**case, "stages": [0, 3, 6]})
    a, b = engine_cases.merged(two), engine_cases.merged(one)
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_flush_by_recomputation_is_backpropagation() -> None:
    """1F1B with recomputed inputs gives the parameters of DeepSpeed's own 1F1B."""
    case = {"batches": 12, "k": 4, "method": "backprop", "stages": "ranks"}
    deepspeed = engine_cases.merged(worlds.run(2, engine_cases.plain_pipeline, case))
    ours = engine_cases.merged(worlds.run(2, engine_cases.plain_pipeline, {**case, "block": {"recover": "input"}, "stages": 4}))
    for name, value in deepspeed.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-5, atol=1e-6)


def test_training_data() -> None:
    case = {"method": "petra", "batches": 6, "size": 4}
    one, two = (worlds.run(ranks, engine_cases.with_training_data, case) for ranks in (1, 2))
    a, b = engine_cases.merged(one), engine_cases.merged(two)
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("method, setting, value", [("delayed", "partition", "uniform"), ("backprop", "stages", "blocks")])
def test_what_a_plain_module_would_ignore(method: str, setting: str, value: str) -> None:
    case = {"method": method, "stages": "ranks", "block": {setting: value}}
    with pytest.raises(worlds.RankFailed) as failure:
        worlds.run(2, engine_cases.plain_pipeline, case)
    told = f"\"decoupled.{setting}\": '{value}' cannot be used: a plain PipelineModule"
    assert all(told in str(error) for error in failure.value.errors)
