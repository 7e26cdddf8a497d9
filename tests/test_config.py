"""The ``decoupled`` block: presets, overrides, and what a user is told who gets it wrong."""

from dataclasses import astuple
from pathlib import Path
from typing import Any

import pytest

from ds_decoupled.config import FLUSH_HOPS, PRESETS, Axes, DecoupledConfig, parse_block, read_json
from ds_decoupled.errors import ConfigError


def parse(**block: Any) -> DecoupledConfig:
    parsed = parse_block({"decoupled": block})
    assert parsed is not None
    return parsed


def test_no_block_is_deepspeed() -> None:
    assert parse_block({"train_batch_size": 8}) is None


def test_presets() -> None:
    """The table of methods, word by word."""
    table = """
        backprop    global  graph        current  flush    stream  0,1  0
        reversible  global  reconstruct  current  flush    stream  0,1  0
        pipedream   global  graph        stashed  delayed  stream  0,1  0
        delayed     global  graph        current  delayed  stream  0,1  0
        dsp         global  input        current  delayed  stream  1,1  0
        petra       global  reconstruct  current  delayed  stream  1,1  0
        dgl         local   graph        current  delayed  stream  0,1  1
        overlapping local   graph        current  delayed  stream  0,1  2
        dgl_async   local   graph        current  delayed  replay  0,1  1
        pd_asgd     global  graph        current  layerwise stream 0,1  0
        hogwild     global  graph        current  layerwise stream 0,1  0
        lapsgd      global  graph        current  layerwise stream 0,1  0
        auxnet_penalty    auxiliary  graph  current  delayed  auxnet  0,1  0
        auxnet_lagrangian auxiliary  graph  current  delayed  auxnet  0,1  0
    """
    rows = [line.split() for line in table.strip().splitlines()]
    assert [row[0] for row in rows] == list(PRESETS)
    for name, *axes, hops, window in rows:
        a, b = hops.split(",")
        pace = "free" if name in ("dgl_async", "pd_asgd", "hogwild", "lapsgd") else "ticks"
        assert astuple(parse(method=name).axes()) == (*axes, (int(a), int(b)), int(window), pace,
                                                          "predicted" if name == "auxnet_lagrangian" else "zero")


def test_defaults() -> None:
    config = parse(method="petra")
    assert (config.stages, config.partition) == ("ranks", "parameters")
    assert (config.codec.forward, config.codec.backward) == ("none", "none")
    assert (config.split_backward, config.track_gradients) == (False, 0)


def test_overrides() -> None:
    assert parse(method="petra", hops=[0, 1]).axes().hops == (0, 1)
    assert parse(method="dsp", recover="graph", weights="stashed").axes() == \
        Axes("global", "graph", "stashed", "delayed", "stream", (1, 1))
    assert parse(method="petra", update="flush").axes() == PRESETS["reversible"]
    assert parse(method="petra", update="flush").axes().hops == FLUSH_HOPS


def test_axes_are_resolved_once() -> None:
    config = parse(method="petra", hops=[0, 1])
    assert config.axes() is config.axes()
    with pytest.raises(ValueError, match="frozen"):
        config.hops = [1, 1]


def test_what_deepspeed_does_itself() -> None:
    assert [name for name in PRESETS if parse(method=name).is_plain_backprop] == ["backprop"]
    assert parse(method="delayed", update="flush").is_plain_backprop


def test_codec_of_each_direction() -> None:
    both = parse(method="petra", codec="int8").codec
    assert (both.forward, both.backward) == ("int8", "int8")
    one = parse(method="petra", codec={"forward": "int4-rotated"}).codec
    assert (one.forward, one.backward) == ("int4-rotated", "none")


