"""The AuxNet study: which runs it has, a tiny one from end to end, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import auxnet_study
from ds_decoupled.errors import ConfigError
from studies.auxnet_report import accuracy_table, cosines, mismatches
from studies.auxnet_settings import AuxNetSetting, settings
from studies.image_settings import ImageStudy
from train_resnet import end_serially

TINY = ["--images", "32", "--width", "1", "--image_size", "8", "--epochs", "2", "--micro_batch", "16",
        "--methods", "auxnet_penalty"]


def test_every_setting_is_swept_alone() -> None:
    found = settings(["auxnet_penalty"], [2, 4], {"fit": 3.0}, {"fit": [1.0, 3.0], "pull": [0.5], "share": []}, [0, 1], [7])
    objects = [json.loads(s.auxnet) for s in found if s.method != "backprop" and s.stages == 2 and s.serial_epochs == 0]
    assert objects == [{"fit": 3.0}, {"fit": 1.0}, {"fit": 3.0, "pull": 0.5}]
    assert len(found) == 1 + 3 * 2 * 2 and {s.seed for s in found} == {7}
    last = found[-1].config(ImageStudy("digits", epochs=4), 40)["decoupled"]
    assert last["auxnet"] == {"fit": 3.0, "pull": 0.5, "serial_from": 30} and last["stages"] == 4


def test_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "study.json"
    auxnet_study.main([*TINY, "--fit", "3", "--sweep_fit", "30", "--serial_epochs", "1", "--output", str(output)])
    runs = json.loads(output.read_text())["runs"]
    assert [run["setting"]["method"] for run in runs] == ["backprop", "auxnet_penalty", "auxnet_penalty"]
    assert all(len(run["accuracy_from_stage"]) == 2 for run in runs[1:])
    assert [len(epoch) for epoch in runs[1]["mismatch"]] == [1, 0], "the second epoch has no generated inputs"
    assert output.with_name("study_fit.png").stat().st_size > 5000
    assert "fit 30, 1 epochs serial" in capsys.readouterr().out


def test_table() -> None:
    rows = [{"micro_batch": m, "stage": s, "cosine": 0.5 if m else 0.0} for m in (0, 8) for s in (0, 1)]
    run = {"test_accuracy": 0.5, "accuracy_from_stage": [0.5, 0.625], "mismatch": [[2.0], [0.25], []], "share": 0.1,
           "cosines": rows}
    assert cosines(run) == [0.5, 0.5] and mismatches([run]) == [0.25]
    runs = {AuxNetSetting("backprop", 1): {"test_accuracy": 0.75},
            AuxNetSetting("auxnet_penalty", 2, '{"fit":3}'): run,
            AuxNetSetting("auxnet_penalty", 2, '{"fit":3}', seed=1): {**run, "test_accuracy": 0.6}}
    text = accuracy_table(runs)
    assert "| `backprop` | – | – | 75.0 |" in text
    assert "| `auxnet_penalty` | 2 | fit 3 | 55.0 ± 7.1 | 62.5 | 0.25 | 0.50 · 0.50 | 10 % |" in text


def test_epochs_at_the_end() -> None:
    """In the recipe: the update at which the last epochs begin; refused where nothing could end."""
    config = {"decoupled": {"method": "auxnet_penalty"}}
    end_serially(config, 2, [10, 20, 30])
    assert config["decoupled"]["auxnet"] == {"serial_from": 10}
    end_serially(config, 3, [10, 20, 30])
    assert config["decoupled"]["auxnet"] == {"serial_from": 0}
    for method, epochs, words in (("petra", 1, "no inputs are generated"), ("auxnet_penalty", 4, "3 epochs")):
        with pytest.raises(ConfigError, match=words):
            end_serially({"decoupled": {"method": method}}, epochs, [10, 20, 30])


@pytest.mark.parametrize(("arguments", "words"), [(["--data", "nowhere"], "nowhere"), (["--sweep_share", "2"], "share")])
def test_refusals(arguments: list[str], words: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=words):
        auxnet_study.main([*TINY, *arguments, "--output", str(tmp_path / "out.json")])
