"""What docs/architecture.md says: a method, an action, a stage and a watcher are added by naming new files only."""

from __future__ import annotations

import engine_cases
import pytest
import torch
import toy_method
import worlds
from nets import batches

from ds_decoupled.analysis import simulate
from ds_decoupled.analysis.staircase import staircase
from ds_decoupled.instructions import instruction_class
from ds_decoupled.schedules import KINDS, Placement, Plan, format_actions, parse_actions

CASE = {"method": "sign", "net": "plain", "batches": 12, "k": 2, "stages": 4}


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_against_its_definition(ranks: int) -> None:
    results = worlds.run(ranks, toy_method.train, CASE)
    initial, state = engine_cases.merged(results, "initial"), engine_cases.merged(results)
    stages = engine_cases.stages_from(initial, CASE, results[0]["layers"])
    averages = toy_method.by_definition(stages, batches(CASE["batches"], 4), CASE["k"])
    found = {f"{index}.{name}": value for layers, stage in zip(results[0]["layers"], stages)
             for index, layer in zip(layers, stage) for name, value in layer.named_parameters()}
    assert len(found) > 6 and all(not torch.equal(initial[name], state[name]) for name in found)
    for name, value in found.items():  # buffers aside: the plain loop moves them in both of its forward passes
        assert torch.equal(state[name], value), name
    for s, average in engine_cases.merged(results, "averages").items():
        assert len(average) == len(averages[s]) and all(map(torch.equal, averages[s], average))
    updates = len(stages) * CASE["batches"] // CASE["k"]
    assert results[0]["counts"]["A"] == results[0]["counts"]["U"] == updates


def test_whoever_reads_the_table_knows_its_action() -> None:
    with toy_method.registered():
        plan = Plan.make(Placement.of(3, 2), hops=(0, 1), k=1, recover="input", flush=False, family="sign")
        line = format_actions(plan.tick(0, 2, 9))
        assert "0U0 0A0" in line and format_actions(parse_actions(line)) == line
        run = simulate(plan, 6)
        averages = [event for event in run.events if event.action.kind is toy_method.AVERAGE]
        assert sum(event.end - event.start for event in averages) == 3 * 6 * 0.5
        assert "A0" in staircase([list(plan.run(rank, 3)) for rank in range(2)], plan.placement.rank_bounds)
        assert instruction_class(toy_method.AVERAGE).__name__ == "AverageWeights"
    assert "A" not in KINDS