WRONG: list[tuple[dict[str, Any], str, Any, str, str]] = [
    # the block, the setting named, the value shown, a part of what is allowed, a part of the hint
    ({"method": "petr"}, "decoupled.method", "petr", "'dsp', 'petra'", "Did you mean 'petra'?"),
    ({"method": "xyz"}, "decoupled.method", "xyz", "'backprop', 'reversible'", "Take one of these"),
    ({}, "decoupled.method", None, "a method is needed: 'backprop'", 'For example {"method": "petra"}'),
    ({"method": "petra", "stage": 3}, "decoupled", "stage", "'stages'", "Did you mean 'stages'?"),
    ({"method": "petra", "gradient": "globl"}, "decoupled.gradient", "globl", "'global'", "Did you mean 'global'?"),
    ({"method": "petra", "recover": "inputs"}, "decoupled.recover", "inputs", "'graph', 'input', 'reconstruct'",
     "Did you mean 'input'?"),
    ({"method": "petra", "weights": "none"}, "decoupled.weights", "none", "'current', 'stashed'", "Take one"),
    ({"method": "petra", "update": "late"}, "decoupled.update", "late", "'flush', 'delayed'", "Take one"),
    ({"method": "petra", "input": "steam"}, "decoupled.input", "steam", "'stream'", "Did you mean 'stream'?"),
    ({"method": "petra", "codec": "fp4"}, "decoupled.codec", "fp4", "'none', 'bf16'", "Did you mean 'fp8'?"),
    ({"method": "petra", "codec": "zip"}, "decoupled.codec", "zip", "'int4-rotated'", "Take one"),
    ({"method": "petra", "codec": 8}, "decoupled.codec", 8, 'such as {"forward": "int8"', "Leave it out for none"),
    ({"method": "petra", "codec": {"forward": "zip"}}, "decoupled.codec.forward", "zip", "'none', 'bf16'", "Take one"),
    ({"method": "petra", "codec": {"backwards": "int8"}}, "decoupled.codec.backwards", "int8", "'backward'",
     "Did you mean 'backward'?"),
    ({"method": "petra", "stages": "block"}, "decoupled.stages", "block", "'ranks', 'blocks'",
     "Did you mean 'blocks'?"),
    ({"method": "petra", "stages": 0}, "decoupled.stages", 0, "at least 1 stage", 'Give a number, "ranks"'),
    ({"method": "petra", "stages": [0, 3, 3]}, "decoupled.stages", [0, 3, 3], "starts at 0 and grows", "For example"),
    ({"method": "petra", "stages": [1, 3]}, "decoupled.stages", [1, 3], "starts at 0 and grows", "For example"),
    ({"method": "petra", "stages": 2.5}, "decoupled.stages", 2.5, "integer", "without quotes"),
    ({"method": "petra", "partition": "size"}, "decoupled.partition", "size", "'parameters', 'uniform', 'profile'",
     "Take one"),
    ({"method": "petra", "partition": [0]}, "decoupled.partition", [0], "starts at 0 and grows", "For example"),
    ({"method": "petra", "hops": [1]}, "decoupled.hops", [1], "a >= 0 and b >= 1", "The paper's PETRA is [1, 1]"),
    ({"method": "petra", "hops": [1, 0]}, "decoupled.hops", [1, 0], "a >= 0 and b >= 1", "half the delay is [0, 1]"),
    ({"method": "petra", "hops": [-1, 1]}, "decoupled.hops", [-1, 1], "a >= 0 and b >= 1", "half the delay"),
    ({"method": "petra", "hops": "1,1"}, "decoupled.hops", "1,1", "list", "without quotes"),
    ({"method": "reversible", "hops": [1, 1]}, "decoupled.hops", [1, 1], '"update": "flush"', 'Leave "hops" out'),
    ({"method": "pipedream", "update": "flush"}, "decoupled.weights", "stashed", '"update": "flush"',
     'Take "weights": "current"'),
    ({"method": "delayed", "weights": "predicted"}, "decoupled.weights", "predicted", '"recover": "input"', '"dsp" or "petra"'),
    ({"method": "dgl", "weights": "predicted"}, "decoupled.weights", "predicted", "local losses", 'Leave "weights" out'),
    ({"method": "petra", "track_gradients": -1}, "decoupled.track_gradients", -1, "0 (never)", "For example 100"),
    ({"method": "petra", "track_gradients": True}, "decoupled.track_gradients", True, "integer", "without quotes"),
    ({"method": "petra", "split_backward": "yes"}, "decoupled.split_backward", "yes", "boolean", "without quotes"),
    ({"method": "petra", "timeout": 0}, "decoupled.timeout", 0, "seconds, above 0", "Leave it out for 600"),
    ({"method": "petra", "timeout": float("nan")}, "decoupled.timeout", float("nan"), "seconds, above 0",
     "Leave it out"),
    ({"method": 7}, "decoupled.method", 7, "string", "without quotes"),
]


@pytest.mark.parametrize(("block", "setting", "value", "allowed", "hint"), WRONG,
                         ids=[f"{w[1]}={w[2]}" for w in WRONG])
def test_errors_say_what_to_do(block: dict[str, Any], setting: str, value: Any, allowed: str, hint: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse_block({"decoupled": block})
    assert error.value.setting == setting
    text = str(error.value)
    assert text.startswith(f'"{setting}": {value!r} cannot be used: ')
    assert allowed in text and hint in text.split(" cannot be used: ")[1]
    assert "\n" not in text


@pytest.mark.parametrize("block", ["petra", ["petra"], 3, True])
def test_block_of_another_type(block: Any) -> None:
    with pytest.raises(ConfigError, match=r'"decoupled": .* an object such as .* Leave it out for plain DeepSpeed'):
        parse_block({"decoupled": block})


def test_files(tmp_path: Path) -> None:
    good = tmp_path / "good.json"
    good.write_text('{"decoupled": {"method": "dsp", "stages": 4}}')
    parsed = parse_block(good)
    assert parsed is not None and parsed.method == "dsp" and parsed.stages == 4
    assert parse_block(str(good)) == parsed
    assert read_json(good) == {"decoupled": {"method": "dsp", "stages": 4}}


@pytest.mark.parametrize(("content", "why"), [
    (None, "a path to a JSON file"),
    (b"{", "a JSON file is needed, and this is none"),
    (b"\xff\xfe\x00", "a JSON file is needed, and this is none"),
    (b"[1]", "a JSON object at the top"),
])
def test_bad_files(tmp_path: Path, content: bytes | None, why: str) -> None:
    path = tmp_path / "config.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError) as error:
        parse_block(path)
    assert error.value.setting == "deepspeed_config"
    assert why in str(error.value) and str(path) in str(error.value)
