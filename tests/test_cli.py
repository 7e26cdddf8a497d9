"""The command: what it prints, what it refuses, and that torch stays unloaded."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from ds_decoupled.cli import app

REPO = Path(__file__).parent.parent


@pytest.fixture
def config(tmp_path: Path) -> Any:
    """Writes a configuration, and gives its path as a string."""
    def write(settings: dict[str, Any]) -> str:
        path = tmp_path / "config.json"
        path.write_text(json.dumps(settings))
        return str(path)
    return write


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def decoupled(method: str, k: int = 1, **block: Any) -> dict[str, Any]:
    return {"gradient_accumulation_steps": k, "decoupled": {"method": method, **block}}


def test_petra(config: Any) -> None:
    result = run("plan", config(decoupled("petra", 2, stages=4)), "--ranks", "2", "--ticks", "8")
    assert result.exit_code == 0, result.stderr
    assert result.stdout == """\
petra: 4 stages on 2 ranks, hops (1, 1), k = 2

       rank 0            | rank 1
tick   stage 0   stage 1 | stage 2   stage 3
   0   F0                |
   1   F1        F0      |
   2   F2        F1      | F0
   3   F3        F2      | F1        X0
   4   F4        F3      | F2 R0     X1*
   5   F5        F4 R0   | F3 R1*    X2
   6   F6 R0     F5 R1*  | F4 R2     X3*
   7   F7 R1*    F6 R2   | F5 R3*    X4
F forward; X forward, loss and backward; R backward by reconstruction; * the stage's update follows

stage  rank  delay in ticks  updates crossed  records in flight  each keeps
    0     0               6                3                  7     nothing
    1     0               4                2                  5     nothing
    2     1               2                1                  3     nothing
    3     1               0                0                  1     nothing

per micro-batch, bytes in sizes of one activation
ranks  stages  messages forward  bytes forward  messages backward  bytes backward
  0-1     1-2                 1              1                  1               2

rank    idle
   0   0.0 %
   1  12.5 %
time per micro-batch: 8.00 units; on one rank 15.00; 1.88 times as fast on 2 ranks
"""


def test_flush(config: Any) -> None:
    result = run("plan", config(decoupled("backprop", 2)), "--ranks", "2")
    assert result.stdout == """\
backprop: 2 stages on 2 ranks, a flush after every batch, k = 2

       rank 0  | rank 1
tick   stage 0 | stage 1
   0   F0      | X0
   1   F1 B0   | X1*
   2   B1*     |
F forward; X forward, loss and backward; B backward through the kept graph; * the stage's update follows

stage  rank  delay in ticks  updates crossed  records in flight  each keeps
    0     0               1                0                  2       graph
    1     1               0                0                  1     nothing

per micro-batch, bytes in sizes of one activation
ranks  stages  messages forward  bytes forward  messages backward  bytes backward
  0-1     0-1                 1              1                  1               1

rank    idle
   0  33.3 %
   1  33.3 %
time per micro-batch: 4.50 units; on one rank 6.00; 1.33 times as fast on 2 ranks
"""


def test_blocks_depend_on_the_model(config: Any) -> None:
    path = config(decoupled("petra", stages="blocks"))
    first, note, *_ = run("plan", path, "--ranks", "4").stdout.splitlines()
    assert first == "petra: 10 stages on 4 ranks, hops (1, 1), k = 1"
    assert note.startswith('note: "stages": "blocks" depends on the model: 10 as in RevNet-18')
    first, note, *_ = run("plan", path, "--ranks", "4", "--stages", "18").stdout.splitlines()
    assert first == "petra: 18 stages on 4 ranks, hops (1, 1), k = 1" and note == ""


@pytest.mark.parametrize(("stages", "count"), [("ranks", 3), (5, 5), ([0, 2, 4, 9, 11], 4)])
def test_stages(config: Any, stages: Any, count: int) -> None:
    result = run("plan", config(decoupled("dsp", stages=stages)), "--ranks", "3")
    assert result.stdout.startswith(f"dsp: {count} stages on 3 ranks")


def test_one_rank_and_one_stage(config: Any) -> None:
    result = run("plan", config(decoupled("delayed", stages=1)))
    assert result.stdout.startswith("delayed: 1 stage on 1 rank, hops (0, 1), k = 1\n\ntick   stage 0\n   0   X0*\n")
    assert "1.00 times as fast on 1 rank\n" in result.stdout and "ranks  stages" not in result.stdout


@pytest.mark.parametrize(("settings", "k"), [
    ({"gradient_accumulation_steps": 3, "train_batch_size": 8}, 3),
    ({"train_batch_size": 32, "train_micro_batch_size_per_gpu": 8}, 4),
    ({"train_batch_size": 32}, 1),
])
def test_k(config: Any, settings: dict[str, int], k: int) -> None:
    result = run("plan", config({**settings, "decoupled": {"method": "petra", "stages": 3}}))
    assert result.stdout.splitlines()[0].endswith(f", k = {k}")


def test_no_block(config: Any) -> None:
    lines = run("plan", config({"gradient_accumulation_steps": 4}), "--ranks", "2").stdout.splitlines()
    assert lines[:2] == ["backprop: 2 stages on 2 ranks, a flush after every batch, k = 4",
                         'note: no "decoupled" block: DeepSpeed\'s own 1F1B']


def test_a_run_with_an_end(config: Any) -> None:
    output = run("plan", config(decoupled("petra", stages=3)), "--ranks", "3", "--micro-batches", "2").stdout
    assert """\
   4   R0*     | R1*     |
   5   R1*     |         |
