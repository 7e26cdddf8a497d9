"""The benchmark: its laws and ratios, its bare loops, and a tiny run from end to end."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import worlds

from bench import report
from bench.heads import heads, multiply_adds
from bench.plan import METHODS, Configuration, Method, configurations, laws
from ds_decoupled.models import build_model
from ds_decoupled.stages.reversible import is_invertible

RECIPES = Path(__file__).parent.parent / "recipes"
TINY = ["--width", "4", "--image_size", "8", "--micro_batch", "4"]


def run_benchmark(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(RECIPES / "benchmark.py"), *arguments], capture_output=True, text=True,
                          timeout=200)


def test_what_heads_cost() -> None:
    """A copied layer costs what the layer costs: the head of ResNet-18's lowest stage is its blocks 3, 5, 7 and 8."""
    text, found = heads("resnet18", 4, 8, 2)
    assert "`auglocal`" in text and len(found) == 9
    with torch.device("meta"):
        x, cost = torch.randn(2, 3, 8, 8), []
        for spec in build_model("resnet18", width=4):
            spent, x = multiply_adds(spec.build(), x)
            cost.append(spent)
    assert [row["auglocal"] for row in found][::8] == [sum(cost[i] for i in (3, 5, 7, 8, 9)), cost[9]]
    assert found[0]["trunk_so_far"] == cost[0] and found[-1]["trunk_so_far"] == sum(cost[:9])


# -- the plan and the numbers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("k", "petra", "delayed"), [(1, 1.5, 2.0), (4, 0.9375, 1.25), (16, 0.796875, 1.0625)])
def test_laws_at_two_ranks(k: int, petra: float, delayed: float) -> None:
    values = {law.name: law.value for law in laws(2, k)}
    assert values["petra / 1F1B"] == petra
    assert values["delayed / 1F1B"] == values["petra / checkpointed 1F1B"] == delayed
    assert values["petra, P=2 / P=1"] == 2


def test_only_what_can_run() -> None:
    names = list(METHODS)
    one = {c.method for c in configurations(names, [1], 4, layers=10)}
    two = {c.method for c in configurations(names, [2], 4, layers=10)}
    assert {"bare-petra", "petra", "1f1b"} <= one and not one & {"dualpipev", "petra-split", "1f1b-checkpoint"}
    assert {"dualpipev", "petra-split", "1f1b-checkpoint"} <= two and not two & {"bare-petra", "bare-backprop"}
    assert "dualpipev" not in {c.method for c in configurations(names, [2], 1, layers=10)}
    assert "dualpipev" not in {c.method for c in configurations(names, [2], 4, layers=3)}


def test_ratio_is_taken_within_a_round() -> None:
    """A machine that is three times slower in one round moves both speeds and not their ratio."""
    law = next(law for law in laws(2, 1) if law.name == "petra / 1F1B")
    fast, slow = report.Measurement(), report.Measurement()
    fast.rates, slow.rates = [30.0, 10.0, 30.0, None], [20.0, 6.0, 20.0, 20.0]
    assert report.ratio({law.fast: fast, law.slow: slow}, law) == 1.5
    assert report.ratio({law.fast: fast}, law) is None
    assert "1.000 | 0.95 | yes" in report.law_table({law.fast: fast, law.slow: slow}, [law])


def test_idle_counts_waits_and_the_end() -> None:
    measurement = report.Measurement()
    measurement.add([{"start": 0.0, "end": 8.0, "waited": 1.0, "cpu": 7.0, "bytes_sent": 30.0},
                     {"start": 0.0, "end": 10.0, "waited": 0.0, "cpu": 10.0, "bytes_sent": 10.0}], samples=20)
    assert measurement.rates == [2.0] and measurement.bytes_per_sample == 2.0
    assert measurement.idle[0] == pytest.approx([0.3, 0.0])


# -- the bare loops ---------------------------------------------------------------------------------------------------------


