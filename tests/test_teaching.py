"""Heads that are taught before their stages learn, and learn by a rate of their own: against the definition."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import engine_cases
import pytest
import torch
import worlds
from deepspeed.utils import logger
from local_oracle import LocalOracle, copies
from nets import batches_for, llama_net
from torch import nn

import ds_decoupled
from ds_decoupled.config import parse_block
from ds_decoupled.errors import ConfigError
from ds_decoupled.models import next_token_loss
from ds_decoupled.nn.heads import SharedReadout
from ds_decoupled.nn.lens import Translator, lens_depth
from ds_decoupled.settings.teaching import TeachingSettings
from ds_decoupled.stages.heads import WholeModel, make_head
from ds_decoupled.stages.lesson import Lesson, part_of_peak
from ds_decoupled.tensors import form_of

TEACHING: dict[str, Any] = {"updates": 3, "lr": 0.05, "warmup": 0.4}
LLAMA: dict[str, Any] = {"method": "dgl", "net": "llama", "batches": 14, "k": 2, "stages": [0, 3, 5, 8]}


def case_of(window: int = 1, **block: Any) -> dict[str, Any]:
    return {**LLAMA, "block": {"input_shape": [6], "window": window, "head": "lens:2", "head_teaching": TEACHING, **block}}


def compare(case: dict[str, Any], ranks: int) -> list[dict[str, Any]]:
    results = worlds.run(ranks, engine_cases.train, case)
    initial, state = (engine_cases.merged(results, key) for key in ("initial", "state"))
    layers, block = results[0]["summary"]["stage_layers"], case["block"]
    oracle = LocalOracle(engine_cases.stages_from(initial, case, layers),
                         copies(engine_cases.merged(results, "initial_heads"), len(layers)), window=block["window"],
                         farthest=block.get("losses") == "farthest", hops=tuple(block.get("hops", (0, 1))), k=case["k"],
                         head_lr=block.get("head_lr", 1.0), lesson=block["head_teaching"])
    oracle.train(batches_for(case["net"], case["batches"]))
    expected = {f"{index}.{name}": value for s, indices in enumerate(layers)
                for index, layer in zip(indices, oracle.stages[s]) for name, value in layer.state_dict().items()}
    assert expected.keys() == state.keys()
    assert sum(not torch.equal(initial[name], state[name]) for name in state) > len(state) // 2, "nothing was trained"
    for name, value in expected.items():
        torch.testing.assert_close(state[name], value, rtol=0, atol=0, msg=lambda text, name=name: f"{name}: {text}")
    heads, initial_heads = engine_cases.merged(results, "heads"), engine_cases.merged(results, "initial_heads")
    assert len(heads) == sum(head is not None for head in oracle.heads)
    for s, head in heads.items():
        for name, value in oracle.heads[s].state_dict().items():
            assert torch.equal(head.state_dict()[name], value), f"head {s}: {name}"
        assert not torch.equal(head.head[0].change.weight, initial_heads[s].head[0].change.weight)
        for name, value in initial_heads[s].head[-1].state_dict().items():
            assert torch.equal(head.head[-1].state_dict()[name], value), "the readout is read-only"
    told = results[0]["summary"]["head_teaching"]
    assert told["updates"] == told["of"] == block["head_teaching"]["updates"]
    assert told["losses"].keys() == heads.keys()
    for s, found in told["losses"].items():
        torch.testing.assert_close(found, oracle.taught[s], rtol=1e-5, atol=1e-6)
    return results


@pytest.mark.parametrize("window, block, ranks", [
    (1, {}, 1), (1, {"head_lr": 4.0, "hops": [1, 1]}, 2), (2, {"head_lr": 0.5}, 2), (2, {"losses": "farthest"}, 3)])
def test_definition(window: int, block: dict[str, Any], ranks: int) -> None:
    """Heads are taught while those that learn from them hold still, on any number of ranks and for any window."""
    compare(case_of(window, **block), ranks)


def test_a_share_of_what_is_above() -> None:
    """Half of the five blocks above two layers, which with head are five of eight: translator, two blocks, readout."""
    [result] = compare({**case_of(head="lens:50%", partition="uniform"), "stages": 2}, 1)
    assert result["summary"]["stage_layers"] == [[0, 1], [2, 3, 4, 5, 6, 7]] and len(result["heads"][0].head) == 4


@pytest.mark.parametrize("window, block, ranks", [
    (3, {"losses": "farthest"}, 2), (3, {}, 2), (2, {"losses": "farthest", "hops": [1, 1]}, 4)])
def test_definition_in_four_stages(window: int, block: dict[str, Any], ranks: int) -> None:
    """With stages that learn from the model's own loss and have a head that is taught, that pass gradients of heads on to
    stages that hold still, and whose micro-batches are at different updates."""
    compare({**case_of(window, **block), "stages": [0, 2, 4, 6, 8]}, ranks)


@pytest.mark.parametrize("window, learn", [(1, (2,)), (2, (1, 2))])
def test_who_holds_still(window: int, learn: tuple[int, ...]) -> None:
    """Stages that learn from the model's own loss do so from the first update on."""
    case = {**case_of(window, losses="farthest"), "batches": 6}
    [result] = worlds.run(1, engine_cases.train, case)
    moved = {s for s, layers in enumerate(result["summary"]["stage_layers"]) for name in result["state"]
             if int(name.partition(".")[0]) in layers and not torch.equal(result["initial"][name], result["state"][name])}
    assert moved == set(learn) and result["summary"]["head_teaching"]["updates"] == 3
    assert result["summary"]["updates"] == [3, 3, 3] and all(torch.isfinite(torch.tensor(result["losses"])))


