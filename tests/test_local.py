"""Stage-local losses: every window against its definition, wherever stages are placed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import engine_cases
import pytest
import torch
import worlds
from local_oracle import LocalOracle, copies
from nets import batches_for

CNN: dict[str, Any] = {"net": "reversible", "batches": 12, "block": {"input_shape": [2, 8, 8]}}
GPT: dict[str, Any] = {"net": "gpt", "batches": 10, "block": {"input_shape": [6]}}


def case_of(base: dict[str, Any], window: int, **block: Any) -> dict[str, Any]:
    return {"method": "dgl", **base, "block": {**base["block"], "window": window, **block}}


def compare(case: dict[str, Any], world: int = 1) -> None:
    results = worlds.run(world, engine_cases.train, case)
    initial, state = (engine_cases.merged(results, key) for key in ("initial", "state"))
    stage_layers = results[0]["summary"]["stage_layers"]
    block = case["block"]
    oracle = LocalOracle(engine_cases.stages_from(initial, case, stage_layers),
                         copies(engine_cases.merged(results, "initial_heads"), len(stage_layers)), window=block["window"],
                         farthest=block.get("losses") == "farthest", hops=tuple(block.get("hops", (0, 1))), k=case.get("k", 1),
                         refresh=block["head_refresh"] if block.get("head", "").startswith("shared") else 0,
                         transport=block.get("transport", 0.0), rebuild=block.get("head") == "reconstruct")
    oracle.train(batches_for(case.get("net", ""), case["batches"], case.get("size", 4)))
    expected = {f"{index}.{name}": value for s, layers in enumerate(stage_layers)
                for index, layer in zip(layers, oracle.stages[s]) for name, value in layer.state_dict().items()}
    assert expected.keys() == state.keys()
    moved = sum(not torch.equal(initial[name], state[name]) for name in state)
    assert moved > len(state) // 2, "nothing was trained"
    for name, value in expected.items():
        torch.testing.assert_close(state[name], value, rtol=0, atol=0, msg=lambda text, name=name: f"{name}: {text}")
    heads = engine_cases.merged(results, "heads")
    assert len(heads) == sum(head is not None for head in oracle.heads)
    for s, head in heads.items():
        for name, value in oracle.heads[s].state_dict().items():
            assert torch.equal(head.state_dict()[name], value), f"head {s}: {name}"


@pytest.mark.parametrize("base", [CNN, GPT], ids=["cnn", "gpt"])
@pytest.mark.parametrize("window", [1, 2, 3])
@pytest.mark.parametrize("losses", ["sum", "farthest"])
def test_windows(base: dict[str, Any], window: int, losses: str) -> None:
    compare(case_of({**base, "k": 2}, window, losses=losses))


@pytest.mark.parametrize("window", [2, 3])
def test_hops(window: int) -> None:
    compare(case_of(CNN, window, hops=[1, 1]))


@pytest.mark.parametrize("window, losses", [(1, "sum"), (2, "sum"), (3, "sum"), (3, "farthest")])
def test_placement(window: int, losses: str) -> None:
    """The same numbers on 1, 2 and 4 ranks; on links at most window - 1 gradients a micro-batch go down."""
    case = case_of({**CNN, "k": 2, "net_args": {"dropout": 0.2}}, window, losses=losses)
    one = engine_cases.merged(worlds.run(1, engine_cases.train, case))
    for ranks in (2, 4):
        results = worlds.run(ranks, engine_cases.train, case)
        state = engine_cases.merged(results)
        assert all(torch.equal(one[name], state[name]) for name in one)
        per_link = results[0]["summary"]["messages_sent"] / (ranks - 1) / case["batches"]
        assert per_link == 1 + (window - 1) if losses == "sum" else per_link <= 1 + (window - 1)


def test_farthest_of_all_is_backpropagation() -> None:
    """A window of every stage, the farthest loss alone: the delayed global method, bit for bit, and no heads."""
    local = worlds.run(1, engine_cases.train, case_of({**CNN, "k": 2}, 7, losses="farthest"))
    whole = worlds.run(1, engine_cases.train, {**CNN, "method": "delayed", "k": 2, "block": {}})
    a, b = engine_cases.merged(local), engine_cases.merged(whole)
    assert local[0]["heads"] == {}
    for name in b:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=0)


def test_no_gradient_crosses_a_window() -> None:
    """With a window of n, another head at stage 4 moves the first update of stages 4 - (n - 1) to 4, and of no other."""
    for window in (1, 2, 3):
        case = case_of({**CNN, "batches": 1}, window)
        plain = engine_cases.merged(worlds.run(1, engine_cases.train, case))
        other = engine_cases.merged(worlds.run(1, engine_cases.train, {**case, "spoil": 4}))  # the head of stage 4
        changed = {int(name.split(".")[0]) for name in plain if not torch.equal(plain[name], other[name])}
        assert changed == set(range(4 - (window - 1), 5))


@pytest.mark.parametrize("window, ranks", [(1, (2, 3)), (2, (1, 1)), (3, (2, 3))])
def test_resume(window: int, ranks: tuple[int, int], tmp_path: Path) -> None:
    from test_checkpoint import check

    case = case_of({**CNN, "batches": 18, "k": 3}, window)
    check({**case, "stop": 3, "net_args": {"dropout": 0.1}}, tmp_path, *ranks)


def test_a_stage_stops() -> None:
    """Its weights stay as they are from then on, the others learn; on any number of ranks."""
    case = case_of(CNN, 1, stop_after=[3, None, None, None, None, None, None])
    stopped = engine_cases.merged(worlds.run(2, engine_cases.train, case))
    one = engine_cases.merged(worlds.run(1, engine_cases.train, case))
    early = engine_cases.merged(worlds.run(1, engine_cases.train, {**case_of(CNN, 1), "batches": 3}))
    assert all(torch.equal(one[name], stopped[name]) for name in one)
    assert all(torch.equal(stopped[name], early[name]) for name in early if name.startswith("0."))
    assert any(not torch.equal(stopped[name], early[name]) for name in early if name.startswith("1."))


def test_a_stage_has_its_own_rate() -> None:
    """Half the rate of one stage is half its first step, and leaves the others alone."""
    case = {**case_of(CNN, 1), "batches": 1}
    plain = worlds.run(1, engine_cases.train, case)[0]
    other = worlds.run(1, engine_cases.train, {**case, "block": {**case["block"], "stage_lr": [1, 1, 0.5, 1, 1, 1, 1]}})[0]
    for name, start in plain["initial"].items():
        a, b = plain["state"][name] - start, other["state"][name] - start
        if start.is_floating_point() and "running" not in name:
            torch.testing.assert_close(b, a * (0.5 if name.startswith("2.") else 1.0), rtol=1e-4, atol=1e-6)


def test_metrics() -> None:
    """Every stage tells the loss and accuracy of its head."""
    results = worlds.run(2, engine_cases.train, case_of(CNN, 2))
    metrics = results[0]["metrics"]
    assert len(metrics) == 7
    assert all(0 < row["loss"] < 10 and 0 <= row["accuracy"] <= 1 for row in metrics)


def test_evaluation_knows_nothing_of_heads() -> None:
    case = {**case_of(CNN, 2), "evaluate": True}
    spoiled = {**case, "block": {**case["block"], "head": "linear"}, "lr": 0.0}
    values = [worlds.run(1, engine_cases.train_with_evaluation, {**c, "lr": 0.0, "batches": 2})[0]["loss"]
              for c in (case, spoiled)]
    assert torch.equal(values[0], values[1])


def test_head_that_is_the_last_layer() -> None:
    """A copy of the model's own: it starts from the same weights, and learns by itself."""
    case = case_of(GPT, 1, head="last-layer")
    [result] = worlds.run(1, engine_cases.train, case)
    last = {name.split(".", 1)[1]: value for name, value in result["initial"].items() if name.startswith("5.")}
    for s, head in result["initial_heads"].items():
        assert all(torch.equal(value, last[name]) for name, value in head.head.state_dict().items()), s
        assert any(not torch.equal(value, last[name]) for name, value in result["heads"][s].head.state_dict().items())