F forward""" in output
    assert output.endswith("the run of 2 micro-batches, fill and drain included: 14.00 units\n")
    output = run("plan", config(decoupled("petra", stages=3)), "--micro-batches", "9", "--ticks", "2").stdout
    assert "(the first 2 of 13 ticks)\n" in output


def test_link_time_and_split_backward(config: Any) -> None:
    def speed(**block: Any) -> float:
        output = run("plan", config(decoupled("delayed", stages=8, **block)), "--ranks", "8", "--link", "1").stdout
        found = re.search(r"time per micro-batch: ([\d.]+) units", output)
        assert found is not None and ("W weights' gradients" in output) == bool(block.get("split_backward"))
        return float(found[1])

    # In eight ticks up seven ranks, a forward and a link each, the last one's forward, down again, and one backward.
    assert speed() == pytest.approx((14 + 1 + 7 * 3 + 2) / 8, abs=0.005)
    assert speed(split_backward=True) == pytest.approx((14 + 1 + 7 * 2 + 2) / 8, abs=0.005)
    assert speed(hops=[1, 1]) == 3


def test_stashed_weights_are_kept_too(config: Any) -> None:
    lines = run("plan", config(decoupled("pipedream", stages=2)), "--ranks", "2").stdout.splitlines()
    assert [line for line in lines if line.endswith("  graph and weights")]


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_picture(config: Any, tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"timeline.{ending}"
    assert run("plan", config(decoupled("petra", stages=4)), "--ranks", "2", "--picture", str(path)).exit_code == 0
    assert path.read_bytes()[:5] in (b"\x89PNG\r", b"<?xml")


@pytest.mark.parametrize(("method", "told"), [("dgl_async", "replay"), ("pd_asgd", "staleness")])
@pytest.mark.parametrize("pace", ["free", "clock"])
def test_what_goes_by_no_plan(config: Any, pace: str, method: str, told: str) -> None:
    result = run("plan", config(decoupled(method, stages=4, pace=pace)))
    assert result.exit_code == 2 and f'"decoupled.pace": \'{pace}\'' in result.stderr and "no plan" in result.stderr
    assert f'["{told}"]' in result.stderr


def test_methods() -> None:
    result = run("methods")
    assert result.exit_code == 0
    assert result.stdout == """\