@pytest.mark.parametrize("window, ranks", [(1, (1, 2)), (2, (2, 1))])
def test_resume(window: int, ranks: tuple[int, int], tmp_path: Path) -> None:
    """In the middle of teaching, on other ranks, with a model of another start."""
    from test_checkpoint import check

    check({**case_of(window, head_lr=2.0), "stop": 2}, tmp_path, *ranks)


def test_a_lesson_goes_back() -> None:
    """A lesson that is over takes up one that is not, and one of a run without lessons is over."""
    lesson = Lesson(TeachingSettings(updates=2, lr=0.1), still=True, has_head=True)
    assert [lesson.enter(m, k=2) for m in range(3)] == [True] * 3
    lesson.tell(0, torch.tensor(2.0))
    lesson.leave(0)
    kept = copy.deepcopy(lesson.state_dict())
    assert [lesson.enter(m, k=2) for m in (3, 4)] == [True, False] and lesson.holds(3) and not lesson.holds(4)
    lesson.tell(1, torch.tensor(4.0))
    lesson.tell(4, torch.tensor(100.0))  # behind the lesson
    lesson.updated(k=2)
    assert lesson.losses == [3.0]
    lesson.load_state_dict(kept)
    assert not lesson.holds(0) and lesson.holds(1) and not lesson.holds(3) and not lesson.losses
    assert [lesson.enter(m, k=2) for m in (3, 4)] == [True, False]
    lesson.updated(k=2)
    assert lesson.losses == [2.0]
    lesson.load_state_dict(None)
    assert not lesson.enter(7, k=2)
    assert [lesson.lasts(update) for update in (0, 1, 2)] == [True, True, False]


def test_replicas() -> None:
    """Data-parallel replicas teach alike: the two pipelines end with the same heads and weights."""
    case = {**case_of(), "pipe_ranks": 1, "batches": 10}
    a, b = worlds.run(2, engine_cases.train, case)
    assert all(torch.equal(a["state"][name], b["state"][name]) for name in a["state"])
    assert all(torch.equal(value, b["heads"][0].state_dict()[name]) for name, value in a["heads"][0].state_dict().items())


