"""Every method against its definition: parameters and running statistics after n updates, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import engine_cases
import pytest
import torch
import worlds
from nets import batches, batches_for, varied
from oracle import Oracle

from ds_decoupled.config import parse_block
from ds_decoupled.links.message import HEADER_BYTES

METHODS = ["reversible", "pipedream", "delayed", "dsp", "petra"]


def compare(case: dict[str, Any], world: int = 1, prepare: Callable[[Oracle], object] = lambda oracle: None) -> None:
    """Train both; ``prepare`` may change the oracle before it begins."""
    results = worlds.run(world, engine_cases.train, case)
    initial, state = (engine_cases.merged(results, key) for key in ("initial", "state"))
    block = parse_block(engine_cases.config_of(case))
    assert block is not None
    axes = block.axes()
    oracle = Oracle(engine_cases.stages_from(initial, case, results[0]["summary"]["stage_layers"]), recover=axes.recover,
                    weights=axes.weights, flush=axes.flush, hops=axes.hops, k=case.get("k", 1), lr=case.get("lr", 0.1),
                    clip=case.get("clip", 0.0), decay=case.get("decay", 1.0))
    prepare(oracle)
    torch.manual_seed(0)
    data = batches_for(case.get("net", ""), case["batches"], case.get("size", 4))
    oracle.train(varied(data) if case.get("varied") else data)
    expected = engine_cases.merged([{"replica": 0, "state": {
        f"{index}.{name}": value for s, layers in enumerate(results[0]["summary"]["stage_layers"])
        for index, layer in zip(layers, oracle.stages[s]) for name, value in layer.state_dict().items()}}])
    assert expected.keys() == state.keys()
    moved = sum(not torch.equal(initial[name], state[name]) for name in state)
    assert moved > len(state) // 2, "nothing was trained"
    for name, value in expected.items():
        torch.testing.assert_close(state[name], value, rtol=0, atol=0, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("method", METHODS)
def test_reversible_net(method: str, k: int) -> None:
    """Seven stages, the stem, a downsampling and the head among them not reversible."""
    compare({"method": method, "k": k, "batches": 24})


@pytest.mark.parametrize("method", ["pipedream", "delayed", "dsp"])
def test_plain_net(method: str) -> None:
    """Layers that work on their input in place."""
    compare({"method": method, "net": "plain", "stages": 4, "batches": 16})


@pytest.mark.parametrize("method", METHODS)
def test_reversible_gpt(method: str) -> None:
    """One stage per half-block."""
    compare({"method": method, "net": "gpt", "batches": 16, "k": 2})


@pytest.mark.parametrize("method", ["delayed", "dsp"])
def test_plain_gpt(method: str) -> None:
    compare({"method": method, "net": "gpt", "net_args": {"reversible": False}, "batches": 16, "k": 2})


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("method", METHODS)
def test_context_beside_the_streams(method: str, ranks: int) -> None:
    """A trained layer below makes what couplings read beside their streams: its gradients go through every reversible run."""
    compare({"method": method, "net": "context", "batches": 12, "k": 2}, ranks)


@pytest.mark.parametrize("method", METHODS)
def test_layers_with_states(method: str) -> None:
    """Counters, moving averages and spectral norms move once per micro-batch, where the gradients come from."""
    # Under a flush, which micro-batch's backward moved them before a forward pass sees them depends on the ranks.
    compare({"method": method, "net": "stateful", "batches": 12, "k": 1 if method == "reversible" else 2}, 2)


@pytest.mark.parametrize("method", ["petra", "delayed"])
@pytest.mark.parametrize("stages", [2, 3, [0, 2, 7]])
def test_stages_of_several_layers(method: str, stages: int | list[int]) -> None:
    compare({"method": method, "stages": stages, "k": 2, "batches": 16})


@pytest.mark.parametrize("hops", [[0, 1], [1, 2], [2, 1]])
def test_hops(hops: list[int]) -> None:
    compare({"method": "petra", "batches": 20, "block": {"hops": hops}})


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("method", ["dsp", "petra"])
def test_predicted_weights(method: str, ranks: int) -> None:
    """Forward passes on what the weights are expected to be at the backward pass."""
    compare({"method": method, "batches": 18, "k": 2, "lr": 0.02, "block": {"weights": "predicted"}}, ranks)


def test_other_points_of_the_axes() -> None:
    """Overrides that no preset names."""
    compare({"method": "dsp", "batches": 16, "block": {"weights": "stashed"}})
    compare({"method": "backprop", "k": 4, "batches": 16, "block": {"recover": "input"}})
    compare({"method": "petra", "batches": 16, "block": {"weights": "stashed"}})


def test_schedule_of_the_json() -> None:
    """DeepSpeed's own scheduler block: each stage's rate follows that stage's updates."""
    scheduler = {"type": "WarmupLR", "params": {"warmup_min_lr": 0.0, "warmup_max_lr": 0.1, "warmup_num_steps": 4,
                                                "warmup_type": "linear"}}
    case = {"method": "petra", "batches": 20, "config": {"scheduler": scheduler}}
    results = worlds.run(2, engine_cases.train, case)
    constant = worlds.run(2, engine_cases.train, {**case, "config": {}})
    rates = [rate for result in results for rate in result["lrs"]]
    assert rates and all(rate == pytest.approx(0.1) for rate in rates)  # all are through the warm-up
    a, b = engine_cases.merged(results), engine_cases.merged(constant)
    assert any(not torch.equal(a[name], b[name]) for name in a)


def test_codec() -> None:
    """bf16 on the links: the numbers of float32 to bf16's rounding, and half the bytes; one rank has no links."""
    case = {"method": "dsp", "batches": 12, "stages": 3, "lr": 0.01}
    plain = worlds.run(2, engine_cases.train, case)
    short = worlds.run(2, engine_cases.train, {**case, "block": {"codec": "bf16"}})
    messages = plain[0]["summary"]["messages_sent"]
    stays = (HEADER_BYTES + 64) * messages + 2 * HEADER_BYTES  # headers, labels or loss; two announcements of a size
    assert 2 * (short[0]["summary"]["bytes_sent"] - stays) == plain[0]["summary"]["bytes_sent"] - stays
    a, b = engine_cases.merged(plain), engine_cases.merged(short)
    assert any(not torch.equal(a[name], b[name]) for name in a)
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0.02, atol=0.02)


def test_clipping_and_schedule_are_the_stages_own() -> None:
    """Each stage clips by its own norm and counts its own updates."""
    compare({"method": "petra", "k": 2, "batches": 24, "clip": 0.1, "decay": 0.8})


@pytest.mark.parametrize("method", ["delayed", "dsp", "petra"])
def test_one_stage_is_plain_sgd(method: str) -> None:
    """With J = 1 every global method is SGD with accumulation."""
    case = {"method": method, "stages": 1, "k": 2, "batches": 12}
    [result] = worlds.run(1, engine_cases.train, case)
    [net] = engine_cases.stages_from(result["initial"], case, [list(range(7))])
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    for i, (x, y) in enumerate(batches(12)):
        (torch.nn.functional.cross_entropy(net(x), y) / 2).backward()
        if i % 2:
            optimizer.step()
            optimizer.zero_grad()
    for index, layer in enumerate(net):
        for name, value in layer.state_dict().items():
            assert torch.equal(result["state"][f"{index}.{name}"], value), f"{index}.{name}"
