"""A checkpoint loaded into an engine that has trained gives the run back, as into a new one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import reload_cases
import worlds

BF16: dict[str, Any] = {"bf16": {"enabled": True}}
ZERO: dict[str, Any] = {"zero_optimization": {"stage": 1}, "zero_allow_untested_optimizer": True}
ACCUMULATE: dict[str, Any] = {"data_types": {"grad_accum_dtype": "fp32"}}
PRECISIONS: dict[str, dict[str, Any]] = {"float32": {}, "bf16": BF16, "zero1": ZERO, "bf16-zero1": {**BF16, **ZERO},
                                         "bf16-zero1-fp32": {**BF16, **ZERO, **ACCUMULATE}}
ADAM = {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}}


def cases(methods: list[str], **more: Any) -> list[dict[str, Any]]:
    """Every precision with every method; k = 3 stops most stages in the middle of an accumulation."""
    return [{"method": method, "config": config, "net": "norm_free", "k": 3, "batches": 18, "stop": 3, "decay": 0.9,
             "in_flight": i % 2 == 0, "clip": 0.5, **more}
            for i, (config, method) in enumerate((c, m) for c in PRECISIONS.values() for m in methods)]


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("methods", [["petra", "pipedream"], ["delayed", "reversible"]])
def test_the_run_comes_back(ranks: int, methods: list[str], tmp_path: Path) -> None:
    """Weights, optimizers, gradients half accumulated and losses, to the bit."""
    made = cases(methods)
    for results in worlds.run(ranks, reload_cases.all_again, made, str(tmp_path)):
        for case, result in zip(made, results):
            assert result["names"] and result["losses"] and not result["differ"], (case, result)


def test_other_optimizers_and_methods(tmp_path: Path) -> None:
    """Local losses with their heads, forward passes on predicted weights, and an optimizer with moments."""
    ways: list[tuple[str, str, dict[str, Any]]] = [("overlapping", "gpt", {"input_shape": [6]}),
                                                   ("dsp", "norm_free", {"weights": "predicted"})]
    made = [{"method": method, "config": config, "net": net, "net_args": {"reversible": False} if net == "gpt" else {}, "k": 2,
             "batches": 16, "stop": 3, "optimizer": ADAM,
             "block": block, "in_flight": True} for method, net, block in ways for config in ({}, BF16, ZERO)]
    for results in worlds.run(2, reload_cases.all_again, made, str(tmp_path)):
        for case, result in zip(made, results):
            assert result["names"] and result["losses"] and not result["differ"], (case, result)


@pytest.mark.parametrize("ranks", [1, 2])
def test_weights_alone(ranks: int, tmp_path: Path) -> None:
    """Loaded weights stay: no float32 copy of the old ones, no gradient of theirs, comes back with the next update."""
    made = [{"method": "petra", "config": config, "net": "norm_free", "k": 2, "batches": 20, "optimizer": ADAM}
            for config in PRECISIONS.values()]
    for results in worlds.run(ranks, reload_cases.all_weights_alone, made, str(tmp_path)):
        for i, result in enumerate(results):
            assert result["moved"] and all(result["still"].values()), (PRECISIONS.keys(), i, result)
            assert i % 2 or "drain() first" in result["message"]


def test_a_rank_that_cannot_load_is_told_of(tmp_path: Path) -> None:
    """Nobody goes on alone, into a call that the others never join."""
    case = {"method": "petra", "net": "norm_free"}
    first, second = worlds.run(2, reload_cases.incomplete, case, str(tmp_path / "incomplete"))
    assert "rank 1 failed: FileNotFoundError" in first and "decoupled_stage" in first and "decoupled_stage" in second
    for told in worlds.run(2, reload_cases.other_folders, case, str(tmp_path / "apart")):
        assert "'a' on rank 0, left out on rank 1" in told, told
