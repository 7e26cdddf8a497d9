"""Heads of the model's own later layers, the transport penalty, heads that rebuild: against definitions, layer by layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import engine_cases
import pytest
import tiny_lm
import torch
import worlds
from test_local import CNN, GPT, case_of, compare, measured_weights
from torch import Tensor, nn

from ds_decoupled.config import CompileSettings
from ds_decoupled.errors import ConfigError
from ds_decoupled.models import build_gpt, build_model, from_hugging_face
from ds_decoupled.models.transformer import GPTConfig
from ds_decoupled.nn import ReversibleCoupling
from ds_decoupled.nn.auglocal import depth_of, picked, unit_of
from ds_decoupled.stages.compiled import compile_layers, plain_copy
from ds_decoupled.stages.heads import WholeModel, make_head
from ds_decoupled.stages.layers import Layers
from ds_decoupled.stages.randomness import LayerSeeds
from ds_decoupled.stages.transport import Transport, check_transport
from ds_decoupled.tensors import as_tuple, form_of, leaves


def llama(blocks: int = 6) -> list[Any]:
    """A model with weights of its own, as a pretrained one is given."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(3)
    return from_hugging_face(AutoModelForCausalLM.from_config(tiny_lm.tiny_config(num_hidden_layers=blocks)).eval())


def plain() -> list[Any]:
    """Modules and functions, as a plain ``PipelineModule`` takes them."""
    inner = [layer for _ in range(2) for layer in (nn.Linear(8, 8), torch.tanh)]
    return [nn.Flatten(), nn.Linear(12, 8), torch.tanh, *inner, nn.Linear(8, 5)]


IMAGES, IDS = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(12).view(2, 6) % 11
MODELS: dict[str, tuple[Any, Any]] = {
    "resnet18": (lambda: build_model("resnet18", width=4), IMAGES),
    "revnet18": (lambda: build_model("revnet18", width=4), IMAGES),
    "resnet50": (lambda: build_model("resnet50", width=2), IMAGES), "cnn6": (lambda: build_model("cnn6", width=4), IMAGES),
    "gpt": (lambda: build_gpt(GPTConfig(4, 16, 2, vocab_size=11)), IDS),
    "gpt, one stream": (lambda: build_gpt(GPTConfig(4, 16, 2, vocab_size=11), reversible=False), IDS),
    "llama": (llama, IDS), "llama with a mask": (llama, (IDS, torch.ones_like(IDS))), "plain": (plain, torch.randn(4, 3, 2, 2)),
}


def passed(layers: list[Any], x: Any) -> tuple[list[Any], list[Any], WholeModel]:
    """Built layers, what each of them gives, and the model as heads are made from it, one stage a layer."""
    built = [layer.build() if hasattr(layer, "build") else layer for layer in layers]
    given = []
    for layer in built:
        x = layer(x)
        given.append(x)
    return built, given, WholeModel(layers, range(len(layers) + 1), [form_of(y) for y in given])


@pytest.mark.parametrize("name", list(MODELS))
def test_every_stage_gets_a_head(name: str) -> None:
    """It runs on what the stage gives, its gradient reaches the stage, it ends as the model does, higher ones are shorter."""
    layers, x = MODELS[name][0](), MODELS[name][1]
    built, given, model = passed(layers, x)
    lengths = []
    for stage in range(len(layers) - 1):
        head = make_head("auglocal:3", given[stage], 11, 0, stage, None, torch.device("cpu"), model)
        ends = leaves(given[stage], True)
        logits = head(ends)
        assert logits.shape == given[-1].shape
        logits.sum().backward()
        found = [t.grad for t in as_tuple(ends) if t.is_floating_point()]
        assert found and all(grad is not None and grad.abs().sum() > 0 for grad in found[:1]), stage
        own = [layer for layer in head.head if not isinstance(layer, nn.Flatten)]
        assert isinstance(own[-1], type(built[-1]))
        assert stage == len(layers) - 2 or len(own) > 1  # nothing stands between the last but one and the classifier
        lengths.append(len(own))
    assert lengths == sorted(lengths, reverse=True) and lengths[0] > lengths[-1] == 1


def test_copies_start_from_the_models_weights() -> None:
    """Of a pretrained model: which layers, with which weights, and they are copies."""
    layers = llama()
    built, given, model = passed(layers, IDS)
    head = make_head("auglocal:2", given[1], 256, 0, 1, None, torch.device("cpu"), model)
    assert [getattr(layer, "index", None) for layer in head.head] == [3, 5, None]  # of blocks 1 to 5 above: 3 and the last
    for copied, source in zip(head.head, (built[4], built[6], built[7])):
        for name, value in source.state_dict().items():
            assert torch.equal(copied.state_dict()[name], value) and copied.state_dict()[name] is not value
    assert torch.equal(head.head[1](head.head[0](given[1])), built[6](built[4](given[1])))


