"""What a PipelineModule can have beside its layers: additional losses, a forward of its own, hooks; what the monitor writes."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

import engine_cases
import pytest
import torch
import worlds
from deepspeed.pipe import PipelineModule
from nets import batches
from torch import Tensor, nn

import ds_decoupled


class WithAdditionalLosses(PipelineModule):
    """Reports the mean square of what the last layer gave, and a constant."""

    last: Any = None

    def get_additional_losses(self) -> dict[str, Tensor]:
        value = torch.zeros(()) if self.last is None else self.last.detach().square().mean()
        return {"square": value, "constant": torch.tensor(2.0)}


def layers_of(module: list[Any]) -> list[Any]:
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(16, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.linear(x)
            if module:
                module[0].last = y
            return y

    torch.manual_seed(0)
    return [nn.Flatten(), nn.Linear(128, 16), nn.Tanh(), Last()]


def additional(case: dict[str, Any]) -> dict[str, Any]:
    import deepspeed

    deepspeed.init_distributed()
    holder: list[Any] = []
    layers = layers_of(holder)
    model = WithAdditionalLosses(layers, num_stages=torch.distributed.get_world_size(), loss_fn=nn.CrossEntropyLoss(),
                                 partition_method="uniform")
    holder.append(model)
    engine, *_ = ds_decoupled.initialize(model=model, config=engine_cases.config_of(case),
                                         model_parameters=list(model.parameters()))
    data = iter([b for b in batches(4) for _ in range(2)])
    seen = []
    for _ in range(4):
        loss = engine.train_batch(data).item()
        extra = engine.get_additional_losses()
        seen.append((loss, {name: value.item() for name, value in (extra or {}).items()}))
    engine.drain()
    return {"seen": seen}


def test_additional_losses_are_reported() -> None:
    """At learning rate 0 as DeepSpeed's own engine reports them, on every rank; means over micro-batches."""
    case = {"method": "delayed", "stages": 2, "k": 2, "lr": 0.0, "batches": 0}
    ours = worlds.run(2, additional, case)
    [theirs] = worlds.run(1, additional, {**case, "method": "backprop", "stages": 1})
    assert ours[1]["seen"] == [(pytest.approx(loss), {name: pytest.approx(v) for name, v in extra.items()})
                               for loss, extra in theirs["seen"]]
    finished = [row for row in ours[0]["seen"] if not math.isnan(row[0])]
    assert finished and all(set(extra) == {"square", "constant"} and extra["constant"] == 2.0 for _, extra in finished)


class OwnForward(PipelineModule):
    def forward(self, x: Any) -> Any:
        return super().forward(x * 2)


def refused(case: dict[str, Any], what: str) -> str:
    import deepspeed

    deepspeed.init_distributed()
    kind = OwnForward if what == "forward" else PipelineModule
    model = kind(layers_of([]), num_stages=torch.distributed.get_world_size(), loss_fn=nn.CrossEntropyLoss(),
                 partition_method="uniform")
    if what == "hook":
        model.register_forward_hook(lambda *_: None)
    try:
        engine, *_ = ds_decoupled.initialize(model=model, config=engine_cases.config_of(case),
                                             model_parameters=list(model.parameters()))
        data = iter(batches(4))
        engine.train_batch(data)
        if what == "later":
            engine.module.register_forward_pre_hook(lambda *_: None)
        engine.train_batch(data)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


@pytest.mark.parametrize("what, words", [("forward", "'OwnForward' cannot be used: it has a forward() of its own"),
                                         ("hook", "'PipelineModule' cannot be used: it has hooks"),
                                         ("later", "a hook was registered on the pipeline module")])
def test_what_would_be_passed_over_is_refused(what: str, words: str) -> None:
    for text in worlds.run(2, refused, {"method": "delayed", "stages": 2, "batches": 0}, what):
        assert words in text, text


def monitored(case: dict[str, Any]) -> None:
    engine = engine_cases.build(case)
    data = engine_cases.data_of(case, engine)
    for _ in range(case["batches"]):
        engine.train_batch(data)
        engine.eval_batch(iter(batches(2)), num_micro_batches=2)
        engine.eval_batch(iter(batches(2)), num_micro_batches=2, bcast_loss=False)
    engine.drain()


def test_the_monitor_gets_losses_and_no_nan(tmp_path: Path) -> None:
    case = {"method": "petra", "batches": 16,
            "config": {"csv_monitor": {"enabled": True, "output_path": str(tmp_path), "job_name": "job"}}}
    worlds.run(2, monitored, case)
    rows = {file.stem: [float(row[1]) for row in list(csv.reader(file.open()))[1:]] for file in tmp_path.rglob("*.csv")}
    train = next(values for name, values in rows.items() if "train_loss" in name)
    evaluation = next(values for name, values in rows.items() if "eval_loss" in name)
    assert 0 < len(train) < 16 and all(map(math.isfinite, train))  # the first ones fill the pipeline
    assert len(evaluation) == 32 and all(map(math.isfinite, evaluation))


def evaluated_by_one(case: dict[str, Any]) -> Any:
    """As recipes do: every loss by itself, and outputs, beside the mean."""
    engine = engine_cases.build(case)
    engine.train_batch(engine_cases.data_of(case, engine))
    losses = engine.eval_batch(iter(batches(2)), num_micro_batches=2, reduce_output=None, bcast_loss=False)
    engine.total_loss = None  # DeepSpeed would add outputs to it
    engine.eval_batch(iter(batches(2)), num_micro_batches=2, reduce_output=None, compute_loss=False)
    engine.total_loss = None
    mean = engine.eval_batch(iter(batches(2)), num_micro_batches=2)
    return None if losses is None else [loss.item() for loss in losses], mean.item()


@pytest.mark.parametrize("method", ["backprop", "delayed"])
def test_a_monitor_beside_losses_one_by_one(method: str, tmp_path: Path) -> None:
    """DeepSpeed's own engine would ask a list of losses for its mean."""
    case = {"method": method, "batches": 2, "net": "plain", "stages": 2,
            "config": {"csv_monitor": {"enabled": True, "output_path": str(tmp_path), "job_name": "job"}}}
    results = worlds.run(2, evaluated_by_one, case)
    losses, mean = results[-1]
    assert mean == pytest.approx(sum(losses) / 2)
    [evaluation] = list(tmp_path.rglob("*eval_loss*.csv"))
    assert [float(row[1]) for row in list(csv.reader(evaluation.open()))[1:]] == [pytest.approx(mean)]
