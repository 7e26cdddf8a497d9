"""What strangers' models and scripts do: states beside weights, contexts beside streams, seeds of their own."""

from __future__ import annotations

import itertools
from typing import Any

import engine_cases
import pytest
import torch
import worlds
from odd_layers import Counted, context_net

METHODS = ["reversible", "delayed", "dsp", "petra"]


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("method", METHODS)
def test_states_move_once_per_micro_batch(method: str, ranks: int) -> None:
    """Also with evaluation, tracking and an inverse in between, which do not count."""
    block = {} if method == "reversible" else {"track_gradients": 3}
    case = {"method": method, "net": "stateful", "net_args": {"scale": True}, "batches": 10, "evaluate": True, "block": block}
    results = worlds.run(ranks, engine_cases.train_with_evaluation, case)
    state = engine_cases.merged(results)
    counts = {name: value.item() for name, value in state.items() if name.endswith(("count", "num_batches_tracked"))}
    assert len(counts) == 6 and set(counts.values()) == {10}, counts
    large = [value for name, value in state.items() if name.endswith("large")]
    assert len(large) == 3 and all(value.sum() == 10 and value[:2].tolist() == [1, 2] for value in large)


@pytest.mark.parametrize("method", ["petra", "reversible", "dsp"])
def test_gradients_go_through_an_inverse_and_beside_it(method: str) -> None:
    """Learning rate 0: backpropagation's own gradients, of layers that made the context too."""
    case = {"method": method, "net": "context", "net_args": {"rotate": True}, "batches": 2}
    results = worlds.run(2, engine_cases.gradients_at_rest, case)
    [net] = engine_cases.stages_from(engine_cases.merged(results, "initial"), case, [list(range(len(context_net(True))))])
    from nets import batches

    for m, (x, y) in enumerate(batches(2)):
        net.zero_grad()
        torch.nn.functional.cross_entropy(net(x), y).backward()
        stages = [list(layer.parameters()) for layer in net]
        found = {key: grad for result in results for key, grad in result["grads"].items() if key[0] == m}
        assert len(found) == sum(map(len, stages))
        for s, parameters in enumerate(stages):
            for i, p in enumerate(parameters):
                torch.testing.assert_close(found[m, f"{s}.{i}"], p.grad, rtol=1e-4, atol=1e-6)


# Seeds


def seeded_run(case: dict[str, Any], seed: int | None, module: str = "ours") -> dict[str, Any]:
    """Train from the user's seed; what is built, how often, and where the generator is left."""
    import deepspeed
    from deepspeed.pipe import PipelineModule
    from odd_layers import counted_net
    from torch import nn

    import ds_decoupled

    deepspeed.init_distributed()
    if seed is not None:
        torch.manual_seed(seed + case.get("rank_seeds", 0) * torch.distributed.get_rank())
    config = engine_cases.config_of(case)
    Counted.built = 0
    kwargs: dict[str, Any] = dict(loss_fn=nn.CrossEntropyLoss(), **case.get("module", {}))
    model: Any
    if module == "ours":
        model = ds_decoupled.DecoupledPipelineModule(counted_net(), config=config, **kwargs)
    else:
        model = PipelineModule(counted_net(), num_stages=torch.distributed.get_world_size(), **kwargs)
    built = Counted.built
    before = torch.get_rng_state()
    engine, *_ = ds_decoupled.initialize(model=model, config=config, model_parameters=list(model.parameters()))
    again, moved = Counted.built - built, not torch.equal(torch.get_rng_state(), before)
    initial = engine_cases.state_of(engine)
    data = engine_cases.data_of(case, engine)
    for _ in range(case["batches"]):
        engine.train_batch(data)
    engine.drain()
    return {"state": engine_cases.state_of(engine), "initial": initial, "replica": 0, "built": built, "again": again,
            "moved": moved}


CASE = {"method": "delayed", "net": "counted", "stages": 4, "batches": 4}


@pytest.mark.parametrize("module", ["ours", "plain"])
def test_the_users_seed_decides(module: str) -> None:
    """Weights (where the specs are built by us) and dropout's masks; the same seed, the same run, on any number of ranks."""
    runs = {(seed, ranks): engine_cases.merged(worlds.run(ranks, seeded_run, CASE, seed, module))
            for seed, ranks in ((1, 1), (2, 1), (1, 2))}
    assert any(not torch.equal(runs[1, 1][name], runs[2, 1][name]) for name in runs[1, 1])
    if module == "ours":
        for name, value in runs[1, 1].items():
            assert torch.equal(value, runs[1, 2][name])
    again = engine_cases.merged(worlds.run(1, seeded_run, CASE, 1, module))
    assert all(torch.equal(runs[1, 1][name], value) for name, value in again.items())


def masks_of(case: dict[str, Any], seed: int) -> list[int]:
    """Which of 64 inputs the first layer's dropout of a plain module keeps in the first micro-batch."""
    import deepspeed
    from deepspeed.pipe import PipelineModule
    from torch import nn

    import ds_decoupled

    deepspeed.init_distributed()
    kept: list[int] = []

    class Look(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            kept.extend((x.flatten(1) != 0).int().flatten().tolist())
            return x.flatten(1)[:, :3] * self.scale

    torch.manual_seed(seed)
    model = PipelineModule([nn.Dropout(0.5), Look()], num_stages=1, loss_fn=nn.CrossEntropyLoss())
    engine, *_ = ds_decoupled.initialize(model=model, config=engine_cases.config_of({**case, "stages": 2}),
                                         model_parameters=list(model.parameters()))
    engine.train_batch(iter([(torch.ones(4, 2, 4, 8), torch.zeros(4, dtype=torch.long))]))
    return kept[:64]


def test_dropout_of_a_plain_module_follows_the_seed() -> None:
    a, b, c = (worlds.run(1, masks_of, CASE, seed)[0] for seed in (1, 2, 1))
    assert a == c != b


def test_ranks_with_seeds_of_their_own_agree_on_the_first_ones() -> None:
    """Scripts that seed by rank, for their data."""
    one = engine_cases.merged(worlds.run(1, seeded_run, CASE, 5))
    two = engine_cases.merged(worlds.run(2, seeded_run, {**CASE, "rank_seeds": 100}, 5))
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("module", ["ours", "plain"])
def test_initialize_builds_nothing_and_draws_nothing(module: str) -> None:
    results = worlds.run(2, seeded_run, CASE, 1, module)
    assert all((result["again"], result["moved"]) == (0, False) for result in results)
    assert sum(result["built"] for result in results) == 2 * 4 + 4  # each rank counts all, and builds its own
    if module == "ours":
        [result] = worlds.run(1, seeded_run, {**CASE, "stages": [0, 1, 2, 3, 4]}, 1)
        assert result["built"] == 4


def test_seed_layers_is_deepspeeds_way() -> None:
    """``seed_fn`` is called with DeepSpeed's numbers: while a layer is built, and before it runs."""
    results = worlds.run(1, with_seed_fn, {**CASE, "method": "dsp"})
    [calls] = results
    assert calls[:4] == [50, 51, 52, 53]
    ran = set(calls[4:])
    assert ran == {50 * (m + 2) + layer for m, layer in itertools.product(range(4), range(4))}


def with_seed_fn(case: dict[str, Any]) -> list[int]:
    calls: list[int] = []

    def seed_fn(number: int) -> None:
        calls.append(number)
        torch.manual_seed(number)

    seeded_run({**case, "stages": [0, 1, 2, 3, 4], "module": {"seed_layers": True, "seed_fn": seed_fn, "base_seed": 50}}, 1)
    return calls
