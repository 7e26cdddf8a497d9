"""Files handed in and places to write to: what is wrong with them is said before training, on every rank."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import recipe_runs
import worlds
from tiny_lm import save_tiny

from ds_decoupled.errors import ConfigError
from run.places import check_file, check_folder, check_picture

QUICK = ["--epochs", "1", "--width", "4", "--image_size", "8"]


def refusals(recipe: str, *arguments: str | Path, ranks: int = 2) -> list[str]:
    """The one sentence of every rank."""
    with pytest.raises(worlds.RankFailed) as failure:
        worlds.run(ranks, recipe_runs._main, recipe, [*map(str, arguments)], timeout=60)
    lines = [str(error).splitlines()[0] for error in failure.value.errors]
    assert all(line.startswith("SystemExit: ") for line in lines), failure.value
    return lines


def image_config(folder: Path, method: str = "petra", k: int = 4, **block: object) -> Path:
    path = folder / f"{method}{k}{''.join(block)}.json"
    path.write_text(json.dumps({
        "train_micro_batch_size_per_gpu": 64, "gradient_accumulation_steps": k, "optimizer": {"type": "SGD"},
        "decoupled": {"method": method, "stages": "ranks", **block}}))
    return path


def test_places(tmp_path: Path) -> None:
    """What is there stays as it is; what is not there is made, or could be."""
    (tmp_path / "held.json").write_text("held")
    check_file("--summary", tmp_path / "held.json")
    check_file("--summary", tmp_path / "new" / "a.json")
    check_folder("--output", tmp_path / "other" / "deep")
    check_picture("--plot", tmp_path / "a.SVG")
    assert (tmp_path / "held.json").read_text() == "held"
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["deep", "held.json", "new", "other"]


@pytest.mark.parametrize("check, place", [
    (check_file, "."), (check_file, "held/a.json"), (check_file, "/proc/a.json"), (check_file, "n" * 300), (check_file, "pipe"),
    (check_file, "/dev/null/a.json"), (check_folder, "held"), (check_folder, "held/deep"), (check_folder, "/proc/deep"),
    (check_folder, "n" * 300), (check_picture, "a.nope"), (check_picture, "a"), (check_picture, "."),
    (check_picture, "held/a.png"),
])
def test_places_that_cannot_be_written(check: Callable[[str, Path], None], place: str, tmp_path: Path) -> None:
    (tmp_path / "held").write_text("a file")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ConfigError, match='"--somewhere": ') as error:
        check("--somewhere", tmp_path / place)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("arguments, words", [
    (["--summary", "/proc/1/s.json"], ["--summary", "/proc/1/s.json", "cannot be written"]),
    (["--summary", "FOLDER"], ["--summary", "is a folder"]),
    (["--summary", "FOLDER/a.png"], ["--summary", "a.png", "the same file"]),
    (["--plot", "FOLDER/a.nope"], ["--plot", "a.nope", "no picture"]),
    (["--plot", "/proc/1/p.png"], ["--plot", "/proc/1/p.png"]),
    (["--save_checkpoint", "/proc/1/c"], ["--save_checkpoint", "/proc/1/c"]),
    (["--save_checkpoint", "FILE"], ["--save_checkpoint", "is a file"]),
    (["--resume", "/nowhere"], ["--resume", "/nowhere", "no checkpoint"]),
    (["--resume", "FILE"], ["--resume", "no checkpoint"]),
    (["--deepspeed_config", "/nowhere.json"], ["/nowhere.json"]),
    (["--deepspeed_config", "FOLDER"], ["--deepspeed_config"]),
])
def test_refused_before_training(arguments: list[str], words: list[str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("a file")
    given = [word.replace("FOLDER", str(tmp_path)).replace("FILE", str(tmp_path / "file")) for word in arguments]
    for line in refusals("train_resnet", "--deepspeed_config", image_config(tmp_path), *QUICK, *given):
        assert all(word in line for word in words), line


@pytest.mark.parametrize("output", ["/proc/1/out", "FILE"])
def test_output(output: str, tmp_path: Path) -> None:
    save_tiny(tmp_path / "model")
    (tmp_path / "file").write_text("a file")
    config = recipe_runs.config_file(tmp_path, "dsp")
    for line in refusals("finetune_lm", "--deepspeed_config", config, "--data", "topics", "--model", tmp_path / "model",
                         "--output", output.replace("FILE", str(tmp_path / "file"))):
        assert '"--output": ' in line


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints that two ranks made, by method."""
    folder = tmp_path_factory.mktemp("saved")
    for method in ("petra", "backprop"):
        recipe_runs.run("train_resnet", folder, "--deepspeed_config", image_config(folder, method), *QUICK, "--save_checkpoint",
                        folder / method, ranks=2)
    return {method: folder / method for method in ("petra", "backprop")}


