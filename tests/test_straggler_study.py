"""The straggler study: a tiny grid from end to end, and what it repeats."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import straggler_study
from studies.straggler_run import LINES, Straggler, law

TINY = ["--images", "64", "--width", "1", "--image_size", "8", "--micro_batch", "4", "--micro_batches", "24", "--delays", "1"]


def test_law() -> None:
    """Speeds of 1 and 1 / (1 + d) against two of 1 / (1 + d)."""
    for delay in (0.0, 0.5, 1.0, 4.0):
        assert law(delay) == pytest.approx((1 + 1 / (1 + delay)) / (2 / (1 + delay)))
    assert Straggler("gossip", 4.0).shares(600) == (500, 100) and Straggler("synchronous", 4.0).shares(600) == (300, 300)


def test_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every line runs, each replica does its share, and what the file holds is not run again."""
    output = tmp_path / "study.json"
    straggler_study.main([*TINY, "--output", str(output)])
    runs = {run["setting"]["line"]: run for run in json.loads(output.read_text())["runs"]}
    assert list(runs) == list(LINES)
    for line, run in runs.items():
        assert run["micro_batches"] == ([12, 12] if line in ("synchronous", "allreduce") else [16, 8])
        assert 0 <= run["test_accuracy"] <= 1 and run["samples_per_second"] > 0
        assert (run["exchange"] or {}).get("kind") == (None if line == "synchronous" else line)
    out = capsys.readouterr().out
    assert all(f"| {line}, d = 1 |" in out for line in LINES) and "| 1.50 |" in out
    straggler_study.main([*TINY, "--output", str(output)])
    assert "holds 4 of 4 runs already" in capsys.readouterr().err
