"""Summaries of runs side by side: labels, tables, pictures."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest

import compare_runs


def run(method: str, result: float, stages: int = 1, seed: int = 0, text: bool = False, **block: Any) -> dict[str, Any]:
    """What a recipe's summary holds of a run with two epochs."""
    curves = {"tokens": [1000, 2000], "validation_loss": [result + 1, result]} if text else {"test_accuracy": [None, result]}
    own = {"validation_loss": result, "perplexity": math.exp(result), "tokens_per_second": 10.0} if text else \
          {"test_accuracy": result}
    return {"method": method, "stages": stages, "pipe_ranks": 1, "model": "m", "seed": seed, "train_loss": 0.5, **own,
            "samples_per_second": 2.0, "peak_memory_bytes": 2**20, "bytes_sent_per_sample": None if text else 2048,
            "config": {"decoupled": {"method": method, **block}}, "curves": curves}


def main(monkeypatch: pytest.MonkeyPatch, folder: Path, runs: list[dict[str, Any]], *options: str) -> None:
    files = [folder / f"{i}.json" for i in range(len(runs))]
    for file, content in zip(files, runs):
        file.write_text(json.dumps(content))
    plot = folder / "picture.png"
    monkeypatch.setattr(sys, "argv", ["compare_runs.py", *map(str, files), *options, "--plot", str(plot)])
    compare_runs.main()
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_labels() -> None:
    """What differs between runs of a method is told, and nothing else."""
    runs = [run("backprop", 0.9), run("dgl", 0.7, 3, head="cnn"), run("dgl", 0.7, 6, head="mlp"), run("overlapping", 0.8, 6)]
    assert [compare_runs.label(r, runs) for r in runs] == ["backprop", "dgl, 3 stages, head cnn", "dgl, 6 stages, head mlp",
                                                           "overlapping"]
    runs = [run("petra", 0.7), run("petra", 0.7, codec="int8"), run("petra", 0.7, codec={"forward": "bf16"})]
    assert [compare_runs.label(r, runs) for r in runs] == ["petra", "petra, codec int8", "petra, codec {'forward': 'bf16'}"]


def test_against_stages() -> None:
    """Seeds are averaged; backpropagation is a level line through every J."""
    runs = [run("backprop", 0.9), run("dgl", 0.8, 2), run("dgl", 0.6, 4), run("dgl", 0.7, 4, seed=1)]
    curves = compare_runs.against_stages(runs, "test_accuracy", 100.0)
    assert curves == {"backprop": [(2.0, 90.0), (4.0, 90.0)], "dgl": [(2.0, 80.0), (4.0, pytest.approx(65.0))]}


def test_images_and_text(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(monkeypatch, tmp_path, [run("backprop", 0.9), run("dgl", 0.7, 6)], "--against", "stages")
    assert "| dgl | 6 | 70.0% | 0.500 | 2 | 1 | 2 |" in capsys.readouterr().out
    texts = [run("backprop", 1.0, text=True), run("dgl", 2.0, 4, text=True)]
    main(monkeypatch, tmp_path, texts)
    assert "| dgl | nan | 2.000 | 7.39 | 10 | 1 | not counted |" in capsys.readouterr().out
    courses = compare_runs.courses(texts, "tokens", "validation_loss", 1.0)
    assert courses["dgl"] == [(1.0, 3.0), (2.0, 2.0)]
    timed = [{**run("backprop", 0.9), "curves": {"test_accuracy": [0.5, 0.9], "seconds": [2.0, 4.5]}}]
    assert compare_runs.courses(timed, "seconds", "test_accuracy", 100.0, unit=1.0) == {"backprop": [(2.0, 50.0), (4.5, 90.0)]}
    main(monkeypatch, tmp_path, timed, "--against", "time")
    with pytest.raises(SystemExit, match="does not say how long"):
        main(monkeypatch, tmp_path, [run("backprop", 0.9)], "--against", "time")
    with pytest.raises(SystemExit, match="compare them apart"):
        main(monkeypatch, tmp_path, [run("dgl", 0.7), run("dgl", 2.0, text=True)])
    with pytest.raises(SystemExit, match="no summary of a run"):
        monkeypatch.setattr(sys, "argv", ["compare_runs.py", str(tmp_path / "missing.json")])
        compare_runs.main()
