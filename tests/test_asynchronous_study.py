"""The asynchronous study: a tiny grid from end to end, what it repeats, and what its tables say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import asynchronous_study
from ds_decoupled.config import parse_block
from studies.asynchronous_report import reached, tables, tuned
from studies.asynchronous_settings import WAYS, AsynchronousSetting, AsynchronousStudy, law

CHOSEN = ["backprop", "hogwild, layers", "synchronous", "gossip"]
TINY = ["--ways", *CHOSEN, "--images", "64", "--width", "1", "--image_size", "8", "--micro_batch", "4", "--epochs", "2",
        "--evaluations", "2", "--test_images", "8", "--rates", "0.05", "--delays", "1", "--seeds", "0", "--target", "0.01"]


def test_blocks() -> None:
    """What the ways of the whole study ask for is allowed."""
    study = AsynchronousStudy("digits")
    for way in WAYS:
        block = parse_block(AsynchronousSetting(way, 0.1).config(study, 1))
        assert block is not None and block.method == WAYS[way].block["method"]


def test_law() -> None:
    """Speeds of 1 and 1 / (1 + d) against two of 1 / (1 + d)."""
    for delay in (0.0, 0.5, 1.0, 4.0):
        assert law(delay) == pytest.approx((1 + 1 / (1 + delay)) / (2 / (1 + delay)))
    assert AsynchronousSetting("gossip", 0.1, 4.0).shares(600) == [500, 100]
    assert AsynchronousSetting("synchronous", 0.1, 4.0).shares(600) == [300, 300]


def test_reached() -> None:
    """Between two evaluations in a straight line; nowhere, if never."""
    run = {"curves": [{"seconds": 2.0, "accuracy": 0.2}, {"seconds": 4.0, "accuracy": 0.6}, {"seconds": 6.0, "accuracy": 0.5}]}
    assert [reached(run, target, "seconds") for target in (0.1, 0.5, 0.6, 0.7)] == [1.0, 3.5, 4.0, None]


def test_tables() -> None:
    """The rate is the best of the first seed without delay, and the rows are of that rate."""
    def run(accuracy: float, rate: float) -> dict[str, object]:
        curves = [{"samples": 100, "seconds": 1.0, "accuracy": accuracy}]
        return {"test_accuracy": accuracy, "samples_per_second": rate, "batches_per_batch_time": 2.0, "curves": curves,
                "cpu_seconds_per_batch": 0.01, "images": 50}

    runs = {AsynchronousSetting("gossip", 0.1): run(0.5, 100), AsynchronousSetting("gossip", 0.2): run(0.25, 100),
            AsynchronousSetting("gossip", 0.2, 4.0): run(0.9, 100), AsynchronousSetting("gossip", 0.1, 4.0): run(0.25, 300),
            AsynchronousSetting("synchronous", 0.2): run(0.6, 50), AsynchronousSetting("synchronous", 0.2, 4.0): run(0.4, 60),
            AsynchronousSetting("gossip", 0.1, seed=1): run(0.3, 100),
            AsynchronousSetting("average", 0.1): {"error": "it fell"}}
    assert tuned(runs) == {"gossip": 0.1, "synchronous": 0.2}
    text = tables(runs, 0.4)
    assert "| gossip | 2 | 0.1 | 100 | 10.0 | 40.0 ± 14.1 | 1 of 2 runs | 1 of 2 runs | 0 |" in text
    assert "| synchronous | 2 | 0.2 | 50 | 10.0 | 60.0 | 1.33 | 0.7 | 0 |" in text
    assert "| gossip, d = 4 | 300 | 2.00 | 5.00 | 3.00 | 25.0 |" in text
    assert "average lr=0.1 d=0 seed=0: it fell" in text


def test_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A way of every kind runs, each replica does its share, and what the file holds is not run again."""
    output = tmp_path / "study.json"
    asynchronous_study.main([*TINY, "--output", str(output)])
    runs = {(run["setting"]["way"], run["setting"]["delay"]): run for run in json.loads(output.read_text())["runs"]}
    assert set(runs) == {(way, 0.0) for way in CHOSEN} | {(way, 1.0) for way in CHOSEN[2:]}
    for (way, delay), run in runs.items():
        waits, replicas = WAYS[way].waits, WAYS[way].replicas
        assert run["micro_batches"] == ([32] if replicas == 1 else [16, 16] if waits or not delay else [21, 11])
        assert 0 <= run["test_accuracy"] <= 1 and run["samples_per_second"] > 0
        assert [point["samples"] for point in run["curves"]][-1] == 128 and len(run["curves"]) == 2
        assert (run.get("exchange") or {}).get("kind") == (way if replicas == 2 and way != "synchronous" else None)
    out = capsys.readouterr().out
    assert "| gossip, d = 1 |" in out and "| 1.50 |" in out and output.with_suffix(".png").stat().st_size > 10_000
    asynchronous_study.main([*TINY, "--output", str(output)])
    assert "holds 4 of 4 runs already" in capsys.readouterr().err