def test_a_stage_has_its_own_schedule() -> None:
    """DeepSpeed's and torch's schedulers by stage; the others keep the JSON's."""
    ours = [{"type": "WarmupLR", "params": {"warmup_min_lr": 0.0, "warmup_max_lr": 0.5, "warmup_num_steps": 4,
                                            "warmup_type": "linear"}}, {"type": "ExponentialLR", "params": {"gamma": 0.5}}]
    json = {"scheduler": {"type": "StepLR", "params": {"step_size": 3, "gamma": 0.1}}}
    case = {**case_of(CNN, 1, stage_schedulers=[*ours, *[None] * 5]), "batches": 6, "config": json}
    rates = [rate for result in worlds.run(2, engine_cases.train, case) for rate in result["lrs"]]
    assert rates == pytest.approx([0.5, 0.1 * 0.5**6, *[0.1 * 0.1**2] * 5])


@pytest.mark.parametrize("window", [1, 2])
@pytest.mark.parametrize("head", ["shared", "shared:2"])
def test_shared_head(window: int, head: str) -> None:
    """A read-only readout, brought up to date every second update: the definition, wherever the stages are."""
    for ranks in (1, 2):
        compare(case_of({**GPT, "k": 2, "batches": 12}, window, head=head, head_refresh=2), ranks)


