"""bf16 and ZeRO-1: per-stage optimizers of DeepSpeed's own, streams that stay float32."""

from __future__ import annotations

from typing import Any

import engine_cases
import pytest
import torch
import worlds

BF16: dict[str, Any] = {"bf16": {"enabled": True}}
ZERO: dict[str, Any] = {"zero_optimization": {"stage": 1}, "zero_allow_untested_optimizer": True}
ACCUMULATE = {"data_types": {"grad_accum_dtype": "fp32"}}  # DeepSpeed takes it with ZeRO alone


def run(ranks: int, case: dict[str, Any]) -> list[dict[str, Any]]:
    return worlds.run(ranks, engine_cases.train, {"batches": 12, "k": 2, "net": "norm_free", "net_args": {"width": 32}, **case})


@pytest.mark.parametrize("method", ["petra", "delayed", "reversible"])
def test_zero_1_is_float32(method: str) -> None:
    """ZeRO-1 moves optimizer state, not numbers: the same as without, on one replica and on two."""
    case = {"method": method}
    plain = engine_cases.merged(run(2, case))
    for name, value in engine_cases.merged(run(2, {**case, "config": ZERO})).items():
        torch.testing.assert_close(value, plain[name], rtol=1e-6, atol=1e-7)
    doubled = engine_cases.merged(run(2, {**case, "size": 8}))
    both = run(4, {**case, "pipe_ranks": 2, "config": ZERO})
    for name, value in engine_cases.merged(both).items():
        torch.testing.assert_close(value, doubled[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("method", ["petra", "pipedream"])
def test_bf16(method: str, zero: bool) -> None:
    """The same for 1 and 2 ranks, to the bit, and near float32."""
    config = {**BF16, **({**ZERO, **ACCUMULATE} if zero else {})}
    one, two = (run(ranks, {"method": method, "config": config}) for ranks in (1, 2))
    a, b = engine_cases.merged(one), engine_cases.merged(two)
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert all(value.dtype == torch.bfloat16 for value in a.values())
    full = engine_cases.merged(run(1, {"method": method}))
    for name in full:
        torch.testing.assert_close(a[name].float(), full[name], rtol=0.1, atol=0.05)


def test_bf16_streams_stay_float32() -> None:
    """Bf16 couplings give their inputs back at learning rate 0 as float32 ones do: their streams are float32."""
    case = {"method": "petra", "batches": 20, "net": "norm_free", "net_args": {"width": 64, "couplings": 8}, "config": BF16}
    [result] = worlds.run(1, engine_cases.gradients_at_rest, case)
    assert max(error for _, error in result["errors"]) <= 1e-5


def test_adamw_and_clipping_in_bf16() -> None:
    optimizer = {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}}
    case = {"method": "petra", "config": {**BF16, **ZERO, **ACCUMULATE}, "optimizer": optimizer, "clip": 0.1}
    a, b = (engine_cases.merged(run(ranks, case)) for ranks in (1, 2))
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("config", [BF16, ZERO, {**BF16, **ZERO, **ACCUMULATE}], ids=["bf16", "zero1", "bf16-zero1"])
def test_resume(config: dict[str, Any], tmp_path: Any) -> None:
    """DeepSpeed's own bf16 without ZeRO cannot load what it saved; a stage's optimizer can."""
    case = {"method": "petra", "batches": 12, "k": 2, "net": "norm_free", "config": config, "stop": 2, "decay": 0.9}
    whole = worlds.run(2, engine_cases.train, case)
    worlds.run(2, engine_cases.train_and_stop, case, str(tmp_path))
    resumed = worlds.run(2, engine_cases.resume, case, str(tmp_path))
    a, b = engine_cases.merged(whole), engine_cases.merged(resumed)
    assert all(torch.equal(a[name], b[name]) for name in a)
