"""Every option of every recipe: numbers out of bounds and options that would change nothing are refused with a sentence."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import recipe_runs
import worlds
from tiny_lm import save_tiny

from run.options import yes_or_no

RECIPES = ["train_resnet", "train_lm", "finetune_lm", "delay_study", "benchmark", "compare_runs"]
SET_BY_THE_LAUNCHER = {"local_rank"}


def parser_of(recipe: str, monkeypatch: pytest.MonkeyPatch) -> argparse.ArgumentParser:
    """The parser that the recipe makes."""
    class Found(Exception):
        pass

    def caught(parser: argparse.ArgumentParser, *_: Any) -> Any:
        raise Found(parser)

    with monkeypatch.context() as patch, pytest.raises(Found) as found:
        patch.setattr(argparse.ArgumentParser, "parse_args", caught)
        importlib.import_module(recipe).parse_arguments()
    parser: argparse.ArgumentParser = found.value.args[0]
    return parser


@pytest.mark.parametrize("recipe", RECIPES)
def test_numbers(recipe: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """No number gets past a parser that is nan, infinite, negative, or so large that counting to it never ends."""
    parser, seen = parser_of(recipe, monkeypatch), 0
    needed = {"finetune_lm": ["--model", "m", "--data", "d"], "compare_runs": ["x.json"]}.get(recipe, [])
    for action in parser._actions:
        if action.dest in SET_BY_THE_LAUNCHER:
            continue
        assert action.type not in (int, float), f"{action.dest} takes any number"
        if action.type in (None, str, Path, yes_or_no) or not callable(action.type):
            continue
        seen += 1
        option, rounds = action.option_strings[0], action.type.__qualname__.startswith("whole.")
        for text in ["nan", "inf", "-inf", "-1", "-0.5", "1e999", "one", "", *(["1.5", "1" + "0" * 30] if rounds else [])]:
            with pytest.raises(SystemExit) as end:
                parser.parse_args([*needed, f"{option}={text}"])
            said = capsys.readouterr().err.splitlines()[-1]
            names = "/".join(action.option_strings)
            assert end.value.code == 2 and f"argument {names}: {text!r} is not a " in said, said
            assert "at least" in said or "above" in said
    assert seen > 5 or recipe == "compare_runs"


def _refuses(read: Any, text: str) -> bool:
    try:
        read(text)
    except argparse.ArgumentTypeError:
        return True
    return False


@pytest.mark.parametrize("recipe, option, least", [
    ("train_resnet", "--eval_every", 1), ("train_resnet", "--save_every", 1), ("train_resnet", "--epochs", 1),
    ("train_resnet", "--image_size", 8), ("train_resnet", "--width", 1), ("train_resnet", "--seed", 0),
    ("train_lm", "--evaluations", 1), ("train_lm", "--save_every", 1), ("train_lm", "--sample", 0), ("train_lm", "--blocks", 1),
    ("finetune_lm", "--lora_rank", 0), ("delay_study", "--k", 1), ("delay_study", "--jobs", 1), ("delay_study", "--threads", 1),
    ("delay_study", "--probe_every", 1), ("benchmark", "--repeats", 1), ("benchmark", "--calls", 1),
    ("benchmark", "--updates", 1),
])
def test_least(recipe: str, option: str, least: int, monkeypatch: pytest.MonkeyPatch) -> None:
    [action] = [a for a in parser_of(recipe, monkeypatch)._actions if option in a.option_strings]
    assert callable(action.type)
    assert action.type(str(least)) == least and _refuses(action.type, str(least - 1))


@pytest.mark.parametrize("arguments, words", [
    (["memory", "--k", "1", "4"], ["--k", "[1, 4]", "one k"]),
    (["depth", "--model", "revnet18"], ["--model", "change nothing", "--length, --micro_batch, --width"]),
    (["long", "--k", "2"], ["--k", "[2]", "--updates, --methods, --ranks"]),
    (["long", "--methods", "petra", "1f1b"], ["--methods", "1f1b", "long knows", "petra"]),
    (["--methods", "backprop"], ["--methods", "backprop", "speed knows", "1f1b"]),
    (["long", "--ranks", "11"], ["--ranks", "11", "10 layers"]),
    (["heads", "--repeats", "3"], ["--repeats", "3", "change nothing"]),
    (["--model", "gpt-tiny", "--image_size", "16"], ["--image_size", "16", "gpt-tiny"]),
    (["--blocks", "2"], ["--blocks", "2", "revnet18"]),
    (["--width", "900000"], ["--width", "900000", "GiB"]),
    (["--micro_batch", "900000000"], ["--micro_batch", "GiB"]),
    (["--model", "gpt-tiny", "--width", "13"], ["heads", "13"]),
    (["--output", "/proc/1/x.json"], ["--output", "/proc/1/x.json", "cannot be written"]),
])
def test_benchmark(arguments: list[str], words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    import benchmark

    with pytest.raises(SystemExit) as end:
        benchmark.parse_arguments(arguments)
    said = capsys.readouterr().err.splitlines()[-1]
    assert end.value.code == 2 and all(word in said for word in words), said


SCHEDULER = {"type": "WarmupLR", "params": {"warmup_num_steps": 2}}
TORCHS = {"type": "StepLR", "params": {"step_size": 2}}


@pytest.mark.parametrize("recipe, config, arguments, words", [
    ("train_resnet", {}, ["--save_every", "2"], ["--save_every", "2", "--save_checkpoint"]),
    ("train_resnet", {}, ["--data_root", "x"], ["--data_root", "digits"]),
    ("train_resnet", {}, ["--epochs", "3", "--warmup_epochs", "4"], ["--warmup_epochs", "4.0", "3 epochs"]),
    ("train_resnet", {}, ["--width", "1000000"], ["--width", "1000000", "GiB"]),
    ("train_resnet", {}, ["--num_classes", "9999999", "--width", "64"], ["GiB"]),
    ("train_resnet", {}, ["--image_size", "100000"], ["--image_size", "100000", "GiB"]),
    ("train_resnet", {}, ["--backend", "smoke"], ["--backend", "smoke", "gloo"]),
    ("train_resnet", {}, ["--backend", "nccl"], ["--backend", "nccl"]),
    ("train_resnet", {"scheduler": TORCHS}, ["--schedule", "steps"], ["--schedule", "steps", "StepLR"]),
    ("train_resnet", {"scheduler": TORCHS}, ["--warmup_epochs", "1"], ["--warmup_epochs", "StepLR"]),
    ("train_resnet", {"scheduler": SCHEDULER}, ["--lr", "0.2"], ["--lr", "0.2", "WarmupLR"]),
    ("train_lm", {"scheduler": SCHEDULER}, ["--warmup", "0.2"], ["--warmup", "WarmupLR"]),
    ("train_lm", {}, ["--temperature", "0.5"], ["--temperature", "0.5", "--sample 0"]),
    ("train_lm", {}, ["--untie_embeddings"], ["--untie_embeddings", "two tensors"]),
    ("train_lm", {}, ["--model", "CONFIG", "--plain"], ["--plain", "True"]),
    ("train_lm", {}, ["--model", "CONFIG", "--dropout", "0.1"], ["--dropout", "0.1"]),
    ("train_lm", {}, ["--model", "CONFIG", "--embedding_std", "0.3"], ["--embedding_std", "0.3"]),
    ("train_lm", {}, ["--model", "CONFIG", "--blocks", "2"], ["--blocks", "2"]),
    ("finetune_lm", {}, ["--model", "CONFIG", "--untie_embeddings"], ["--untie_embeddings", "two tensors"]),
    ("finetune_lm", {}, ["--model", "CONFIG", "--lora_rank", "2", "--adapters_only"], ["--adapters_only", "--output"]),
    ("finetune_lm", {}, ["--model", "CONFIG", "--save_every", "1"], ["--save_every", "--save_checkpoint"]),
])
def test_what_would_change_nothing_or_fit_nowhere(recipe: str, config: dict[str, Any], arguments: list[str], words: list[str],
                                                  tmp_path: Path) -> None:
    """On both ranks, with one sentence."""
    path = recipe_runs.config_file(tmp_path, "delayed", stages="ranks")
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    if "CONFIG" in arguments:
        save_tiny(tmp_path / "model")
    given = [str(tmp_path / "model") if word == "CONFIG" else word for word in arguments]
    text = [] if recipe == "train_resnet" else ["--data", "topics", "--sample", "0"]
    with pytest.raises(worlds.RankFailed) as failure:
        worlds.run(2, recipe_runs._main, recipe, ["--deepspeed_config", str(path), *text, *given], timeout=30)
    for error in failure.value.errors:
        assert error is not None and error.startswith("SystemExit: "), failure.value
        assert all(word in error.splitlines()[0] for word in words), error.splitlines()[0]


def test_summaries_that_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from test_compare_runs import run

    import compare_runs

    good = run("dgl", 0.7)
    broken: list[Any] = [[], "text", 3, None, {}, {**good, "curves": []}, {**good, "curves": {"test_accuracy": 3}},
                         {**good, "stages": "four"}, {**good, "config": {"decoupled": 3}}, {**good, "test_accuracy": [1]},
                         {name: value for name, value in good.items() if name != "peak_memory_bytes"}]
    for content in broken:
        (tmp_path / "a.json").write_text(json.dumps(content))
        monkeypatch.setattr(sys, "argv", ["compare_runs.py", str(tmp_path / "a.json"), "--plot", str(tmp_path / "a.png")])
        with pytest.raises(SystemExit, match=r'compare_runs\.py: "summaries": .*a\.json.* cannot be used: it holds no summary'):
            compare_runs.main()
    for content in (b"\xff\xfe", b"[" * 100_000):
        (tmp_path / "a.json").write_bytes(content)
        with pytest.raises(SystemExit, match="it holds no summary"):
            compare_runs.main()
    (tmp_path / "a.json").write_text(json.dumps(good))
    for plot in ("x.nope", "/proc/1/x.png", str(tmp_path), str(tmp_path / "picture")):
        monkeypatch.setattr(sys, "argv", ["compare_runs.py", str(tmp_path / "a.json"), "--plot", plot])
        with pytest.raises(SystemExit, match='"--plot": '):
            compare_runs.main()