@pytest.mark.parametrize("config", [{"bf16": {"enabled": True}}, {"zero_optimization": {"stage": 1}}], ids=["bf16", "zero"])
def test_who_holds_still_with_float32_copies(config: dict[str, Any]) -> None:
    """In bf16 and ZeRO-1 the optimizer steps copies of all of a stage's weights at once: those that hold still do not decay
    either, and heads and the stages above learn on from what they were taught."""
    case = {**case_of(2, losses="farthest", head_lr=0.0), "lr": 0.0, "config": config,
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True, "weight_decay": 0.1}}}
    taught, on = (worlds.run(2, engine_cases.train, {**case, "batches": batches}) for batches in (6, 10))
    layers = taught[0]["summary"]["stage_layers"]
    for results, learn in ((taught, {1, 2}), (on, {0, 1, 2})):
        initial, state = (engine_cases.merged(results, key) for key in ("initial", "state"))
        assert {s for s, own in enumerate(layers) for name in state
                if int(name.partition(".")[0]) in own and not torch.equal(initial[name], state[name])} == learn
    heads, later = (engine_cases.merged(results, "heads") for results in (taught, on))
    for s, head in heads.items():
        for name, value in head.state_dict().items():
            torch.testing.assert_close(later[s].state_dict()[name], value, rtol=0, atol=0)
        assert not torch.equal(head.head[0].change.weight, torch.zeros_like(head.head[0].change.weight))


def failing(case: dict[str, Any]) -> str:
    """The lowest stage's head breaks in the second update; what this rank learns of it."""
    engine = engine_cases.build({**case, "block": {**case["block"], "timeout": 30}})
    if 0 in engine.stages:
        calls = iter(range(100))

        def broken(module: nn.Module, given: Any) -> None:
            if next(calls) >= case["k"]:
                raise ValueError("the head broke")

        engine.stages[0].head.register_forward_pre_hook(broken)
    data = engine_cases.data_of(case, engine)
    try:
        for _ in range(3):
            engine.train_batch(data)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def test_a_head_that_breaks_is_told_to_every_rank() -> None:
    """Also to ranks that have no lesson to wait for."""
    first, second = worlds.run(2, failing, case_of())
    assert first == "ValueError: the head broke" and second.startswith("PeerError") and "the head broke" in second


# -- the head ---------------------------------------------------------------------------------------------------------------


def heads(name: str, bounds: Sequence[int] = (0, 2, 4, 6, 8)) -> tuple[list[Any], list[nn.Module]]:
    """The built layers, and a head for each stage but the last, on one readout."""
    layers = llama_net()
    built = [layer.build() for layer in layers]
    x: Any = torch.arange(12).view(2, 6) % 11
    forms, given = [], []
    for layer in built:
        x = layer(x)
        given.append(x)
        forms.append(form_of(x))
    readout = SharedReadout(layers[-1].build())
    model = WholeModel(layers, bounds, forms)
    return built, [make_head(name, given[end - 1], 11, 0, stage, None, torch.device("cpu"), model, readout)
                   for stage, end in enumerate(model.bounds[1:-1])]


def test_what_a_lens_is_made_of() -> None:
    """Translator, blocks as AugLocal picks them, and one readout for all; before it learns the translator changes nothing."""
    built, made = heads("lens:2")
    assert [[getattr(layer, "index", None) for layer in head.head] for head in made] == [
        [None, 3, 5, None], [None, 4, 5, None], [None, 5, None]]
    assert len({id(head.head[-1]) for head in made}) == 1
    assert not any(p.requires_grad for p in made[0].head[-1].parameters())
    x = torch.randn(2, 6, 32)
    assert torch.equal(made[0](x), built[-1](built[6](built[4](x))))
    learn = [name for name, p in made[2].named_parameters() if p.requires_grad]
    assert all(name.startswith(("head.0.", "head.1.")) for name in learn) and "head.0.change.weight" in learn
    assert [len(head.head) for head in heads("lens:4", (0, 1, 2, 3, 4, 8))[1]] == [6, 6, 6, 5]  # no pyramid; three are left
    [first, *_] = heads("lens:0")[1]
    assert [type(layer) for layer in first.head] == [Translator, SharedReadout]


