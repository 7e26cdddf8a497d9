"""Layer-parallel training with an AuxNet against its definition, wherever stages are placed."""

from __future__ import annotations

import copy
import math
from collections import Counter
from pathlib import Path
from typing import Any

import auxnet_cases
import engine_cases
import pytest
import torch
import worlds
from auxnet_oracle import AuxNetOracle, copies
from nets import batches
from torch import nn

from ds_decoupled.analysis import simulate
from ds_decoupled.nn.adjoint import Adjoint
from ds_decoupled.nn.auxnet import build_step, never_negative, rectified
from ds_decoupled.schedules import Placement, Plan

PLAIN: dict[str, Any] = {"net": "plain", "net_args": {"in_place": False}, "batches": 4}
#: By the number of stages: every way of multipliers, sweeps, and each coefficient once.
SETTINGS: list[tuple[str, int, dict[str, Any]]] = [
    ("auxnet_penalty", 1, {}),
    ("auxnet_penalty", 2, {"sweeps": 2, "fit": 2.0, "pull": 0.5, "eta": 0.7, "trust": 0.5}),
    ("auxnet_lagrangian", 2, {"pull": 0.01, "lr": 0.01, "growth": {"factor": 4.0, "updates": 3}}),
    ("auxnet_lagrangian", 1, {"kappa": "kept", "sweeps": 2, "fit": 1.0, "pull": 1.0, "blocks": 2}),
]


def case_of(stages: int, method: str, k: int = 1, /, **auxnet: Any) -> dict[str, Any]:
    return {**PLAIN, "stages": stages, "method": method, "k": k, "block": {"auxnet": auxnet} if auxnet else {}}


CASES = [case_of(stages, method, k, **auxnet) for stages in (2, 3, 4) for method, k, auxnet in SETTINGS]


def merged(results: list[dict[str, Any]], key: str) -> dict[Any, Any]:
    return {name: value for result in results for name, value in result[key].items()}


def oracle_of(case: dict[str, Any], results: list[dict[str, Any]]) -> AuxNetOracle:
    given = dict(case["block"].get("auxnet", {}))
    growth = given.pop("growth", None)
    for name in ("blocks", "serial_from"):
        given.pop(name, None)
    steps = merged(results, "initial_steps")
    bounds = results[0]["summary"]["stage_layers"]
    predicted = case["method"] == "auxnet_lagrangian" and "kappa" not in given
    if predicted:
        given["kappa"] = "predicted"
    return AuxNetOracle(
        engine_cases.stages_from(engine_cases.merged(results, "initial"), case, bounds),
        copies({s: step for s, (step, _) in steps.items()}, len(bounds) - 1),
        copies({s: adjoint for s, (_, adjoint) in steps.items()}, len(bounds) - 1) if predicted else None,
        aux_lr=given.pop("lr", 3e-3), growth=None if growth is None else (growth["factor"], growth["updates"]), k=case["k"],
        **given)


