"""The best test of a run: which it is, when it ends the run, and that the run ends with its weights; lines and speed beside."""

from __future__ import annotations

from pathlib import Path

import pytest
import worlds
from recipe_runs import config_file, launch, run
from tiny_lm import TEXT, tiny_config, validation_loss

from ds_decoupled.errors import ConfigError
from run.best import Best
from run.monitors import report_to
from run.speed import Speed
from run.training import Progress

NAN = float("nan")
SHORT = ("--sequence_length", "16", "--micro_batches", "48", "--eval_steps", "2", "--eval_micro_batches", "5", "--sample", "0")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT * 60)
    return path


def progress(*scores: float) -> Progress:
    return Progress(updates=list(range(0, 10 * len(scores), 10)), score=list(scores))


def test_place() -> None:
    """The first of equal ones; none before training."""
    assert Best(lower=True).place(progress(1.0, 3.0, 2.0, 2.0, NAN)) == 2
    assert Best(lower=False).place(progress(9.0, 3.0, 2.0, NAN, 3.0)) == 1
    assert Best(lower=True).place(progress(1.0)) is None


def test_exhausted() -> None:
    """Tests since the best one are counted, not stretches."""
    best = Best(lower=True, patience=2)
    assert not best.exhausted(progress(1.0)) and not best.exhausted(progress(1.0, 3.0, 4.0))
    assert not best.exhausted(progress(1.0, 3.0, NAN, 4.0, NAN)) and best.exhausted(progress(1.0, 3.0, NAN, 4.0, 3.0))
    assert not Best(lower=True).exhausted(progress(*range(1, 20)))


@pytest.mark.parametrize("lower", [True, False])
def test_what_has_diverged_is_worst(lower: bool) -> None:
    """So a run ends early that never gets better than nan, and one that was good before ends with what was good."""
    best = Best(lower, patience=2)
    told = progress(*(best.scored(score) for score in (1.0, 3.0, NAN, NAN)))
    assert best.place(told) == 1 and best.exhausted(told)
    assert best.exhausted(progress(1.0, *(best.scored(NAN) for _ in range(3))))


@pytest.mark.parametrize(("method", "ranks"), [("delayed", 2), ("backprop", 1)])
def test_ends_with_the_best_weights(method: str, ranks: int, tmp_path: Path, text: Path) -> None:
    """It learns the text, and grows worse on the same letters the other way round: the run stops early, and saves what was
    best; --resume goes on from the last checkpoint."""
    from transformers import AutoModelForCausalLM

    config, output, saved = tmp_path / "llama" / "config.json", tmp_path / "trained", tmp_path / "saved"
    held = tmp_path / "held.txt"
    held.write_text(TEXT[::-1] * 6)
    tiny_config().save_pretrained(config.parent)
    results = run("train_lm", tmp_path, "--deepspeed_config", config_file(tmp_path, method), "--data", text, *SHORT,
                  "--validation", held, "--model", config, "--output", output, "--lr", "0.03", "--micro_batches", "144",
                  "--eval_steps", "6", "--save_checkpoint", saved,
                  "--load_best_model_at_end", "--early_stopping_patience", "2", ranks=ranks)
    curve = results["curves"]["validation_loss"]
    best = curve.index(min(curve))
    assert len(curve) == best + 3 < 12, curve
    assert results["best_update"] == 6 * (best + 1)
    assert results["validation_loss"] == curve[best]
    model = AutoModelForCausalLM.from_pretrained(output).eval()
    ids = list(held.read_bytes())
    assert validation_loss(model, [0] * 9 * len(ids) + ids, 16, 4, 5) == pytest.approx(curve[best], rel=1e-4)
    assert (saved / "best").is_dir() and (saved / "latest").read_text() == f"update{6 * len(curve)}"


def test_lines(tmp_path: Path, text: Path) -> None:
    """A line every so many updates, and the monitor's file has the speed too."""
    done = launch("train_lm", "--deepspeed_config", config_file(tmp_path, "delayed", k=1), "--data", text, "--blocks", "1",
                  "--plain", *SHORT, "--eval_steps", "48", "--logging_steps", "16", "--report_to", "csv",
                  "--peak_tflops", "0.1", ranks=1, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("update ")]
    assert [line.split(":")[0] for line in lines] == ["update 16", "update 32", "update 48"]
    assert all("tokens/s, MFU " in line and "rate " in line and "nan" not in line for line in lines[1:])
    files = {file.name for file in (tmp_path / "runs" / "logs" / "delayed").iterdir()}
    assert any("tokens_per_second" in name for name in files) and any("eval_loss" in name for name in files)


def test_speed() -> None:
    """Two updates of 3 samples of 5 tokens in 3 seconds; 6 FLOPs a token of 600 there could be."""
    assert Speed(3, "tokens", 5).words(2, 3.0) == "10 tokens/s"
    assert Speed(3, "tokens", 5, flops=6.0, peak_flops=600.0).words(2, 3.0) == "10 tokens/s, MFU 10.0%"


def test_report_to() -> None:
    """The JSON's own settings stay; none switches off what it has."""
    config = {"decoupled": {"method": "dgl"}, "csv_monitor": {"enabled": False, "job_name": "mine"}}
    assert report_to(config, None, Path("logs")) is config
    csv = report_to(config, ["csv"], Path("logs"))["csv_monitor"]
    assert csv == {"enabled": True, "job_name": "mine", "output_path": "logs"}
    assert report_to(config, ["none"], Path("logs"))["csv_monitor"] == {"enabled": False, "job_name": "mine"}
    with pytest.raises(ConfigError, match="none allows no other"):
        report_to(config, ["none", "csv"], Path("logs"))


@pytest.mark.parametrize(("changes", "words"), [
    (["--load_best_model_at_end"], ["--load_best_model_at_end", "--save_checkpoint"]),
    (["--evaluations", "2"], ["--evaluations", "--eval_steps"]),
    (["--report_to", "comet_ml"], ["--report_to", "comet_ml", "pip install"]),
])
def test_bad_arguments(changes: list[str], words: list[str], tmp_path: Path, text: Path) -> None:
    with pytest.raises(worlds.RankFailed) as failure:
        run("train_lm", tmp_path, "--deepspeed_config", config_file(tmp_path, "petra"), "--data", text, *SHORT, *changes)
    assert all(word in str(failure.value) for word in words)
