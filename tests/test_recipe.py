"""The training recipe as a user starts it, by DeepSpeed's launcher."""

from __future__ import annotations

import json
from pathlib import Path

import engine_cases
import pytest
import worlds
from recipe_runs import ROOT, launch, run, without_seconds

FIELDS = {"method", "model", "data", "stages", "pipe_ranks", "seed", "epochs", "train_loss", "test_accuracy",
          "samples_per_second", "peak_memory_bytes", "bytes_sent_per_sample", "delays", "config"}


@pytest.mark.parametrize("method, ranks", [("petra", 2), ("backprop", 1)])
def test_trains_and_reports(method: str, ranks: int, tmp_path: Path) -> None:
    summary = tmp_path / "summary.json"
    done = launch("train_resnet", "--deepspeed_config", f"ds_configs/{method}.json", "--epochs", "2", "--width", "4",
                  "--image_size", "8", "--summary", summary, ranks=ranks)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads(summary.read_text())
    assert results.keys() >= FIELDS
    assert results["method"] == method and results["pipe_ranks"] == ranks and results["epochs"] == 2
    assert results["test_accuracy"] > 0.3 and results["samples_per_second"] > 0
    if method == "petra":
        assert results["stages"] == 10 and results["delays"] == list(range(18, -1, -2))
        assert results["bytes_sent_per_sample"] > 0
    assert summary.with_suffix(".png").stat().st_size > 5000


def test_local_losses(tmp_path: Path) -> None:
    """Each stage's accuracy is in the summary and the picture."""
    results = run("train_resnet", tmp_path, "--deepspeed_config", "ds_configs/dgl.json", "--model", "cnn6", "--epochs", "2",
                  "--width", "4", "--image_size", "8", ranks=2)
    assert results["stages"] == 6 and results["test_accuracy"] > 0.2
    assert [len(curve) for curve in results["stage_curves"]["accuracy"].values()] == [2] * 6
    assert (tmp_path / "summary.png").stat().st_size > 5000


def test_generated_inputs(tmp_path: Path) -> None:
    """Accuracy from each stage on, mismatches and cosines by epoch, until the serial network takes over."""
    config = json.loads((ROOT / "ds_configs" / "auxnet_penalty.json").read_text())
    config["decoupled"]["track_gradients"] = 10
    (tmp_path / "config.json").write_text(json.dumps(config))
    results = run("train_resnet", tmp_path, "--deepspeed_config", tmp_path / "config.json", "--model", "resnet20",
                  "--epochs", "3", "--width", "4", "--image_size", "8", "--serial_epochs", "1", ranks=2)
    assert results["stages"] == 2 and len(results["accuracy_from_stage"]) == 2
    assert results["accuracy_from_stage"][0] == results["test_accuracy"]
    assert [len(curve) for curve in results["accuracy_from_stage_curves"].values()] == [3]
    assert [value is None for value in results["mismatch"]["stage 0"]] == [False, False, True]
    # Of the weights behind the update, so not quite 1.
    assert results["cosine"]["stage 0"][2] > 0.8 > results["cosine"]["stage 0"][1]
    assert (tmp_path / "summary.png").stat().st_size > 5000


@pytest.mark.parametrize("method", ["petra", "backprop"])
def test_resumes(method: str, tmp_path: Path) -> None:
    arguments = ("--deepspeed_config", f"ds_configs/{method}.json", "--epochs", "2", "--width", "4", "--image_size", "8")
    whole = run("train_resnet", tmp_path, *arguments, "--save_checkpoint", tmp_path / "saved", "--save_every", "1")
    (tmp_path / "saved" / "latest").write_text("update22")
    resumed = run("train_resnet", tmp_path, *arguments, "--resume", tmp_path / "saved")
    assert without_seconds(resumed) == without_seconds(whole)
    assert resumed["curves"]["seconds"][0] == whole["curves"]["seconds"][0] < resumed["curves"]["seconds"][1]


@pytest.mark.parametrize("arguments, words", [
    (["--data", "nowhere"], ["--data", "nowhere"]),
    (["--pipe_ranks", "3"], ["pipe_ranks", "3"]),
])
def test_bad_arguments(arguments: list[str], words: list[str]) -> None:
    done = launch("train_resnet", "--deepspeed_config", "ds_configs/petra.json", *arguments)
    assert done.returncode != 0
    for word in words:
        assert word in done.stdout + done.stderr


def test_shipped_configurations_are_sound() -> None:
    from ds_decoupled.config import PRESETS, parse_block

    files = {path.stem: parse_block(path) for path in (ROOT / "ds_configs").glob("*.json")}
    assert set(files) >= set(PRESETS)
    assert all(block is not None and block.method == name for name, block in files.items() if name in PRESETS)


def test_k_may_change_when_nothing_is_in_flight() -> None:
    [result] = worlds.run(1, engine_cases.other_batch_size, {"method": "petra", "k": 2, "batches": 10})
    assert "call drain() first" in result["message"]
    assert result["k"] == 3 and result["updates"] == [2] * 7