def test_traffic_of_a_shared_head() -> None:
    """Each refresh sends the last layer's weights once to every other rank, beside the activations."""
    sent = []
    for block in ({"head": "lm"}, {"head": "shared", "head_refresh": 3}):
        results = worlds.run(3, engine_cases.train, case_of({**GPT, "batches": 7}, 1, **block))
        sent.append(results[0]["summary"]["bytes_sent"])
    layer = [value for name, value in results[-1]["state"].items() if name.startswith("5.")]
    assert sent[1] - sent[0] == 3 * 2 * sum(value.nbytes for value in layer)  # before updates 0, 3 and 6, to two ranks


def test_resume_with_a_shared_head(tmp_path: Path) -> None:
    """The copies are as old as they were."""
    from test_checkpoint import check

    case = case_of({**GPT, "batches": 18, "k": 3}, 1, head="shared", head_refresh=2)
    check({**case, "stop": 3}, tmp_path, 2, 3)


def test_head_of_copied_layers() -> None:
    """``last-layers:3``: extra blocks before the unembedding."""
    compare(case_of(GPT, 1, head="last-layers:3"))


def test_frozen_stages() -> None:
    """``stop_after`` 0: nothing of the lower stages is ever trained."""
    case = case_of(CNN, 1, stop_after=[0, 0, 0, None, None, None, None])
    for ranks in (1, 2):
        results = worlds.run(ranks, engine_cases.train, case)
        initial, state = (engine_cases.merged(results, key) for key in ("initial", "state"))
        changed = {int(name.split(".")[0]) for name in state if not torch.equal(initial[name], state[name])}
        assert changed == {3, 4, 5, 6}


def test_ensemble() -> None:
    """Evaluation by all heads: the mean of their probabilities, on any number of ranks."""
    found = []
    for ranks in (1, 3):
        case = {**case_of({**CNN, "batches": 4}, 1, ensemble=True), "lr": 0.0}
        results = worlds.run(ranks, engine_cases.votes, case)
        found.append(results[-1]["logits"])
        heads, outputs = engine_cases.merged(results, "heads"), engine_cases.merged(results, "outputs")
        chances = [heads[s].eval()(outputs[s]).softmax(-1) for s in heads] + [outputs[6].softmax(-1)]
        torch.testing.assert_close(found[-1].exp(), torch.stack(chances).mean(0))
    torch.testing.assert_close(*found)