def states_after(name: str, width: int, method: str, bare: str, k: int,
                 calls: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Parameters and running statistics of the engine's run and of the bare loop's, from the same start."""
    import functools

    from bench import bare as bare_loops
    from bench.models import make_model
    from bench.runner import SGD, build

    SGD["lr"] = 0.1
    METHODS["flushed"] = Method("", "engine", {"method": "backprop", "stages": "blocks", "recover": "input"})
    model = make_model(name, 4, width=width, image_size=8, length=8, blocks=4)
    runner = build(Configuration(method, 1, k), model, [0, 10])
    layers = [spec.build() for spec in model.specs()]
    for mine, theirs in zip(layers, runner.engine.module.forward_funcs):
        mine.load_state_dict(theirs.state_dict())
    call = getattr(bare_loops, bare)(layers, model.batches(), k, functools.partial(torch.optim.SGD, **SGD),
                                   model.loss())
    start = [p.clone() for layer in layers for p in layer.parameters()]
    for _ in range(calls):
        runner.call()
        call()
    assert any(not torch.equal(a, b) for a, b in zip(start, (p for layer in layers for p in layer.parameters())))
    return ([t.detach() for layer in runner.engine.module.forward_funcs for t in layer.state_dict().values()],
            [t.detach() for layer in layers for t in layer.state_dict().values()])


@pytest.mark.parametrize(("name", "width", "k"), [("revnet18", 4, 1), ("revnet18", 4, 3), ("gpt-tiny", 16, 1)])
def test_bare_petra_is_petra(name: str, width: int, k: int) -> None:
    """Overhead is measured against the same arithmetic: the same numbers, with everything in flight."""
    engine, bare = worlds.run(1, states_after, name, width, "petra", "petra_loop", k, 24)[0]
    for a, b in zip(engine, bare, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_bare_backprop_is_backprop() -> None:
    """Against a flushed method of ours that keeps its inputs: they are not rebuilt, so nothing may differ but rounding."""
    engine, bare = worlds.run(1, states_after, "revnet18", 4, "flushed", "backprop_loop", 2, 3)[0]
    for a, b in zip(engine, bare, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


# -- from end to end -----------------------------------------------------------------------------------------------------------


def test_tiny_run(tmp_path: Path) -> None:
    output = tmp_path / "benchmark.json"
    done = run_benchmark("--quick", *TINY, "--k", "4", "--output", str(output), "--methods", "bare-backprop", "bare-petra",
                         "petra", "delayed", "1f1b", "1f1b-checkpoint", "dualpipev")
    assert done.returncode == 0, done.stderr
    numbers: dict[str, Any] = json.loads(output.read_text())
    rows = {(row["method"], row["ranks"], row["k"]): row for row in numbers["measured"]}
    assert len(rows) == 5 + 5 and ("dualpipev", 2, 4) in rows
    for key, row in rows.items():
        assert row["error"] is None and len(row["rates"]) == 2 and row["samples_per_second"] > 0, key
        assert (row["bytes_per_sample"] > 0) == (row["ranks"] > 1), key
        assert all(0 <= share < 1 for shares in row["idle"] for share in shares), key
    assert rows["petra", 2, 4]["bounds"] == rows["1f1b-checkpoint", 2, 4]["bounds"]
    # Where PETRA's cut is `delayed`'s and right above a reversible layer, it sends activations up, activations and gradients
    # down: three for two. Another layer keeps its input, and gets no activation back.
    bounds = rows["petra", 2, 4]["bounds"]
    if bounds == rows["delayed", 2, 4]["bounds"]:
        ratio = rows["petra", 2, 4]["bytes_per_sample"] / rows["delayed", 2, 4]["bytes_per_sample"]
        below = build_model("revnet18", width=4)[bounds[1] - 1].build()
        assert 1 < ratio < 1.6 if is_invertible(below) else ratio == 1, (bounds, ratio)
    kept = {method: rows[method, 1, 4]["watched"][0]["kept"] for method in ("petra", "delayed")}
    assert kept["petra"] < 0.4 * kept["delayed"]
    assert {law["name"] for law in numbers["laws"]} >= {"petra / 1F1B", "petra / DualPipeV", "petra / bare backpropagation"}
    assert "| petra | 2 | 4 |" in done.stdout and numbers["environment"]["cpu"] in done.stdout


def test_sharing(tmp_path: Path) -> None:
    """Threads, split operations and data parallelism, each beside one core; DDP's replicas see two batches a call."""
    output = tmp_path / "sharing.json"
    done = run_benchmark("sharing", *TINY, "--model", "resnet18", "--calls", "6", "--output", str(output), "--methods",
                         "bare-backprop", "bare-backprop-threads", "bare-ddp", "hogwild-2-layers")
    assert done.returncode == 0, done.stderr
    rows = {row["method"]: row for row in json.loads(output.read_text())["sharing"]}
    assert [row["error"] for row in rows.values()] == [None] * 4 and len(rows["bare-ddp"]["cpu"][0]) == 2
    watched = rows["hogwild-2-layers"]["watched"][0]
    assert len(watched["threads"]["forward_busy"]) == 2 and watched["staleness"]
    assert "| backpropagation, bare loop | 1 |" in done.stdout and "| backpropagation, data parallel" in done.stdout


def test_memory_and_reconstruction(tmp_path: Path) -> None:
    done = run_benchmark("memory", *TINY, "--k", "1", "--output", str(tmp_path / "memory.json"))
    assert done.returncode == 0, done.stderr
    found = {row["method"]: row for row in json.loads((tmp_path / "memory.json").read_text())["memory"]}
    assert found["petra"]["kept"] < found["dsp"]["kept"] < found["delayed"]["kept"]
    assert found["pipedream"]["stashed"] > 0 == found["petra"]["stashed"]

    done = run_benchmark("reconstruction", *TINY, "--output", str(tmp_path / "reconstruction.json"))
    assert done.returncode == 0, done.stderr
    errors = {row["types"]: row["input_errors"] for row in
              json.loads((tmp_path / "reconstruction.json").read_text())["reconstruction"]}
    assert len(errors["float32"]) == 8 and max(errors["float32"]) <= 1e-5
    assert errors["bf16, float32 streams"][0] < 1e-6 < errors["bf16, bf16 streams"][0]


def test_long_run(tmp_path: Path) -> None:
    output = tmp_path / "long.json"
    done = run_benchmark("long", "--updates", "20", "--methods", "petra", "--ranks", "2", "--output", str(output))
    assert done.returncode == 0, done.stderr
    runs = json.loads(output.read_text())["long"]
    assert [run["net"] for run in runs] == ["revnet", "gpt"]
    for run in runs:
        assert len(run["looks"]) == 2 and all(len(of_rank) == 21 for of_rank in run["looks"])  # one is after the drain
        assert all(of_rank[-1][name] == 0 for of_rank in run["looks"] for name in ("sent", "arrived", "queued"))
    assert "| petra | gpt | 2 |" in done.stdout


@pytest.mark.parametrize(("arguments", "message"), [
    (["--ranks", "11"], '"--ranks": 11 cannot be used: revnet18 has 10 layers'),
    (["--k", "0"], "--k: '0' is not a whole number of at least 1"),
    (["--methods", "adam"], "invalid choice: 'adam'"),
])
def test_bad_arguments(arguments: list[str], message: str) -> None:
    done = run_benchmark(*arguments)
    assert done.returncode == 2 and message in done.stderr


def test_what_codecs_cost() -> None:
    """Every codec, and codebooks by every setting whose groups divide the channels, with the bytes that they take."""
    from bench.codecs import codecs
    from ds_decoupled.links import CODECS

    text, [stage, *rows] = codecs("resnet18", width=8, image_size=16, micro_batch=4, repeats=1)
    by_codec = {row["codec"]: row for row in rows}
    assert set(CODECS) - {"vq"} < set(by_codec) and sum(name.startswith("vq") for name in by_codec) == 5
    assert by_codec["none"]["bytes_per_sample"] == 4 * 8 * 16 * 16 and by_codec["none"]["error"] == 0
    assert by_codec["vq, D=8, K=16"]["bytes_per_sample"] == (16 * 16 * 4 // 2 + 16) / 4
    assert all(row["write_seconds"] > 0 and 0 <= row["error"] < 1 for row in rows) and stage["stage_seconds"] > 0
    assert len(text.splitlines()) == 2 + len(rows)