method             gradient   recover      weights  update     input   hops
backprop           global     graph        current  flush      stream  (0, 1)
reversible         global     reconstruct  current  flush      stream  (0, 1)
pipedream          global     graph        stashed  delayed    stream  (0, 1)
delayed            global     graph        current  delayed    stream  (0, 1)
dsp                global     input        current  delayed    stream  (1, 1)
petra              global     reconstruct  current  delayed    stream  (1, 1)
dgl                local      graph        current  delayed    stream  (0, 1)
overlapping        local      graph        current  delayed    stream  (0, 1)
dgl_async          local      graph        current  delayed    replay  (0, 1)
pd_asgd            global     graph        current  layerwise  stream  (0, 1)
hogwild            global     graph        current  layerwise  stream  (0, 1)
lapsgd             global     graph        current  layerwise  stream  (0, 1)
auxnet_penalty     auxiliary  graph        current  delayed    auxnet  (0, 1)
auxnet_lagrangian  auxiliary  graph        current  delayed    auxnet  (0, 1)
"""


def test_help() -> None:
    assert "plan" in run("--help").stdout and "methods" in run("--help").stdout
    options = run("plan", "--help").stdout
    assert all(name in options for name in ("--ranks", "--stages", "--ticks", "--micro-batches", "--link", "--picture"))


@pytest.mark.parametrize(("settings", "options", "said"), [
    (decoupled("petr"), [], '"decoupled.method": \'petr\' cannot be used'),
    (decoupled("petra", stages=4), ["--ranks", "6"],
     '"--ranks": 6 cannot be used: at most one rank per stage, and there are 4'),
    (decoupled("petra"), ["--ranks", "0"], '"--ranks": 0 cannot be used: a number, at least 1'),
    (decoupled("petra"), ["--stages", "0"], '"--stages": 0 cannot be used: a number, at least 1'),
    (decoupled("petra"), ["--ticks", "0"], '"--ticks": 0 cannot be used: a number, at least 1'),
    (decoupled("petra"), ["--micro-batches", "-2"], '"--micro-batches": -2 cannot be used: a number, at least 1'),
    (decoupled("petra"), ["--link", "-1"], '"--link": -1.0 cannot be used: a number, at least 0'),
    (decoupled("petra"), ["--link", "nan"], '"--link": nan cannot be used: a number, at least 0'),
    (decoupled("petra"), ["--link", "inf"], '"--link": inf cannot be used: a number, at least 0'),
    (decoupled("petra"), ["--stages", "1000000"], "1000000 stages"),
    (decoupled("petra", 10**5), ["--stages", "9"], "k = 100000"),
    (decoupled("petra", 10**9), [], '"gradient_accumulation_steps": 1000000000 cannot be used: a whole number'),
    (decoupled("petra"), ["--stages", "4", "--micro-batches", "100000000"], "100000000 micro-batches"),
    (decoupled("petra", hops=[1, 10**6]), ["--stages", "4"], '"decoupled.hops": [1, 1000000]'),
    (decoupled("petra"), ["--picture", "x.nope"], '"--picture": \'x.nope\' cannot be used: Format \'nope\''),
    (decoupled("petra"), ["--picture", "/nowhere/at/all/x.png"], "No such file or directory: '/nowhere/at/all/x.png'"),
    (decoupled("backprop", 4), ["--micro-batches", "5"], 'with "update": "flush" a run is one batch of k = 4'),
    (decoupled("petra", "auto"), [], "\"gradient_accumulation_steps\": 'auto' cannot be used: a whole number"),  # type: ignore[arg-type]
    ({"train_batch_size": 7, "train_micro_batch_size_per_gpu": 2, "decoupled": {"method": "petra"}}, [],
     '"train_batch_size": 7 cannot be used: a multiple of "train_micro_batch_size_per_gpu", which is 2'),
])
def test_bad_input_is_one_line_and_exit_code_2(config: Any, settings: dict[str, Any], options: list[str],
                                               said: str) -> None:
    result = run("plan", config(settings), *options)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("ds-decoupled: ") and said in result.stderr and result.stderr.count("\n") == 1


def test_missing_file() -> None:
    result = run("plan", "/nowhere/petra.json")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == ("ds-decoupled: \"deepspeed_config\": '/nowhere/petra.json' cannot be used: a path to a "
                             "JSON file is needed, and there is no such file. Is the path right?\n")


# In processes of their own


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=REPO, timeout=120)


def test_torch_is_not_loaded(config: Any) -> None:
    code = ("import sys\nfrom ds_decoupled.cli import app\n"
            "app(['plan', sys.argv[1], '--ranks', '4'], standalone_mode=False)\n"
            "loaded = {'torch', 'deepspeed', 'matplotlib', 'numpy'} & {*sys.modules}\n"
            "assert not loaded, loaded\n")
    result = python("-c", code, config(decoupled("petra", 2, stages="blocks")))
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("petra: 10 stages on 4 ranks")


def test_module_form(config: Any) -> None:
    result = python("-m", "ds_decoupled.cli", "plan", config(decoupled("petra", stages=2)), "--ranks", "3")
    assert result.returncode == 2 and result.stderr.count("\n") == 1 and "Traceback" not in result.stderr
    assert python("-m", "ds_decoupled.cli", "methods").stdout.startswith("method ")
    assert python("-m", "ds_decoupled.cli", "plan").returncode == 2


def test_control_c_leaves_no_traceback(config: Any) -> None:
    # A suite that runs in the background inherits that Ctrl-C is ignored.
    code = ("import os, signal, sys\nfrom ds_decoupled import cli\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
            "cli.plan_report = lambda *_, **__: os.kill(os.getpid(), signal.SIGINT)\n"
            "cli.app(['plan', sys.argv[1]])\n")
    result = python("-c", code, config(decoupled("petra")))
    assert result.returncode not in (0, 2) and result.stdout == "" and "Traceback" not in result.stderr
