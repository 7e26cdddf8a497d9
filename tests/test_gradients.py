"""Learning rate 0: delays do not matter, so every method gives backpropagation's gradients."""

from __future__ import annotations

import engine_cases
import pytest
import torch
import worlds
from nets import batches
from torch.nn.functional import cross_entropy

METHODS = ["reversible", "pipedream", "delayed", "dsp", "petra"]


def exact(case: dict, initial: dict[str, torch.Tensor], layers: list[list[int]]) -> dict[tuple[int, str], torch.Tensor]:
    stages = engine_cases.stages_from(initial, case, layers)
    grads = {}
    for m, (x, y) in enumerate(batches(case["batches"])):
        for stage in stages:
            stage.zero_grad()
        for stage in stages:
            x = stage(x)
        cross_entropy(x, y).backward()
        grads.update({(m, f"{s}.{i}"): p.grad.clone() for s, stage in enumerate(stages)
                      for i, p in enumerate(stage.parameters())})
    return grads


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("affine", [False, True])
def test_gradients_are_backpropagations(method: str, affine: bool) -> None:
    """With a layer that has an inverse alone, too."""
    case = {"method": method, "batches": 9, "net_args": {"affine": affine}}
    [result] = worlds.run(1, engine_cases.gradients_at_rest, case)
    expected = exact(case, result["initial"], result["summary"]["stage_layers"])
    assert result["grads"].keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(result["grads"][name], value, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("method", ["petra", "dsp", "reversible"])
def test_dropout_replays_its_mask(method: str) -> None:
    """At learning rate 0, a forward that is run again gives the gradients of one whose graph was kept, masks and all."""
    case = {"batches": 9, "net_args": {"dropout": 0.4}}
    [again] = worlds.run(1, engine_cases.gradients_at_rest, {**case, "method": method})
    [kept] = worlds.run(1, engine_cases.gradients_at_rest, {**case, "method": "delayed"})
    for name, value in kept["grads"].items():
        torch.testing.assert_close(again["grads"][name], value, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("ranks", [1, 2])
def test_what_is_kept(ranks: int) -> None:
    """A reversible stage keeps no tensor between its forward and its backward; records are delay + 1."""
    case = {"method": "petra", "batches": 16}
    results = worlds.run(ranks, engine_cases.gradients_at_rest, case)
    kept = {k: v for r in results for k, v in r["kept"].items()}
    delays = [12, 10, 8, 6, 4, 2, 0]
    assert results[0]["summary"]["delays"] == delays
    assert results[0]["summary"]["peak_records_in_flight"] == [d + 1 for d in delays]
    # stages 1, 2, 4, 5 are couplings; the stem keeps its picture and the downsampling both streams; the last keeps nothing
    assert {s: kept[s] for s in (1, 2, 4, 5, 6)} == dict.fromkeys((1, 2, 4, 5, 6), 0)
    assert kept[0] == delays[0] and kept[3] == 2 * delays[3]
    in_flight = {k: v for r in results for k, v in r["in_flight"].items()}
    assert in_flight == dict(enumerate(delays))


def test_eight_couplings_bring_their_input_back() -> None:
    """Relative error of the rebuilt inputs after eight blocks, float32: at most 1e-5."""
    case = {"method": "petra", "batches": 20, "net": "norm_free", "net_args": {"width": 64, "couplings": 8}}
    [result] = worlds.run(1, engine_cases.gradients_at_rest, case)
    assert 0 < max(error for _, error in result["errors"]) <= 1e-5


@pytest.mark.parametrize("net, stages", [("reversible", "blocks"), ("norm_free", "blocks"), ("plain", 4), ("gpt", "blocks")])
def test_graph_keeps_no_weight(net: str, stages: int | str) -> None:
    """What ``delayed`` holds between ticks shares no storage with a weight and equals none in value."""
    case = {"method": "delayed", "batches": 16, "net": net, "stages": stages}
    [result] = worlds.run(1, engine_cases.kept_against_weights, case)
    assert result["kept"] > 0 and result["in_flight"] > 0
    assert result["weights"] == []


def test_tracker_at_rest_and_in_motion() -> None:
    """At learning rate 0 the gradient used is the exact one; with updates in between it is not; nobody else notices."""
    case = {"method": "petra", "batches": 24, "k": 2, "block": {"track_gradients": 4}}
    still = worlds.run(2, engine_cases.tracked, {**case, "lr": 0.0})
    assert {(r["micro_batch"], r["stage"]) for r in still[0]["rows"]} == {(m, s) for m in range(0, 24, 4) for s in range(7)}
    for row in still[0]["rows"]:
        assert row["cosine"] == pytest.approx(1, abs=1e-4) and row["norm_ratio"] == pytest.approx(1, abs=1e-3)
        assert row["relative_error"] < 1e-2
    moving = worlds.run(2, engine_cases.tracked, case)
    one = worlds.run(1, engine_cases.tracked, case)
    untracked = worlds.run(2, engine_cases.train, {**case, "block": {}})
    a, b = engine_cases.merged(moving), engine_cases.merged(untracked)
    assert all(torch.equal(a[name], b[name]) for name in b)
    late = [r for r in moving[0]["rows"] if r["micro_batch"] >= 12 and r["stage"] == 0]
    assert all(r["relative_error"] > 1e-2 for r in late)
    for x, y in zip(moving[0]["rows"], one[0]["rows"]):
        assert x["cosine"] == pytest.approx(y["cosine"], abs=1e-5, nan_ok=True)
    split = worlds.run(2, engine_cases.tracked, {**case, "lr": 0.0, "block": {"track_gradients": 4, "split_backward": True}})
    assert all(row["cosine"] == pytest.approx(1, abs=1e-4) for row in split[0]["rows"])