def test_translator() -> None:
    translator = Translator((torch.zeros(2, 6, 4), torch.zeros(2, 6)))
    x, mask = torch.randn(2, 6, 4), torch.ones(2, 6)
    with torch.no_grad():
        translator.change.weight.copy_(2 * torch.eye(4))
    y, passed = translator((x, mask))
    assert torch.allclose(y, 3 * x) and passed is mask and torch.allclose(translator(x), 3 * x)
    for wrong in (torch.zeros(2, 3, 8, 8), (torch.zeros(2, 6, 4), torch.zeros(2, 6, 4))):
        with pytest.raises(ConfigError, match='"decoupled.head": .*lens.* it translates one stream'):
            Translator(wrong)


def test_names() -> None:
    assert [lens_depth(name) for name in ("lens", "lens:0", "lens:12", "lens:5%", "lm", None)] == [4, 0, 12, 0.05, None, None]
    for name in ("lens:", "lens:-1", "lenses", "lens:x", "lens:0%", "lens:100%", "lens:%", "lens:5%%"):
        with pytest.raises(ConfigError, match="lens:n"):
            lens_depth(name)


def test_rate() -> None:
    assert [part_of_peak(u, 60, 0.1) for u in (0, 5, 6)] == [1 / 6, 1.0, 1.0]
    assert part_of_peak(59, 60, 0.1) < 0.001 and part_of_peak(0, 1, 0.0) == 1.0


@pytest.mark.parametrize("block, message", [
    ({"head_teaching": {"updates": 0}}, "a number of updates"), ({"head_teaching": {"lr": 0.0}}, "a learning rate"),
    ({"head_teaching": {"target": "model"}}, "target"), ({"head_teaching": True}, "an object is needed"),
    ({"head_teaching": {}, "head": "shared"}, "taught alone"),
    ({"head_teaching": {}, "method": "delayed"}, "no stage but the last"), ({"head_lr": -1.0}, "a factor"),
    ({"head_lr": 2.0, "method": "dsp"}, "no stage but the last")])
def test_refused(block: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_block({"decoupled": {"method": "dgl", **block}})


def with_an_instance(case: dict[str, Any]) -> None:
    """The engine with an optimizer of the user's own, on a rank of a world."""
    config = engine_cases.config_of(case)
    model = ds_decoupled.DecoupledPipelineModule(llama_net(), num_stages=1, config=config, loss_fn=next_token_loss)
    ds_decoupled.initialize(model=model, config=config, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))


def test_refused_where_it_has_no_head() -> None:
    """With one stage, or a window of all with the farthest loss alone; and a rate of heads in an optimizer without groups."""
    for case in ({**case_of(), "stages": 1}, case_of(3, losses="farthest")):
        with pytest.raises(worlds.RankFailed, match="no stage has a head"):
            worlds.run(1, engine_cases.train, case)
    muon = {"type": "Muon", "params": {"lr": 1e-3, "torch_adam": True}}
    with pytest.raises(worlds.RankFailed, match="head_lr.*DeepSpeed's Muon"):
        worlds.run(1, engine_cases.train, {**case_of(head_lr=2.0), "optimizer": muon})
    with pytest.raises(worlds.RankFailed, match="head_lr.*the optimizer that was given"):
        worlds.run(1, with_an_instance, case_of(head_lr=2.0))
    with pytest.raises(worlds.RankFailed, match="head_teaching.*the optimizer that was given"):
        worlds.run(1, with_an_instance, case_of())


def warnings_of(cases: list[dict[str, Any]]) -> list[str]:
    """What DeepSpeed's log says of heads while these engines are made, on a rank of a world."""
    told: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(handler)
    for case in cases:
        engine_cases.build(case)
    return [line for line in told if "weights that learn" in line]


def test_heads_larger_than_the_model_are_told() -> None:
    """Copies of the last three layers behind every block; lenses share their readout."""
    lower, upper = worlds.run(2, warnings_of, [
        {**LLAMA, "stages": stages, "block": {"input_shape": [6], "head": head}}
        for stages, head in (("blocks", "last-layers:3"), (2, "lens:1"))])
    assert not lower and len(upper) == 1 and "the heads of 8 stages have" in upper[0] and '"lens"' in upper[0]
