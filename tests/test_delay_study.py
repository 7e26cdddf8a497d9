"""The delay study: a tiny grid from end to end, what it repeats, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import delay_study
from ds_decoupled.errors import ConfigError
from studies.report import rows_of, tables
from studies.settings import Setting, Study

TINY = ["--blocks", "1", "--width", "16", "--heads", "2", "--sequence", "16", "--micro_batch", "2", "--micro_batches", "12",
        "--eval_micro_batches", "2", "--probe_every", "2", "--threads", "1"]


def test_stages() -> None:
    """The embedding is joined to the first half-block, the head to the last; or both stand alone."""
    study = Study("topics")
    assert study.stage_bounds(8) == [0, 2, 3, 4, 5, 6, 7, 8, 10]
    assert study.stage_bounds(2) == [0, 5, 10]
    assert study.stage_bounds(10) == list(range(11))
    for stages in (0, 9, 11):
        with pytest.raises(ConfigError, match="1 to 8 stages, or 10"):
            study.stage_bounds(stages)


def test_delay_of_the_first_stage() -> None:
    """In updates; local losses come from no further than the window."""
    def delay(method: str, **more: Any) -> float:
        return run(method, 1.0, **more)[0].delay

    assert delay("backprop") == 0 and delay("petra") == 7 and delay("petra", hops=(1, 1), k=4) == 3.5
    assert delay("dgl") == 0 and delay("overlapping") == 1 and delay("overlapping", block='{"window": 3}') == 2
    same = run("dgl", 1.0, block='{"head": "shared", "queue": 4}'), run("dgl", 1.0, block='{"queue":4,"head":"shared"}')
    assert same[0][0] == same[1][0]


def test_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Runs, resumes, reports."""
    output = tmp_path / "study.json"
    arguments = [*TINY, "--methods", "petra", "backprop", "--stages", "2", "--optimizers", "adamw", "--output", str(output)]
    delay_study.main(arguments)
    first = json.loads(output.read_text())
    assert [run["setting"]["method"] for run in first["runs"]] == ["backprop", "petra"]
    for run in first["runs"]:
        assert 0 < run["validation_loss"] < 6 and run["seconds"] > 0
    assert first["runs"][0]["reconstruction_error"] is None
    assert 1e-9 < first["runs"][1]["reconstruction_error"] < 0.1
    assert len(first["runs"][1]["curves"]["reconstruction_error"]) == 6
    assert output.with_suffix(".png").stat().st_size > 5000
    assert "| adamw | petra | 2 | (0, 1) | 1 |" in capsys.readouterr().out
    delay_study.main([*arguments, "--k", "1", "4"])
    out = capsys.readouterr()
    assert "holds 2 of 4 runs already" in out.err and "k = 4" in out.out
    second = json.loads(output.read_text())
    assert second["runs"][:2] == first["runs"] and len(second["runs"]) == 4
    with pytest.raises(SystemExit, match="other settings: {'micro_batches': 12}"):
        delay_study.main([*arguments, "--micro_batches", "13"])


def test_threads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No hops between stages that share their threads; the delay is what it came to."""
    output = tmp_path / "study.json"
    delay_study.main([*TINY, "--methods", "pd_asgd", "--stages", "2", "--hops", "0,1", "1,1", "--optimizers", "adamw",
                      "--output", str(output)])
    made, = json.loads(output.read_text())["runs"]
    delay = made["staleness"][0]
    assert len(made["staleness"]) == 2 and f"| adamw | pd_asgd | 2 | – | {delay:.3g} |" in capsys.readouterr().out


def run(method: str, loss: float, **setting: Any) -> tuple[Setting, dict[str, Any]]:
    made = Setting(**{"method": method, "stages": 8, "hops": (0, 1), "k": 1, "optimizer": "muon", "lr": 1e-3, **setting})
    return made.simplified(), {"validation_loss": loss, "reconstruction_error": None, "seconds": 2.0}


def test_gaps_are_to_the_best_backpropagation_of_the_same_optimizer_and_k() -> None:
    runs = dict([run("backprop", 1.8), run("backprop", 1.7, seed=1), run("backprop", 1.9, lr=1e-4), run("backprop", 2.0, k=4),
                 run("petra", 1.8), run("petra", 2.0, seed=1), run("petra", 2.5, k=4), run("dsp", 1.5, optimizer="adamw")])
    gaps = {(row.setting.method, row.setting.k): row.gap for row in rows_of(runs) if row.setting.method != "backprop"}
    assert gaps[("petra", 1)] == pytest.approx(0.15) and gaps[("petra", 4)] == pytest.approx(0.5)
    assert gaps[("dsp", 1)] is None
    assert "1.900 ± 0.141 | +0.150" in tables(runs)


@pytest.mark.parametrize(("arguments", "words"), [
    (["--hops", "1"], ["--hops", "two whole numbers"]),
    (["--stages", "5"], ["--stages", "1 to 2 stages, or 4"]),
    (["--params", "[1]"], ["--params", "a JSON object"]),
    (["--stages", "2", "--hops", "0,0"], ["decoupled.hops", "b >= 1"]),
    (["--stages", "2", "--k", "13"], ["--micro_batches", "12", "k = 13"]),
    (["--stages", "2", "--heads", "3"], ["--heads", "3", "width 16"]),
    (["--stages", "2", "--data", "/none.txt"], ["--data", "/none.txt"]),
    (["--stages", "2", "--plot", "/proc/1/picture.png"], ["--plot", "/proc/1/picture.png"]),
    (["--stages", "2", "--output", "/proc/1/study.json"], ["--output", "/proc/1/study.json"]),
    (["--methods", "backprop", "reversible", "--lr_by_delay", "3"], ["--lr_by_delay", "[3]", "would change nothing"]),
    (["--methods", "backprop", "--stages", "2"], ["--stages", "[2]", "would change nothing"]),
])
def test_bad_arguments(arguments: list[str], words: list[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as failure:
        delay_study.main([*TINY, "--output", str(tmp_path / "study.json"), *arguments])
    assert all(word in str(failure.value) for word in words)


def test_a_file_that_is_none_of_ours(tmp_path: Path) -> None:
    output = tmp_path / "other.json"
    output.write_text('{"runs": []}')
    with pytest.raises(SystemExit, match="holds no delay study"):
        delay_study.main([*TINY, "--output", str(output)])


def test_a_run_that_fails_does_not_end_the_others(tmp_path: Path) -> None:
    output = tmp_path / "study.json"
    with pytest.raises(SystemExit):
        delay_study.main([*TINY, "--methods", "backprop", "--optimizers", "no_such_package.Best", "adamw",
                          "--output", str(output)])
    runs = json.loads(output.read_text())["runs"]
    assert "cannot be imported" in runs[0]["error"] and runs[1]["validation_loss"] > 0
