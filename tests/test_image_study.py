"""The image study: a tiny grid from end to end, what it repeats, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import image_study
from studies.image_report import codec_table, delay_table
from studies.image_settings import ImageSetting, ImageStudy, compression, delays

TINY = ["--images", "64", "--width", "1", "--image_size", "8", "--epochs", "2", "--micro_batch", "16"]


def test_delays_slow_one_stage_at_a_time() -> None:
    found = delays([1.0, 2.0], [1, 10], [0, 5], [0])
    assert len(found) == 2 + 2 * (1 + 2)
    slowed = [json.loads(setting.block)["slow_down"] for setting in found if setting.x == 2.0]
    assert slowed == [[2.0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 2.0]] * 2
    config = found[-1].config(ImageStudy("digits"), 7)["decoupled"]
    assert config["pace"] == "clock" and config["stop_after"] == [7] * 6 and config["replay"] == {"size": 10}


def test_compression_is_of_every_link() -> None:
    none, _, vq, asynchronous = (json.loads(s.block) for s in compression(["none", "vq 16x (D = 4)"], 10, 1.2, [0]))
    assert none == {"method": "dgl"}
    assert vq["codec"] == {"forward": "vq", "every_link": True} and vq["vq"]["group"] == 4
    assert asynchronous["method"] == "dgl_async" and asynchronous["codec"] == vq["codec"]


def test_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Runs, resumes, reports: every stage makes its own updates, whoever is slowed."""
    output = tmp_path / "study.json"
    arguments = ["delays", *TINY, "--slow_down", "3", "--sizes", "2", "--stages", "1", "--output", str(output)]
    image_study.main(arguments)
    runs = json.loads(output.read_text())["runs"]
    assert [run["setting"]["line"] for run in runs] == ["backprop", "dgl", "M = 2"]
    assert runs[2]["updates"] == [8] * 6 and runs[2]["calls"] > 8
    assert all(0 <= run["test_accuracy"] <= 1 for run in runs)
    assert output.with_suffix(".png").stat().st_size > 5000
    out = capsys.readouterr().out
    assert "S = 3" in out and "| M = 2 |" in out
    image_study.main(arguments)
    assert "holds 3 of 3 runs already" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="other settings: {'images': 64}"):
        image_study.main([*arguments, "--images", "32"])


def test_tables() -> None:
    replay = [{"uses": {"0": 1, "2": 3}, "age": {"mean": 1.5, "max": 3}, "bytes": 2**20}] * 2
    runs = {ImageSetting("dgl", None, "{}"): {"test_accuracy": 0.5, "replay": [], "seconds": 3.0},
            ImageSetting("M = 1", 1.5, "{}"): {"test_accuracy": 0.25, "replay": replay, "seconds": 3.0},
            ImageSetting("M = 1", 1.5, "{}", 1): {"test_accuracy": 0.35, "replay": replay, "seconds": 3.0}}
    assert "| M = 1 | 30.0 ± 7.1 |" in delay_table(runs) and "| dgl | 50.0 |" in delay_table(runs)
    assert "| M = 1 | 30.0 ± 7.1 | 2.0 | 1.50 | 1.50 | 3 |" in codec_table(runs)


@pytest.mark.parametrize(("arguments", "words"), [
    (["delays", "--codecs", "int8"], ["--codecs", "delays has no such thing"]),
    (["compression", "--sizes", "3"], ["--sizes", "compression has no such thing"]),
    (["delays", "--data", "nowhere"], ["--data", "nowhere"]),
])
def test_refusals(arguments: list[str], words: list[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as refused:
        image_study.main([*arguments, "--output", str(tmp_path / "out.json")])
    assert all(word in str(refused.value) for word in words), str(refused.value)
