"""Layers and settings of unusual kinds work, or are refused by name on every rank when the engine is built."""

from __future__ import annotations

from typing import Any

import engine_cases
import pytest
import start_cases
import torch
import worlds

BASE: dict[str, Any] = {"method": "delayed", "batches": 8, "k": 2}
SPARSE_ADAM = {"type": "SparseAdam", "params": {"lr": 0.01}}
BF16, ZERO = {"bf16": {"enabled": True}}, {"zero_optimization": {"stage": 1}}


def merged(world: list[list[dict[str, Any]]], i: int) -> dict[str, torch.Tensor]:
    return engine_cases.merged([results[i] for results in world])


def test_sparse_gradients_are_gradients() -> None:
    """As dense ones, where the optimizer does the same to both: with clipping, with replicas, followed by the tracker."""
    sgd = {"type": "SGD", "params": {"lr": 0.5}}
    ways: list[dict[str, Any]] = [{"bag": bag, "clip": clip, "method": method, "block": {"track_gradients": 3}}
                                  for bag, clip, method in ((False, 0.0, "delayed"), (True, 0.05, "dsp"))]
    made = [{**BASE, "kind": "words", "optimizer": sgd, "sparse": sparse, **way} for way in ways for sparse in (False, True)]
    one, two = (worlds.run(ranks, start_cases.learn_many, made) for ranks in (1, 2))
    both = worlds.run(4, start_cases.learn_many, [{**case, "pipe_ranks": 2} for case in made])
    for i in range(0, len(made), 2):
        for world in (one, two, both):
            dense, sparse = merged(world, i), merged(world, i + 1)
            assert dense.keys() == sparse.keys()
            for name, value in dense.items():
                torch.testing.assert_close(sparse[name], value, rtol=1e-5, atol=1e-6)
        assert not torch.equal(merged(one, i)["0.embedding.weight"], one[0][i]["start"]["0.embedding.weight"])
        assert all(row["cosine"] > 0.5 for row in one[0][i + 1]["rows"] if row["cosine"] == row["cosine"])


def test_sparse_gradients_that_cannot_be_are_refused() -> None:
    adam = {"type": "AdamW", "params": {"lr": 0.01, "torch_adam": True}}
    decay = {"type": "SGD", "params": {"lr": 0.01, "weight_decay": 0.1}}
    made = [{**BASE, "kind": "words", "sparse": True, **more}
            for more in ({"optimizer": adam}, {"optimizer": decay}, {"config": BF16},
                         {"config": {**ZERO, "zero_allow_untested_optimizer": True}})]
    for results in worlds.run(2, start_cases.learn_many, made):
        for result, words in zip(results, (["AdamW", "sparse"], ["SGD", "sparse"], ["bf16"], ["ZeRO"])):
            assert result["message"].startswith('ConfigError: "model": \'Embedding(sparse=True)\''), result["message"]
            assert all(word in result["message"] for word in words), result["message"]


@pytest.mark.parametrize("method", ["delayed", "dsp"])
def test_many_tensors_travel(method: str) -> None:
    """Any number of them, of any number of dimensions."""
    made = [{**BASE, "kind": "many", "method": method, "count": count, "block": {"codec": codec}}
            for count, codec in ((41, "none"), (300, "none"), (64, "bf16"))]
    one, two = (worlds.run(ranks, start_cases.learn_many, made) for ranks in (1, 3))
    for i, case in enumerate(made):
        a, b = merged(one, i), merged(two, i)
        if case["block"]["codec"] == "none":
            assert all(torch.equal(a[name], b[name]) for name in a)
        assert not torch.equal(b["0.linear.weight"], two[0][i]["start"]["0.linear.weight"])


def test_expert_groups_are_refused() -> None:
    made = [{**BASE, "kind": "experts"}]
    for [result] in worlds.run(2, start_cases.learn_many, made):
        assert "deepspeed.moe" in result["message"] and "backprop" in result["message"]


@pytest.mark.parametrize("ranks", [1, 2])
def test_engines_that_cannot_train_evaluate(ranks: int) -> None:
    """Without an optimizer, or without a parameter to train; and one where a rank alone has none."""
    made = [{**BASE, "kind": "features", **more}
            for more in ({"no_optimizer": True}, {"no_optimizer": True, "method": "dsp", "config": BF16, "kind": "words",
                                                  "sparse": False},
                         {"no_optimizer": True, "config": ZERO}, {"frozen": [0, 1, 2, 3]}, {"frozen": [0, 1]},
                         {"no_optimizer": True, "method": "dgl", "block": {"input_shape": [20]}})]
    for results in worlds.run(ranks, start_cases.learn_many, made):
        zero = results.pop(2)["message"]  # as in DeepSpeed
        assert all(word in zero for word in ("ConfigError", "zero_optimization.stage", "optimizer"))
        assert all(result["value"] == result["value"] for result in results)
        for result in (*results[:2], results[4]):
            assert "needs an optimizer" in result["message"]
        assert "nothing to train" in results[2]["message"] and results[3]["message"] == ""


def test_heads_on_feature_vectors() -> None:
    """``input_shape`` of one number: features where the layers take those, token ids where they take ids."""
    made = [{**BASE, "kind": kind, "sparse": False, "method": method, "block": {"input_shape": [shape], **head}}
            for kind, shape in (("features", 20), ("words", 5)) for method in ("dgl", "overlapping")
            for head in ({}, {"head": "linear"})]
    one, two = (worlds.run(ranks, start_cases.learn_many, made) for ranks in (1, 2))
    for i in range(len(made)):
        a, b = merged(one, i), merged(two, i)
        assert all(torch.equal(a[name], b[name]) for name in a)
    wrong = [{**BASE, "kind": "features", "method": "dgl", "block": {"input_shape": [21]}}]
    for [result] in worlds.run(2, start_cases.learn_many, wrong):
        assert all(word in result["message"] for word in ("decoupled.input_shape", "int64 (4, 21)", "float32 (4, 21)"))