@pytest.fixture(scope="module")
def trained() -> dict[int, list[list[dict[str, Any]]]]:
    """By number of ranks: every case's results, by rank."""
    return {ranks: list(map(list, zip(*worlds.run(ranks, auxnet_cases.train_all,
                                                  [case for case in CASES if case["stages"] >= ranks]))))
            for ranks in (1, 2, 4)}


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_definition(trained: dict[int, list[list[dict[str, Any]]]], ranks: int) -> None:
    """Layers, running statistics, steps and what predicts multipliers, bit for bit."""
    for case, results in zip([case for case in CASES if case["stages"] >= ranks], trained[ranks], strict=True):
        initial, state = engine_cases.merged(results, "initial"), engine_cases.merged(results)
        oracle = oracle_of(case, results)
        oracle.train(batches(case["batches"]))
        layers = results[0]["summary"]["stage_layers"]
        expected = {f"{index}.{name}": value for s, part in enumerate(layers) for index, layer in zip(part, oracle.stages[s])
                    for name, value in layer.state_dict().items()}
        assert expected.keys() == state.keys()
        assert sum(not torch.equal(initial[name], state[name]) for name in state) > len(state) // 2, "nothing was trained"
        for name, value in expected.items():
            torch.testing.assert_close(state[name], value, rtol=0, atol=0, msg=lambda text, at=(case, name): f"{at}: {text}")
        steps, before = merged(results, "steps"), merged(results, "initial_steps")
        assert len(steps) == case["stages"] - 1
        for s, (step, adjoint) in steps.items():
            for found, wanted, start in ((step, oracle.steps[s], before[s][0]),
                                         (adjoint, oracle.heads[s] if oracle.heads else None, before[s][1])):
                assert (found is None) == (wanted is None)
                if found is None:
                    continue
                for name, value in wanted.state_dict().items():
                    assert torch.equal(found.state_dict()[name], value), (case, s, name)
                assert any(not torch.equal(p, q) for p, q in zip(found.parameters(), start.parameters())), (case, s)


def test_steps_learn_as_one_network(trained: dict[int, list[list[dict[str, Any]]]]) -> None:
    """Autograd through all of them at once finds the same."""
    for case, results in zip(CASES, trained[1]):
        by_step, whole = oracle_of(case, results), oracle_of(case, results)
        whole.whole = True
        x, y = batches(1)[0]
        for oracle in (by_step, whole):
            oracle._micro_batch(0, x, y)
        for step, other in zip(by_step.steps, whole.steps):
            one, all_at_once = (torch.cat([p.grad.flatten() for p in part.parameters()]) for part in (step, other))
            assert one.norm() > 0 and (one - all_at_once).norm() < 1e-5 * one.norm(), case


def test_losses_and_metrics(trained: dict[int, list[list[dict[str, Any]]]]) -> None:
    """The last stage's own loss, where it is known; mismatches of the others; the AuxNet's share."""
    for case, results in zip(CASES, trained[1]):
        oracle, k = oracle_of(case, results), case["k"]
        oracle.train(batches(case["batches"]))
        means = [sum(oracle.losses[i:i + k]) / k for i in range(0, case["batches"], k)]
        assert results[0]["losses"] == pytest.approx(means, abs=1e-6)
        *lower, last = results[0]["metrics"]
        assert len(lower) == case["stages"] - 1 and all(row.keys() == {"mismatch"} and row["mismatch"] > 0 for row in lower)
        assert last["loss"] == pytest.approx(sum(oracle.losses) / len(oracle.losses), abs=1e-6) and 0 <= last["accuracy"] <= 1
        cost = results[0]["summary"]["auxnet"]
        assert len(cost["layers"]) == case["stages"] and cost["steps"][-1] == 0 and 0 < cost["share"] < 1
        assert any(cost["adjoints"]) == (oracle.heads is not None)


def test_traffic(trained: dict[int, list[list[dict[str, Any]]]]) -> None:
    """Over a link go one input up and, of every sweep that is of use, one gradient down, the last together with the AuxNet's
    where there is a step above; the plan says which."""
    for case, results in zip([case for case in CASES if case["stages"] == 4], trained[4][-len(SETTINGS):], strict=True):
        sweeps = case["block"].get("auxnet", {}).get("sweeps", 1)
        down = {1: 3, 2: 5}[sweeps]  # of links 0, 1, 2: 1 + 1 + 1, or 2 + 2 + 1
        assert results[0]["summary"]["messages_sent"] == case["batches"] * (3 + down)
        assert results[0]["summary"]["delays"] == [0] * 4
        plan = Plan.make(Placement.of(4, 4), hops=(0, 1), k=1, recover="graph", flush=False, sweeps=sweeps)
        sends = [Counter(a.kind.letter for a in plan.tick(rank, 0, 1) if a.kind.is_send) for rank in range(4)]
        lessons = [sent["SL"] for sent in sends]
        assert lessons == [0, 1, 1, 0] and sum(sent["SG"] for sent in sends) == down - 2


