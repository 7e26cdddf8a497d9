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
from teaching_oracle import teach
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

TEACHING: dict[str, Any] = {"updates": 3, "lr": 0.01, "target": "model", "warmup": 0.4}
LLAMA: dict[str, Any] = {"method": "dgl", "net": "llama", "batches": 14, "k": 2, "stages": [0, 3, 5, 8]}


def case_of(window: int = 1, **block: Any) -> dict[str, Any]:
    return {**LLAMA, "block": {"input_shape": [6], "window": window, "head": "lens:2", "head_teaching": TEACHING, **block}}


def compare(case: dict[str, Any], ranks: int) -> list[dict[str, Any]]:
    results = worlds.run(ranks, engine_cases.train, case)
    initial, state = (engine_cases.merged(results, key) for key in ("initial", "state"))
    layers, block = results[0]["summary"]["stage_layers"], case["block"]
    settings = block["head_teaching"]
    oracle = LocalOracle(engine_cases.stages_from(initial, case, layers),
                         copies(engine_cases.merged(results, "initial_heads"), len(layers)), window=block["window"],
                         farthest=block.get("losses") == "farthest", hops=(0, 1), k=case["k"])
    data = batches_for(case["net"], case["batches"])
    losses = teach(oracle.stages, oracle.heads, data, k=case["k"], **settings)
    for s, (stage, head) in enumerate(zip(oracle.stages, oracle.heads)):
        groups: list[dict[str, Any]] = [{"params": list(stage.parameters())}]
        if head is not None:
            own = [p for p in head.parameters() if p.requires_grad]
            groups.append({"params": own, "lr": 0.1 * block.get("head_lr", 1.0)})
        oracle.optimizers[s] = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    oracle.train(data[settings["updates"] * case["k"]:])
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
    assert told["updates"] == settings["updates"] and told["samples"] == settings["updates"] * case["k"] * 4
    for found, wanted in zip(told["losses"].values(), losses):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    return results


@pytest.mark.parametrize("window, block, ranks", [
    (1, {}, 1), (1, {"head_lr": 4.0, "head_teaching": {**TEACHING, "target": "labels"}}, 2), (2, {"head_lr": 0.5}, 2),
    (2, {"losses": "farthest"}, 3)])
def test_definition(window: int, block: dict[str, Any], ranks: int) -> None:
    """Taught with the trunk still, then learning on beside it, on any number of ranks and for any window."""
    results = compare(case_of(window, **block), ranks)
    sent = results[0]["summary"]["head_teaching"]["bytes_sent"]
    assert (sent > 0) == (ranks > 1)
    assert results[0]["summary"]["bytes_sent"] > sent or ranks == 1


def test_the_trunk_is_still(tmp_path: Path) -> None:
    """While heads are taught no stage makes an update, and what is reported is the model's own loss."""
    case = {**case_of(), "batches": 6}
    [result] = worlds.run(1, engine_cases.train, case)
    assert all(torch.equal(result["initial"][name], result["state"][name]) for name in result["state"])
    assert result["summary"]["updates"] == [0, 0, 0] and result["summary"]["head_teaching"]["updates"] == 3
    assert all(torch.isfinite(torch.tensor(result["losses"])))


@pytest.mark.parametrize("window, ranks", [(1, (1, 2)), (2, (2, 1))])
def test_resume(window: int, ranks: tuple[int, int], tmp_path: Path) -> None:
    """In the middle of teaching, on other ranks, with a model of another start."""
    from test_checkpoint import check

    check({**case_of(window, head_lr=2.0), "stop": 2}, tmp_path, *ranks)


def test_a_lesson_goes_back(tmp_path: Path) -> None:
    """A lesson that is over takes up one that is not, and one of a run without lessons is over."""
    weight = nn.Parameter(torch.ones(2))
    settings = TeachingSettings(updates=3, lr=0.1)
    lesson, again = (Lesson(settings, [weight], None) for _ in range(2))
    kept, values = [], []
    for _ in range(3):
        kept.append((copy.deepcopy(lesson.state_dict()), weight.detach().clone()))
        weight.grad = weight.detach().clone()
        lesson.tell(weight.detach().sum())
        lesson.update()
        values.append(weight.detach().clone())
    assert lesson.over and lesson.teacher is None and lesson.losses[0] == 2.0
    state, value = kept[1]
    lesson.load_state_dict(state)
    assert not lesson.over and lesson.losses == [2.0]
    with torch.no_grad():
        weight.copy_(value)
    weight.grad = value.clone()
    lesson.update()
    assert torch.equal(weight, values[1])
    again.load_state_dict(None)
    assert again.over


def test_replicas() -> None:
    """Data-parallel replicas teach alike: the two pipelines end with the same heads and weights."""
    case = {**case_of(), "pipe_ranks": 1, "batches": 10}
    a, b = worlds.run(2, engine_cases.train, case)
    assert all(torch.equal(a["state"][name], b["state"][name]) for name in a["state"])
    assert all(torch.equal(value, b["heads"][0].state_dict()[name]) for name, value in a["heads"][0].state_dict().items())


@pytest.mark.parametrize("config", [{"bf16": {"enabled": True}}, {"zero_optimization": {"stage": 1}}], ids=["bf16", "zero"])
def test_what_was_taught_is_what_learns_on(config: dict[str, Any]) -> None:
    """The stage's optimizer has float32 copies of its own in bf16 and ZeRO-1: they are those of the taught head."""
    case = {**case_of(head_lr=0.0), "lr": 0.0, "config": config, "batches": 10,
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-9, "torch_adam": True, "weight_decay": 0.0}}}
    taught, on = (worlds.run(1, engine_cases.train, {**case, "batches": batches})[0] for batches in (6, 10))
    assert on["summary"]["updates"] == [2, 2, 2]
    for s, head in taught["heads"].items():
        for name, value in head.state_dict().items():
            torch.testing.assert_close(on["heads"][s].state_dict()[name], value, rtol=0, atol=0)
        assert not torch.equal(head.head[0].change.weight, taught["initial_heads"][s].head[0].change.weight)


def test_data_that_end_while_heads_are_taught() -> None:
    """As in training: every rank is told, and goes on with new data."""
    case = {**case_of(), "batches": 5}
    for result in worlds.run(2, engine_cases.data_that_end, case):
        assert result["calls"] == 2 and "before update 3 of 3 in which heads are taught" in result["message"]


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
    assert len({id(head.readout) for head in made}) == 1
    assert not any(p.requires_grad for p in made[0].readout.parameters())
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
    assert [lens_depth(name) for name in ("lens", "lens:0", "lens:12", "lm", None)] == [4, 0, 12, None, None]
    for name in ("lens:", "lens:-1", "lenses", "lens:x"):
        with pytest.raises(ConfigError, match="lens:n"):
            lens_depth(name)


def test_rate() -> None:
    assert [part_of_peak(u, 60, 0.1) for u in (0, 5, 6)] == [1 / 6, 1.0, 1.0]
    assert part_of_peak(59, 60, 0.1) < 0.001 and part_of_peak(0, 1, 0.0) == 1.0


@pytest.mark.parametrize("block, message", [
    ({"head_teaching": {"updates": 0}}, "a number of updates"), ({"head_teaching": {"lr": 0.0}}, "a learning rate"),
    ({"head_teaching": {"target": "modle"}}, "target"), ({"head_teaching": True}, "an object is needed"),
    ({"head_teaching": {"target": "model"}, "head": "auglocal"}, '"head": "lens"'),
    ({"head_teaching": {}, "head": "shared"}, "taught alone"),
    ({"head_teaching": {}, "method": "dgl_async"}, "wait for no other"),
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