def test_a_mask_reaches_copied_layers() -> None:
    """What travels beside the hidden state goes through them."""
    mask = torch.ones_like(IDS)
    mask[:, 2:4] = 0  # later tokens must not look at these
    layers = llama()
    results = []
    for ids in (IDS, torch.where(mask == 0, 7, IDS)):
        _, given, model = passed(layers, (ids, mask))
        results.append(make_head("auglocal", given[0], 256, 0, 0, None, torch.device("cpu"), model).eval()(given[0])[:, 4:])
    assert torch.equal(*results)


def test_modules_are_copied_with_their_functions() -> None:
    """A unit of a layer and a function; the model keeps its own weights."""
    layers = plain()
    _, given, model = passed(layers, MODELS["plain"][1])
    head = make_head("auglocal:2", given[0], 5, 0, 0, None, torch.device("cpu"), model)
    assert [type(layer).__name__ for layer in head.head[::2]] == ["Linear", "Linear", "Linear"]  # 12 -> 8 is never left out
    assert not {id(p) for p in head.parameters()} & {id(p) for layer in layers if isinstance(layer, nn.Module)
                                                     for p in layer.parameters()}


def test_a_copy_of_a_compiled_layer_is_its_own() -> None:
    layer = nn.Linear(4, 4)
    compile_layers([layer], CompileSettings(backend="aot_eager"), by_reference=False)
    copied, x = plain_copy(layer), torch.randn(2, 4)
    assert torch.equal(copied(x), layer(x))
    with torch.no_grad():
        copied.weight.zero_()
    assert torch.equal(copied(x), copied.bias.expand(2, 4)) and not torch.equal(copied(x), layer(x))


@pytest.mark.parametrize("last", [torch.tanh, nn.ReLU()], ids=["function", "module without weights"])
def test_nothing_to_copy(last: Any) -> None:
    layers = [nn.Linear(4, 4), nn.Linear(4, 4), last]
    _, given, model = passed(layers, torch.randn(2, 4))
    with pytest.raises(ConfigError, match='"decoupled.head": .*auglocal.* has no weights of its own'):
        make_head("auglocal", given[0], 4, 0, 0, None, torch.device("cpu"), model)


# -- which layers -----------------------------------------------------------------------------------------------------------


def test_the_published_pick() -> None:
    """The authors' formula, round(l + (n - 1 - l) i / d) for i = 1 .. d, wherever no layer changes shapes."""
    for count in (5, 12, 30):
        for first in range(1, count):
            for depth in range(1, count - first + 1):
                expected = [int(first - 1 + (count - first + 1) * i / depth + 0.5) for i in range(1, depth + 1)]
                assert picked(["end", *["block"] * count], [True, *[False] * count], first, depth) == expected


def test_of_thirty_blocks() -> None:
    """SmolLM2 in two stages: blocks 18, 22, 25 and 29 (layer 0 is the embedding)."""
    assert [i - 1 for i in picked(["end", *["block"] * 30], [True, *[False] * 30], 16, 4)] == [18, 22, 25, 29]
    assert [i - 1 for i in picked(["end", *["block"] * 30], [True, *[False] * 30], 16, 2)] == [22, 29]


def test_half_blocks_stay_together() -> None:
    kinds = ["embedding", *["attention", "mlp"] * 4]
    assert unit_of(kinds) == 2
    assert picked(kinds, [True, *[False] * 8], first=1, depth=4) == [3, 4, 7, 8]
    assert picked(kinds, [True, *[False] * 8], first=2, depth=4) == [5, 6, 7, 8]  # half a block at the bottom is left out
    assert picked(kinds, [True, *[False] * 8], first=8, depth=4) == [8]  # or all there is
    assert picked(kinds, [True, *[False] * 8], first=9, depth=4) == []


@pytest.mark.parametrize("depth", range(1, 8))
def test_what_changes_shapes_is_never_left_out(depth: int) -> None:
    changes = [True, False, False, True, False, True, False, True, False]
    for first in range(1, 9):
        found = picked(["stem", *["block"] * 8], changes, first, depth)
        needed = {i for i in range(first, 9) if changes[i]} | {8}
        assert needed <= set(found) and len(found) == min(max(depth, len(needed)), 9 - first)


