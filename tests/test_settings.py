"""DeepSpeed's own settings: read in every form, refused with a sentence on every rank, and what the decoupled engine uses."""

from __future__ import annotations

import base64
import re
import time
from pathlib import Path
from typing import Any

import pytest
import settings_cases
import worlds
import wrong_cases
import wrong_settings

from ds_decoupled.config import DecoupledConfig, parse_block
from ds_decoupled.errors import ConfigError
from ds_decoupled.settings import read_json
from ds_decoupled.settings.check import as_deepspeed_reads_it, check_settings
from ds_decoupled.settings.table import SETTINGS, batch_sizes
from ds_decoupled.settings.unsupported import UNSUPPORTED

HJSON = """{
  // the method, in words
  decoupled: {method: "petra", hops: [0, 1]}   # names without quotes
  train_micro_batch_size_per_gpu: 8
}"""


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "byte order mark"])
@pytest.mark.parametrize("text", ['{"decoupled": {"method": "petra", "hops": [0, 1]}, "train_micro_batch_size_per_gpu": 8}',
                                  HJSON],
                         ids=["json", "hjson"])
def test_forms(text: str, mark: bytes, tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_bytes(mark + text.encode())
    coded = base64.urlsafe_b64encode(mark + text.encode()).decode()
    for source in (path, str(path), coded):
        assert read_json(source) == {"decoupled": {"method": "petra", "hops": [0, 1]}, "train_micro_batch_size_per_gpu": 8}
        block = parse_block(source)
        assert block is not None and block.axes().hops == (0, 1)


@pytest.mark.parametrize(("text", "why"), [
    ('{"a": 1, "a": 2}', "each key may stand once"), ("a: 1\na: 2", "each key may stand once"), ("", "nothing in it"),
    ("[1, 2]", "this is a list"), ("{a: {", "this is none"), ("hello", "this is a str"), ("[" * 100_000, "this"),
])
def test_texts_that_are_none(text: str, why: str, tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=why) as error:
        read_json(path)
    assert error.value.setting == "deepspeed_config" and str(path) in str(error.value)


def test_sources_that_are_none(tmp_path: Path) -> None:
    for source, why in ((tmp_path, "a folder"), (tmp_path / "none.json", "no such file"), (3, "a path, a dictionary"),
                        ("a" * 5000, "no such file"), ("x\0y", "no such file")):
        with pytest.raises(ConfigError, match=why):
            read_json(source)  # type: ignore[arg-type]


def _check(config: dict[str, Any]) -> None:
    block = parse_block(config)
    check_settings(config, decoupled=True)
    batch_sizes(config, 1)
    assert block is not None


#: What needs no ranks, nor a model, to be found.
PARSED = [case for group in ("batch sizes", "the top", "DeepSpeed's blocks", "optimizer", "scheduler",
                             "not used by a decoupled engine")
          for case in wrong_cases.GROUPS[group]
          if not case.call and "." not in str(case.change.get("optimizer", {}).get("type", "")
                                              if isinstance(case.change.get("optimizer"), dict) else "")
          and not case.setting.startswith("decoupled")]


@pytest.mark.parametrize("case", PARSED, ids=lambda case: case.name)
def test_wrong_settings_are_told(case: wrong_cases.Wrong) -> None:
    start = time.monotonic()
    with pytest.raises(ConfigError) as error:
        _check(wrong_cases.changed(wrong_cases.BASE, case.change))
    assert wrong_settings.judge(case, f"ConfigError: {error.value}", time.monotonic() - start) == ""


#: About one of a kind, on two ranks that go on with the next.
ON_RANKS = {"DeepSpeed's blocks": 3, "optimizer": 4, "the decoupled block": 9, "no effect under the method": 9,
            "ranks that differ": 2, "one rank fails": 1,
            "files and texts": 2}


def test_wrong_settings_are_told_on_every_rank() -> None:
    some = {group: wrong_cases.GROUPS[group][::12 if every > 3 else every * 3] for group, every in ON_RANKS.items()}
    some["one rank fails"] = wrong_cases.GROUPS["one rank fails"][:5]
    short, _ = wrong_settings.run(some, lambda line: None)
    assert not short, [(case.name, how) for _, case, how in short]


RIGHT: list[dict[str, Any]] = [
    {"gradient_clipping": 1, "steps_per_print": 10**9, "bf16": {"enabled": False}, "zero_optimization": {"stage": 0}},
    {"zero_optimization": {"stage": 1, "reduce_bucket_size": 5e8, "allgather_bucket_size": 2e8}, "_note": "mine",
     "_more": {"x": 1}},
    {"optimizer": {"type": "Adam", "params": {"lr": 1e-3, "betas": [0.9, 0.99], "torch_adam": True, "adam_w_mode": False}}},
    {"optimizer": {"type": "Muon", "params": {"muon_lr": 2e-3, "adam_lr": 1e-3, "torch_adam": True}}},
    {"optimizer": {"type": "RMSprop", "params": {"lr": 0.1, "centered": True}}},
    {"optimizer": {"type": "SGD"}},
    {"scheduler": {"type": "WarmupDecayLR", "params": {"total_num_steps": 10, "warmup_num_steps": 2, "warmup_max_lr": 0.1}}},
    {"scheduler": {"type": "OneCycle", "params": {"cycle_min_lr": 0.01, "cycle_max_lr": 0.1}}},
    {"scheduler": {"type": "MultiStepLR", "params": {"milestones": [3, 5]}}},
    {"scheduler": {"type": "CosineAnnealingLR", "params": {"T_max": 5}}},
    {"csv_monitor": {"enabled": False, "output_path": "x", "job_name": "y"}, "wall_clock_breakdown": True, "dump_state": True},
    {"flops_profiler": {"enabled": False, "profile_step": 1, "module_depth": -1, "detailed": True, "output_file": None}},
    {"communication_data_type": "FP16", "prescale_gradients": True, "gradient_predivide_factor": 2, "log_level": "Info"},
    {"data_types": {"grad_accum_dtype": "fp32"}, "pipeline": {"activation_checkpoint_interval": 0}, "checkpoint": {}},
    {"train_batch_size": 8, "gradient_accumulation_steps": None}, {"timers": {}, "compile": {}, "aio": {}},
]


@pytest.mark.parametrize("change", RIGHT, ids=lambda change: ",".join(change))
def test_right_settings_pass(change: dict[str, Any]) -> None:
    config = {**wrong_cases.BASE, **change}
    _check(config)
    as_deepspeed_reads_it({k: v for k, v in config.items() if k != "decoupled"}, None)


@pytest.mark.parametrize("path", sorted((Path(__file__).parent.parent / "ds_configs").glob("*.json")), ids=lambda p: p.name)
def test_our_own_configurations_pass(path: Path) -> None:
    config = read_json(path)
    params = config.get("optimizer", {}).get("params", {})
    if params.get("lr") == "auto":
        params["lr"] = 0.1
    block = parse_block(config)
    check_settings(config, decoupled=block is not None and not block.is_plain_backprop)


def test_last_net_names_the_block() -> None:
    """What is in no table, DeepSpeed's own reading finds; the message names the block, and the cause is kept."""
    config = {"train_batch_size": 4, "dump_state": False, "tensor_parallel": {"autotp_size": "two"}}
    with pytest.raises(ConfigError) as error:
        as_deepspeed_reads_it(config, None)
    assert error.value.setting == "tensor_parallel" and "ValidationError" in str(error.value)
    assert error.value.__cause__ is not None


def test_the_page_tells_of_every_setting() -> None:
    page = (Path(__file__).parent.parent / "docs" / "deepspeed_settings.md").read_text()
    told = set(re.findall(r"`([a-z_0-9.*]+)`", page))
    assert {entry.path for entry in UNSUPPORTED} <= told
    assert set(SETTINGS) <= told | {path.split(".")[0] for path in told}


def test_an_error_of_one_rank_is_every_ranks() -> None:
    zero, one = worlds.run(2, settings_cases.of_one_rank)
    assert zero[0].startswith('ConfigError: "colour": <function ') and zero[0].endswith("cannot be used: red or blue. Take "
                                                                                        "one.")
    assert zero[1] == "RankError: rank 1 failed: MemoryError: no room" and one[1] == "MemoryError: no room"
    assert zero[2] == one[2] == ("ConfigError: \"colour\": 'red' on rank 0, left out on rank 1 cannot be used: every rank "
                                 "needs the "
                                 "same paint. Give all ranks the same.")
    assert zero[3] == one[3] == "5"


@pytest.mark.parametrize("partition", ["uniform", "parameters"])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_layer_that_one_rank_cannot_build(rank: int, partition: str) -> None:
    told = worlds.run(2, settings_cases.fail_in_a_layer, rank, partition, timeout=30)
    assert told[rank] == "MemoryError: no room" and told[1 - rank] == f"RankError: rank {rank} failed: MemoryError: no room"


DIFFERENT: list[tuple[dict[str, Any], dict[int, dict[str, Any]], str]] = [
    ({"method": "dgl"}, {0: {"block": {"head": "linear"}}}, "\"decoupled.head\": 'linear' on rank 0, left out on ranks 1, 2"),
    ({"method": "delayed"}, {2: {"k": 3}}, '"gradient_accumulation_steps": 1 on ranks 0, 1, 3 on rank 2'),
    ({"method": "petra"}, {1: {"config": {"decoupled": None}}}, "on rank 1"),
    ({"method": "petra"}, {1: {"method": "?"}}, "\"decoupled.method\": '?' cannot be used: allowed are"),
    ({"method": "petra"}, {1: {"config": {"train_batch_sise": 2}}}, '"train_batch_sise": 2 cannot be used'),
]


def test_ranks_that_differ_are_told_at_once() -> None:
    start = time.monotonic()
    told = worlds.run(3, settings_cases.many, [({"stages": 3, **case}, ranks) for case, ranks, _ in DIFFERENT], timeout=60)
    assert told[0] == told[1] == told[2]
    for line, (_, _, words) in zip(told[0], DIFFERENT, strict=True):
        assert line.startswith("ConfigError: ") and words in line, line
    assert time.monotonic() - start < 40


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_stage_with_rate_0_stays(ranks: int) -> None:
    """Its weights do not move; its scheduler and its count of updates do."""
    case = {"method": "delayed", "net": "plain", "stages": 3, "batches": 6, "decay": 0.5,
            "block": {"stage_lr": [1.0, 0.0, 1.0], "lr_by_delay": 3}}
    results = worlds.run(ranks, settings_cases.still_stage, case, 1)
    found = {name: {s: v for r in results for s, v in r[name].items()} for name in results[0]}
    assert found["moved"] == {0: True, 1: False, 2: True}
    assert set(found["lr"].values()) == {0.1 * 0.5**6} and set(found["updates"].values()) == {6}


@pytest.mark.parametrize("method", ["petra", "dgl"])
def test_wall_clock_breakdown(method: str) -> None:
    case = {"method": method, "stages": 2, "batches": 4, "config": {"wall_clock_breakdown": True, "steps_per_print": 2}}
    results = worlds.run(2, settings_cases.breakdown, case)
    for rank, (printed, seconds) in enumerate(results):
        assert len(re.findall(rf"rank {rank}, pipe rank {rank}, after [24] updates", printed)) == 2, printed
        assert seconds == results[0][1] and all(value > 0 for value in seconds[rank].values())
    first = results[0][1][0]
    assert {"Load", "Forward" if method == "petra" else "ForwardLossBackward", "SendActivation", "Update"} <= set(first)


def test_bounds_of_what_makes_sense() -> None:
    for setting, value in (("hops", [10**9, 1]), ("stages", 10**9), ("queue", 10**9), ("timeout", 1e300), ("stages", [0, 10**9,
                                                                                                                      1])):
        with pytest.raises(ConfigError, match=f"decoupled.{setting}"):
            parse_block({"decoupled": {"method": "petra", setting: value}})
    assert isinstance(parse_block({"decoupled": {"method": "petra", "hops": [1000, 1000]}}), DecoupledConfig)


def test_recipes_read_as_the_package_does(tmp_path: Path) -> None:
    from run.setup import read_config

    path = tmp_path / "ds.json"
    path.write_bytes(b"\xef\xbb\xbf" + HJSON.encode())
    assert read_config(str(path))["decoupled"]["method"] == "petra"
    path.write_text('{"train_batch_size": 8, "optimizer": {"type": "SGD", "params": {"lr": "auto"}}}')
    assert read_config(str(path))["train_batch_size"] == 8
    for text, words in (('{"train_batch_size": "8"}', '"train_batch_size": \'8\''), ('{"bf16": true}', "bf16"),
                        ('{"train_batch_size": 8, "optimizer": {"type": "SGD", "params": {"momentun": 1}}}', "momentun")):
        path.write_text(text)
        with pytest.raises(ConfigError, match=words):
            read_config(str(path))
