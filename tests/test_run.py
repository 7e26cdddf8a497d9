"""What every run shares: batch sizes, parameter groups, learning-rate schedules, summaries."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ds_decoupled.errors import ConfigError
from ds_decoupled.settings.table import batch_sizes
from run.curves import plot_curves
from run.rates import lr_schedule, parameter_groups, set_peak_lr
from run.results import write_json
from run.setup import read_config


@pytest.mark.parametrize(
    ("config", "replicas", "expected"),
    [
        ({"train_micro_batch_size_per_gpu": 8}, 2, (8, 1)),
        ({"train_micro_batch_size_per_gpu": 8, "gradient_accumulation_steps": 4}, 2, (8, 4)),
        ({"train_micro_batch_size_per_gpu": 8, "train_batch_size": 64}, 2, (8, 4)),
        ({"train_batch_size": 64}, 2, (32, 1)),
        ({"train_batch_size": 64, "gradient_accumulation_steps": 2}, 1, (32, 2)),
    ],
)
def test_batch_sizes(config: dict[str, Any], replicas: int, expected: tuple[int, int]) -> None:
    assert batch_sizes(config, replicas) == expected


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, '"train_micro_batch_size_per_gpu": None'),
        ({"train_micro_batch_size_per_gpu": 0}, "at least 1"),
        ({"train_micro_batch_size_per_gpu": 3, "train_batch_size": 10}, '"train_batch_size": 10.*micro-batch'),
        ({"train_batch_size": 1, "gradient_accumulation_steps": 2}, '"train_batch_size": 1'),
    ],
)
def test_batch_sizes_that_do_not_divide(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        batch_sizes(config, 1)


def test_biases_and_norms_do_not_decay() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2))
    optimizer = torch.optim.SGD(parameter_groups(model), lr=1.0, weight_decay=5e-4)
    assert [(len(g["params"]), g["weight_decay"]) for g in optimizer.param_groups] == [(2, 5e-4), (4, 0.0)]


@pytest.mark.parametrize(
    ("params", "lr", "expected"),
    [({}, None, 0.1), ({"lr": "auto"}, None, 0.1), ({"lr": 0}, None, 0), ({"lr": 1}, 2.0, 2.0)],
)
def test_peak_lr(params: dict[str, Any], lr: float | None, expected: float) -> None:
    config = {"optimizer": {"type": "SGD", "params": params}}
    assert set_peak_lr(config, lr, rule=0.1) == expected
    assert config["optimizer"]["params"]["lr"] == expected  # type: ignore[index]


def rates(kind: str, updates: int, warmup: int, steps: tuple[float, ...] = ()) -> list[float]:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = lr_schedule(kind, updates, warmup, steps)(optimizer)
    seen = []
    for _ in range(updates):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return seen


def test_lr_schedules() -> None:
    assert rates("steps", 8, 2, (0.5, 0.75)) == pytest.approx([0.5, 1, 1, 1, 0.1, 0.1, 0.01, 0.01])
    cosine = rates("cosine", 102, 2)
    assert cosine[:3] == pytest.approx([0.5, 1, 1]) and cosine[52] == pytest.approx(0.5) and cosine[-1] < 1e-3


def test_summary_and_picture(tmp_path: Path) -> None:
    write_json(tmp_path / "new" / "a.json", {"x": math.nan, "y": [1.5, math.inf], "z": {"w": (1, "s")}})
    assert json.loads((tmp_path / "new" / "a.json").read_text()) == {"x": None, "y": [1.5, None], "z": {"w": [1, "s"]}}
    plot_curves(tmp_path / "a.png", "title", "epoch", {"loss": {"loss": [(1, 2.0), (2, 1.0)]},
                                                              "accuracy": {"accuracy": [(1, math.nan), (2, 0.5)]}})
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_config_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text("{")
    (tmp_path / "list.json").write_text("[]")
    for path in (None, str(tmp_path / "none.json"), str(tmp_path / "bad.json"), str(tmp_path / "list.json")):
        with pytest.raises(ConfigError, match="--deepspeed_config"):
            read_config(path)