def cut(name: str) -> Callable[[Path], None]:
    """Leaves half of the newest checkpoint's files called so."""
    def spoil(folder: Path) -> None:
        files = sorted(folder.glob(f"update*/{name}"))
        assert files
        files[-1].write_bytes(files[-1].read_bytes()[:-len(files[-1].read_bytes()) // 2])
    return spoil


@pytest.mark.parametrize("method, spoil", [
    ("petra", cut("decoupled_engine.pt")), ("petra", cut("decoupled_stage_01*")), ("petra", cut("layer_09*")),
    ("petra", lambda folder: sorted(folder.glob("update*/decoupled_stage_00*"))[0].unlink()),
    ("petra", lambda folder: sorted(folder.glob("update*/layer_00*"))[0].write_bytes(b"")),
    ("petra", lambda folder: (folder / "latest").write_bytes(b"\xff\xfe\x00")),
    ("petra", lambda folder: (folder / "latest").write_text("update999")),
    ("backprop", cut("layer_00*")), ("backprop", cut("mp_rank_01*")),
    ("backprop", lambda folder: (folder / "latest").write_text("update999")),
], ids=["engine", "stage", "layer", "no-stage", "empty", "latest", "tag", "layer-backprop", "rank-backprop", "tag-backprop"])
def test_broken_checkpoints(method: str, spoil: Callable[[Path], object], saved: dict[str, Path], tmp_path: Path) -> None:
    """Whichever rank meets what is broken."""
    shutil.copytree(saved[method], tmp_path / "broken")
    spoil(tmp_path / "broken")
    arguments = "--deepspeed_config", image_config(tmp_path, method), *QUICK, "--epochs", "3"
    for line in refusals("train_resnet", *arguments, "--resume", tmp_path / "broken"):
        assert '"--resume": ' in line and "broken" in line, line


@pytest.mark.parametrize("method, other, words", [
    ("petra", {"method": "delayed"}, "method petra, recover reconstruct, hops (1, 1), this engine has delayed"),
    ("petra", {"method": "backprop"}, "--resume"), ("petra", {"recover": "input"}, "recover"),
    ("petra", {"hops": [0, 1]}, "hops"),
    ("petra", {"k": 2}, "k"), ("petra", {"model": "revnet34"}, '"--model": '), ("petra", {"width": 8}, '"--width": '),
    ("backprop", {"method": "petra"}, "decoupled_engine.pt is missing"), ("backprop", {"k": 2}, "gradient_accumulation_steps"),
    ("backprop", {"model": "resnet18"}, '"--model": '), ("backprop", {"width": 8}, '"--width": '),
], ids=lambda value: str(value))
def test_checkpoints_of_another_run(method: str, other: dict[str, object], words: str, saved: dict[str, Path],
                                    tmp_path: Path) -> None:
    own = {name: other[name] for name in ("method", "k", "recover", "hops") if name in other}
    config = image_config(tmp_path, **{"method": method, **own})  # type: ignore[arg-type]
    changed = [text for name in ("model", "width") if name in other for text in (f"--{name}", str(other[name]))]
    arguments = "--deepspeed_config", config, *QUICK, "--epochs", "3", *changed, "--resume", saved[method]
    for line in refusals("train_resnet", *arguments):
        assert "--resume" in line and words in line, line


def _sizes(**changes: int) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))
    return spoil


@pytest.mark.parametrize("spoil, words", [
    (lambda folder: os.truncate(folder / "model.safetensors", 20_000), "cannot be read"),
    (lambda folder: (folder / "model.safetensors").write_bytes(b""), "cannot be read"),
    (lambda folder: ((folder / "model.safetensors").unlink(),
                     (folder / "model.safetensors.index.json").write_text('{"weight_map": 3}')), "cannot be read"),
    (lambda folder: (folder / "config.json").write_bytes(b"\xff"), "configuration"),
    (_sizes(num_attention_heads=0), "configuration"), (_sizes(num_hidden_layers=9), "has no tensor model.layers."),
    (_sizes(hidden_size=64), "is of shape"), (_sizes(vocab_size=300), "is of shape"),
], ids=["cut", "empty", "index", "bytes", "no-heads", "layers", "width", "vocabulary"])
def test_models_that_do_not_load(spoil: Callable[[Path], object], words: str, tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model")
    spoil(model)
    for line in refusals("finetune_lm", "--deepspeed_config", recipe_runs.config_file(tmp_path, "dsp"), "--data", "topics",
                         "--sequence_length", "16", "--model", model):
        assert '"model": ' in line and words in line, line