def test_depth_falls_evenly() -> None:
    for stages in (2, 3, 6, 10, 30):
        depths = [depth_of(s, stages, 7) for s in range(stages - 1)]
        assert depths[0] == 7 and depths == sorted(depths, reverse=True) and (stages == 2 or depths[-1] == 4)


# -- training -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base, window, ranks", [(CNN, 1, 1), (CNN, 1, 2), (GPT, 2, 2)], ids=["cnn-1", "cnn-2", "gpt-2"])
def test_training(base: dict[str, Any], window: int, ranks: int) -> None:
    """Heads are the same wherever their stages are, and learn by the definition."""
    compare(case_of({**base, "k": 2}, window, head="auglocal:2"), ranks)


def test_measured_partition() -> None:
    """``"partition": "profile"`` times them where they will stand: the lowest one is the longest."""
    case = {**case_of(CNN, 1, head="auglocal:9", partition="profile"), "stages": [0, 1, 7]}
    seconds = worlds.run(1, measured_weights, case)[0]
    assert len(seconds) == 7 and seconds[0] > max(seconds[1:])


def bounds_of(cases: list[dict[str, Any]]) -> list[tuple[int, ...]]:
    """At which layers stages begin, on a rank of a world."""
    return [engine_cases.build(case).module.placement.stage_bounds for case in cases]


@pytest.mark.parametrize("ranks", [1, 2])
def test_stages_are_cut_with_their_heads(ranks: int) -> None:
    """Seven layers alike in two stages: a head of three weighs three. A stage from which nobody learns has none."""
    cases = [{**case_of(CNN, 1 + len(more), head=head, partition="uniform", **more), "stages": stages}
             for head, stages, more in (("mlp-sr", 2, {}), ("auglocal:2", 2, {}), ("auglocal:2", 3, {"losses": "farthest"}))]
    assert worlds.run(ranks, bounds_of, cases)[0] == [(0, 3, 7), (0, 2, 7), (0, 3, 6, 7)]


def test_resume(tmp_path: Path) -> None:
    """A checkpoint holds these heads, and the penalties of what is in flight."""
    from test_checkpoint import check

    case = case_of({**CNN, "batches": 18, "k": 3}, 2, head="auglocal:1", transport=0.5)
    check({**case, "stop": 3, "net_args": {"dropout": 0.1}}, tmp_path, 2, 3)


@pytest.mark.parametrize("base, window, losses, ranks", [
    (CNN, 1, "sum", 1), (CNN, 2, "sum", 2), (CNN, 3, "farthest", 1), (GPT, 2, "sum", 2)])
def test_transport(base: dict[str, Any], window: int, losses: str, ranks: int) -> None:
    """The penalty is part of the own loss of every stage, and goes where that goes."""
    compare(case_of({**base, "k": 2}, window, losses=losses, transport=0.5), ranks)


def test_what_layers_add() -> None:
    """By hand: a residual layer, a coupling (whose streams swap), a mask that passes, and a layer of another shape."""

    class Residual(nn.Module):
        def forward(self, x: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            return x[0] + 3, x[1]

    def penalties(layer: Any, x: Any) -> list[float]:
        layers = Layers([layer], 0, LayerSeeds(0, 0, torch.device("cpu")))
        with Transport(0.5).of(layers) as parts:
            layers(x, 0)
        assert not layers.listeners
        return [part.item() for part in parts]

    x = torch.randn(2, 4)
    assert penalties(Residual(), (x, torch.ones(2, 4))) == [pytest.approx(0.5 * 9)]
    coupling = ReversibleCoupling(nn.Linear(4, 4))
    assert penalties(coupling, (x, 2 * x)) == [pytest.approx(0.5 * coupling.f(x).square().mean().item(), rel=1e-5)]
    assert penalties(nn.Linear(4, 3), x) == []


def test_nothing_to_penalise() -> None:
    forms = [form_of(torch.ones(2, width)) for width in (4, 3, 2)]
    check_transport(0.0, forms)
    check_transport(0.1, [*forms, forms[-1]])
    with pytest.raises(ConfigError, match='"decoupled.transport": 0.1 cannot be used: no layer .* gives the shapes'):
        check_transport(0.1, forms)


@pytest.mark.parametrize("ranks", [1, 2])
def test_rebuilding(ranks: int) -> None:
    """LoPT: lower stages learn to be undone, the last one the task."""
    compare(case_of({**GPT, "k": 2, "stages": [0, 2, 4, 6]}, 1, head="reconstruct"), ranks)