def measured_weights(case: dict[str, Any]) -> list[float]:
    """Seconds of each layer, as ``"partition": "profile"`` weighs them."""
    return engine_cases.build(case).module._layer_weights()[0]


def test_measured_partition_counts_heads() -> None:
    """A head weighs on the last layer of its stage; the last stage has none."""
    case = {**case_of(CNN, 1, head="nets:slow_head", partition="profile"), "stages": [0, 2, 5, 7]}
    seconds = worlds.run(1, measured_weights, case)[0]
    assert [s > 0.018 for s in seconds] == [False, True, False, False, True, False, False]


@pytest.mark.parametrize("block, words", [
    ({"window": 0}, ["decoupled.window", "at least 1"]),
    ({"window": 9}, ["decoupled.window", "9", "which is 7"]),
    ({"window": 2, "recover": "input"}, ["decoupled.recover", "input"]),
    ({"window": 2, "update": "flush"}, ["decoupled.update", "flush"]),
    ({"head": "mpl"}, ["decoupled.head", "'mpl'", "mlp-sr"]),
    ({"head": "lm"}, ["decoupled.head", "hidden states", "mlp-sr"]),
    ({"input_shape": None}, ["decoupled.input_shape", "sample_input"]),
    ({"stop_after": [1, 2]}, ["decoupled.stop_after", "7 stages"]),
    ({"stop_after": [-1, 2]}, ["decoupled.stop_after", "frozen"]),
    ({"stage_schedulers": [{"params": {}}] * 7}, ["decoupled.stage_schedulers", "type and params"]),
    ({"head": "shared:x"}, ["decoupled.head", "'shared:2'"]),
    ({"head": "shared", "hops": [1, 1]}, ["decoupled.head", "same micro-batch"]),
    ({"head": "last-layers:9"}, ["decoupled.head", "copies 9 layers"]),
    ({"head_refresh": 0}, ["decoupled.head_refresh", "at least 1"]),
    ({"losses": "all"}, ["decoupled.losses", "farthest"]),
    ({"head": "auglocal:0"}, ["decoupled.head", "'auglocal:0'", "at least 1", "'last-layer'"]),
    ({"head": "auglocal:two"}, ["decoupled.head", "'auglocal:n'"]),
    ({"head": "auglocals"}, ["decoupled.head", "'auglocals'", "'auglocal'"]),
    ({"transport": -0.1}, ["decoupled.transport", "-0.1", "0 (none) or above"]),
    ({"head": "reconstruct"}, ["decoupled.head", "hidden states (N, T, width)", "language models"]),
    ({"head": "reconstruct", "window": 2}, ["decoupled.head", '"window": 2', '"window": 1']),
    ({"head": "reconstruct", "ensemble": True}, ["decoupled.ensemble", "reconstruct"]),
], ids=lambda value: None if isinstance(value, list) else "-".join(map(str, value.items()))[:40])
def test_errors(block: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(worlds.RankFailed) as failure:
        worlds.run(2, engine_cases.only_build, {**CNN, "method": "dgl", "no_sample": True, "block": {**CNN["block"], **block}})
    for error in failure.value.errors:
        assert error is not None and error.startswith("ConfigError"), failure.value
        assert all(word in error.splitlines()[0] for word in words), error.splitlines()[0]


def test_local_settings_belong_to_local_methods() -> None:
    with pytest.raises(worlds.RankFailed) as failure:
        worlds.run(1, engine_cases.only_build, {**CNN, "method": "petra", "block": {"window": 2}})
    assert "decoupled.window" in str(failure.value)


def test_two_shapes_that_differ() -> None:
    """The module's sample and the JSON's shape must agree, or one of them would do nothing."""
    with pytest.raises(worlds.RankFailed) as failure:
        worlds.run(2, engine_cases.only_build, {"method": "dgl", "block": {"input_shape": [2, 4, 4]}})
    assert all('"decoupled.input_shape": [2, 4, 4] cannot be used' in str(error) and "[2, 8, 8]" in str(error)
               for error in failure.value.errors)