def test_exact_inputs_and_enough_sweeps_are_backpropagation() -> None:
    """Where every generated input is what the stage below gives, a sweep a stage (K - 1 behind the first) gives the exact
    gradients; one fewer leaves the lowest stage without any."""
    betas = {"fit": 1.0, "pull": 1.0, "norm_batches": 0}
    cases = [{**case_of(stages, method, **betas, **how, sweeps=sweeps), "lr": 0.0} for stages in (2, 3, 4)
             for method, how in (("auxnet_penalty", {}), ("auxnet_lagrangian", {"kappa": "kept"}))
             for sweeps in (stages, stages - 1) if sweeps > 1 or not how]
    for case, grads in zip(cases, worlds.run(1, auxnet_cases.all_exact, cases)[0]):
        heard = case["block"]["auxnet"]["sweeps"] == case["stages"]
        lowest = int(grads["counts"][0])
        for i, (used, exact) in enumerate(zip(grads["used"], grads["exact"], strict=True)):
            if heard or i >= lowest:
                torch.testing.assert_close(used, exact, rtol=2e-3, atol=1e-5 * exact.abs().max().item() + 1e-6)
            else:
                assert used.abs().max() < 1e-6 and exact.abs().max() > 0, (case, i)


def test_one_stage_is_plain_training() -> None:
    [result] = worlds.run(1, auxnet_cases.train, case_of(1, "auxnet_penalty"))
    [layers] = engine_cases.stages_from(result["initial"], PLAIN, result["summary"]["stage_layers"])
    optimizer = torch.optim.SGD(layers.parameters(), lr=0.1, momentum=0.9)
    for x, y in batches(PLAIN["batches"]):
        nn.functional.cross_entropy(layers(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert result["steps"] == {}
    for index, layer in enumerate(layers):
        for name, value in layer.state_dict().items():
            assert torch.equal(result["state"][f"{index}.{name}"], value), name


#: Two streams, dropout, work in place; feature vectors, in bf16 too; token ids.
PLACED: list[dict[str, Any]] = [
    {"net": "reversible", "net_args": {"dropout": 0.2}, "batches": 4, "k": 2, "stages": 7, "method": "auxnet_lagrangian"},
    {"net": "plain", "net_args": {"dropout": 0.2}, "batches": 4, "stages": 4, "method": "auxnet_penalty",
     "block": {"auxnet": {"sweeps": 3, "net": "auxnet_cases:one_convolution"}}},
    {"net": "norm_free", "batches": 4, "stages": 6, "method": "auxnet_penalty",
     "block": {"auxnet": {"width": 0.5, "blocks": 2}}},
    {"net": "norm_free", "batches": 4, "stages": 4, "method": "auxnet_lagrangian", "config": {"bf16": {"enabled": True}}},
    {"net": "gpt", "net_args": {"reversible": False}, "batches": 4, "stages": 6, "method": "auxnet_lagrangian",
     "block": {"input_shape": [6], "auxnet": {"kappa": "kept", "sweeps": 4}}},
]


def test_placement() -> None:
    """The same numbers on 1, 2 and 4 ranks, for whatever stages give; nobody's data are read but the first rank's."""
    one, *others = (list(map(list, zip(*worlds.run(ranks, auxnet_cases.train_all, PLACED)))) for ranks in (1, 2, 4))
    for case, alone, *more in zip(PLACED, one, *others):
        state, steps = engine_cases.merged(alone), merged(alone, "steps")
        assert any(not torch.equal(alone[0]["initial"][name], state[name]) for name in state)
        for results in more:
            found = engine_cases.merged(results)
            assert all(torch.equal(state[name], found[name]) for name in state), case
            for s, (step, _) in merged(results, "steps").items():
                assert all(torch.equal(a, b) for a, b in zip(step.state_dict().values(), steps[s][0].state_dict().values()))
            assert [row.keys() for row in results[0]["metrics"]] == [row.keys() for row in alone[0]["metrics"]]


@pytest.mark.parametrize("ranks", [(2, 1)])
def test_resume(ranks: tuple[int, int], tmp_path: Path) -> None:
    """As if it had never stopped, in the middle of growing betas and with predicted multipliers."""
    from test_checkpoint import check

    case = case_of(3, "auxnet_lagrangian", 2, growth={"factor": 4.0, "updates": 6})
    check({**case, "batches": 12, "stop": 3, "net_args": {"dropout": 0.1}}, tmp_path, *ranks)


def test_evaluation() -> None:
    """The serial network, with batch norm's statistics of its own activations; and from each stage on."""
    case = case_of(3, "auxnet_penalty", norm_batches=3)
    by_ranks = [worlds.run(ranks, auxnet_cases.evaluate, {**case, "batches": 5}) for ranks in (1, 3)]
    for a, b in zip(by_ranks[0][0]["logits"], by_ranks[1][-1]["logits"], strict=True):
        assert torch.equal(a, b)
    logits = by_ranks[0][0]["logits"]
    assert not torch.equal(logits[0], logits[1]) and not torch.equal(logits[1], logits[2])
    assert by_ranks[0][0]["errors"] == ["eval_batch(from_stage=-1): from 0 to 2", "eval_batch(from_stage=3): from 0 to 2"]


def test_statistics_of_the_serial_network() -> None:
    """By hand: the plain mean over the last three micro-batches, each stage on what the one below gives."""
    case = {**case_of(3, "auxnet_penalty", norm_batches=3), "batches": 5}
    [result] = worlds.run(1, auxnet_cases.statistics, case)
    layers = nn.Sequential(*result["layers"]).train()
    for norm in (m for m in layers.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.reset_running_stats()
        norm.momentum = None
    with torch.no_grad():
        for x, _ in batches(5)[2:]:
            layers(x.clone())
        torch.testing.assert_close(layers.eval()(batches(1, seed=99)[0][0]), result["logits"])
    assert not torch.equal(result["trained"], layers[1].norm.running_mean)


def test_time_by_the_simulator() -> None:
    """A stage's own three, and one pass up and down the AuxNet."""
    for ranks, ticks in ((1, 3.0), (2, 3.3), (3, 3.6), (8, 5.1)):
        plan = Plan.make(Placement.of(ranks, ranks), hops=(0, 1), k=1, recover="graph", flush=False, sweeps=1)
        assert simulate(plan, 40).time_per_micro_batch == pytest.approx(ticks)


def test_stages_work_at_the_same_time() -> None:
    """Measured on two ranks, of layers that take 50 ms: forward and backward of both stages overlap."""
    case = {**case_of(2, "auxnet_penalty"), "batches": 6}
    lower, upper = worlds.run(2, auxnet_cases.times, case)
    shared = [min(a[1], b[1]) - max(a[0], b[0]) for a, b in zip(lower, upper, strict=True)]
    assert len(shared) == 6 and sum(part > 0.05 for part in shared[1:]) >= 3, (lower, upper)


def test_serial_network_at_the_end() -> None:
    """From an update on all is plain training, with the optimizers as they are; on 1, 2 and 4 ranks, k = 1 and 2."""
    cases = [{**case_of(4, method, k, serial_from=2), "batches": 5 * k}
             for method, k in (("auxnet_penalty", 1), ("auxnet_lagrangian", 2))]
    for ranks in (1, 2, 4):
        for case, results in zip(cases, map(list, zip(*worlds.run(ranks, auxnet_cases.train_all, cases)))):
            k = case["k"]
            oracle = oracle_of(case, results)
            data = batches(case["batches"])
            oracle.train(data[:2 * k])
            steps = {s: copy.deepcopy(step.state_dict()) for s, step in enumerate(oracle.steps)}
            for m, (x, y) in enumerate(data[2 * k:], 1):
                (nn.functional.cross_entropy(nn.Sequential(*oracle.stages)(x), y) / k).backward()
                if m % k == 0:
                    for optimizer in oracle.optimizers:
                        optimizer.step()
                        optimizer.zero_grad()
            state = engine_cases.merged(results)
            for s, part in enumerate(results[0]["summary"]["stage_layers"]):
                for index, layer in zip(part, oracle.stages[s]):
                    for name, value in layer.state_dict().items():
                        torch.testing.assert_close(state[f"{index}.{name}"], value, msg=f"{ranks} {case} {index}.{name}")
            for s, (step, _) in merged(results, "steps").items():
                assert all(torch.equal(value, steps[s][name]) for name, value in step.state_dict().items())
            assert not math.isnan(results[0]["losses"][-1]), "every rank has the loss then"


@pytest.mark.parametrize("stop", [2, 4])
def test_resume_serial(stop: int, tmp_path: Path) -> None:
    """Saved before the serial network's time, and in it."""
    from test_checkpoint import check

    check({**case_of(3, "auxnet_penalty", 2, serial_from=3), "batches": 12, "stop": stop}, tmp_path, 2, 1)


def test_replicas() -> None:
    """Two replicas of half a micro-batch each: their steps stay equal."""
    case = {**case_of(2, "auxnet_lagrangian"), "pipe_ranks": 1, "size": 4}
    a, b = worlds.run(2, auxnet_cases.train, case)
    for s, (step, adjoint) in a["steps"].items():
        for value, other in zip((*step.parameters(), *adjoint.parameters()),
                                (*b["steps"][s][0].parameters(), *b["steps"][s][1].parameters()), strict=True):
            assert torch.equal(value, other)
    assert all(torch.equal(value, b["state"][name]) for name, value in a["state"].items() if "running" not in name)


def test_tracker() -> None:
    """The cosine to the exact gradient: 1 at the last stage where its input is exact, and something else at random ones."""
    case = {**case_of(3, "auxnet_penalty"), "batches": 4}
    results = worlds.run(2, engine_cases.tracked, {**case, "block": {"track_gradients": 2}})
    rows = results[0]["rows"]
    assert [(row["micro_batch"], row["stage"]) for row in rows] == [(m, s) for m in (0, 2) for s in range(3)]
    assert all(-1 <= row["cosine"] <= 1 for row in rows)
    plain = worlds.run(2, engine_cases.train, case)
    assert all(torch.equal(engine_cases.merged(plain)[name], value) for name, value in engine_cases.merged(results).items())


REFUSED: list[tuple[int, dict[str, Any], list[str]]] = [
    (3, {"fit": 0.0}, ["decoupled.auxnet.fit", "above 0"]),
    (3, {"pull": -1.0}, ["decoupled.auxnet.pull", "above 0"]),
    (3, {"eta": 0.0}, ["decoupled.auxnet.eta", "above 0"]),
    (3, {"sweeps": 0}, ["decoupled.auxnet.sweeps", "from 1"]),
    (3, {"sweeps": 4}, ["decoupled.auxnet.sweeps", "which is 3"]),
    (3, {"share": 1.5}, ["decoupled.auxnet.share", "at most 1"]),
    (3, {"share": 0.2, "width": 0.5}, ["decoupled.auxnet.width", "share"]),
    (3, {"kappa": "kept"}, ["decoupled.auxnet.kappa", "one sweep"]),
    (3, {"kappa": "predicted", "sweeps": 2}, ["decoupled.auxnet.sweeps", "kept"]),
    (3, {"kappa": "some"}, ["decoupled.auxnet.kappa", "'predicted'"]),
    (3, {"growth": {"factor": 2.0}}, ["decoupled.auxnet.growth.updates", "at least 1"]),
    (3, {"serial_from": -1}, ["decoupled.auxnet.serial_from", "from 0"]),
    (3, {"trust": 0}, ["decoupled.auxnet.trust", "above 0"]),
    (3, {"net": "small"}, ["decoupled.auxnet.net", "module:callable"]),
    (3, {"net": "auxnet_cases:nothing"}, ["decoupled.auxnet.net", "cannot be imported"]),
    (3, {"net": "auxnet_cases:wrong_shape"}, ["decoupled.auxnet.net", "it gives float32 (4, 3)", "Mend it"]),
    (3, {"net": "auxnet_cases:one_convolution", "width": 0.5}, ["decoupled.auxnet.width", '"net"']),
    (1, {"fit": 2.0}, ["decoupled.auxnet", "one stage"]),
]


def test_errors() -> None:
    """On every rank, in one sentence."""
    cases = [case_of(stages, "auxnet_penalty", **auxnet) for stages, auxnet, _ in REFUSED]
    cases.append({**case_of(3, "auxnet_penalty"), "no_sample": True})
    wanted = [*(words for *_, words in REFUSED), ["decoupled.input_shape", "sample_input"]]
    for found in worlds.run(1, auxnet_cases.told, cases):
        for told, words in zip(found, wanted, strict=True):
            assert told.startswith("ConfigError") and all(word in told for word in words), (told, words)


def test_labels_tell_multipliers() -> None:
    """Of ids, one a sample or one a token, each within its own place; whatever else labels are is not looked at."""
    sizes = {"images": ((3, 4, 5, 5), (3,)), "tokens": ((3, 6, 4), (3, 6)), "streams": ((3, 6, 4), (3,)),
             "features": ((3, 4), (3,))}
    for name, (shape, labelled) in sizes.items():
        z = torch.randn(shape)
        adjoint = Adjoint(nn.Identity(), z, classes=7)
        labels = torch.randint(0, 7, labelled)
        plain = adjoint(z, labels)
        assert not torch.equal(plain, z) and plain.shape == z.shape, name
        other = labels.clone()
        other.view(-1)[0] = (other.view(-1)[0] + 1) % 7
        changed = (adjoint(z, other) != plain).reshape(*labelled, -1).any(dim=-1).view(-1)
        assert changed[0] and not changed[1:].any(), name
        other.view(-1)[0] = -100
        assert torch.equal(adjoint(z, other)[0, 0] if len(labelled) > 1 else adjoint(z, other)[0],
                           z[0, 0] if len(labelled) > 1 else z[0]), name
        for useless in (None, "words", torch.rand(labelled), torch.zeros(2, dtype=torch.long)):
            assert torch.equal(adjoint(z, useless), z), name
    two = (torch.randn(3, 2, 4, 4), torch.randn(3, 4, 4, 4))
    made = Adjoint(nn.Identity(), two, classes=5)(two, torch.tensor([0, 1, 2]))
    assert [t.shape for t in made] == [t.shape for t in two] and not torch.equal(made[1], two[1])


def test_rectifier_lets_zeros_rise() -> None:
    """ReLU forward; where it is 0, only what asks for more comes back."""
    x = torch.tensor([-1.0, -1.0, 2.0, 2.0], requires_grad=True)
    y = rectified(x)
    y.backward(torch.tensor([-3.0, 3.0, -3.0, 3.0]))
    assert y.tolist() == [0, 0, 2, 2] and x.grad.tolist() == [-3, 0, -3, 3]


def test_steps_end_as_their_stages_do() -> None:
    inputs = torch.zeros(2, 3, 4, 4)
    assert never_negative(lambda x: torch.relu(x), inputs) == [True]
    assert never_negative(lambda x: (x, x.square()), inputs) == [False, True]
    assert never_negative(lambda ids: ids.float(), torch.zeros(2, 5, dtype=torch.long)) == [False]
    step = build_step(inputs, inputs, budget=1e9, width=None, blocks=1, tokens=0)
    step.never_negative = [True]
    assert (step(torch.randn(2, 3, 4, 4)) >= 0).all()
