"""``"compile"``: the numbers of the eager engine, whatever a compiler makes of the layers."""

from __future__ import annotations

import copy
from typing import Any

import engine_cases
import pytest
import torch
import worlds
from torch import Tensor, nn

from ds_decoupled.config import CompileSettings, parse_block
from ds_decoupled.errors import ConfigError
from ds_decoupled.stages.compiled import check_compiler, compile_layers
from ds_decoupled.stages.graph import GraphSegment
from ds_decoupled.stages.layers import Layers
from ds_decoupled.stages.randomness import LayerSeeds
from ds_decoupled.stages.stage import unique_parameters
from ds_decoupled.stages.weights import Weights

METHODS = ["reversible", "pipedream", "delayed", "dsp", "petra"]
#: AOTAutograd without inductor: the same graphs, cut in the same way, in a tenth of the time.
CASES: dict[str, dict[str, Any]] = {
    "gpt": {"net": "gpt", "net_args": {"dropout": 0.2}, "batches": 12, "k": 2},
    "plain_gpt": {"net": "gpt", "net_args": {"dropout": 0.2, "reversible": False}, "batches": 12, "k": 2},
    "revnet": {"net_args": {"dropout": 0.2}, "batches": 16},
}


def train_both(case: dict[str, Any], methods: list[str], compile: Any) -> dict[str, Any]:
    """By method: the state after eager training, and after compiled training."""
    states = {}
    for method in methods:
        eager = engine_cases.train({**case, "method": method})
        compiled = engine_cases.train({**case, "method": method, "block": {"compile": compile}})
        states[method] = (eager["state"], compiled["state"])
    return {"replica": 0, "states": states}


def assert_same(results: list[dict[str, Any]]) -> None:
    for result in results:
        for method, (eager, compiled) in result["states"].items():
            for name, value in eager.items():
                torch.testing.assert_close(compiled[name], value, rtol=1e-4, atol=1e-5,
                                           msg=lambda text, at=f"{method}, {name}": f"{at}: {text}")


@pytest.mark.parametrize("name", CASES)
def test_compiled_is_eager(name: str) -> None:
    """After several delayed updates, with dropout and (in the RevNet) batch norm, whose statistics move once."""
    methods = METHODS if name != "plain_gpt" else ["pipedream", "delayed", "dsp"]
    assert_same(worlds.run(1, train_both, CASES[name], methods, {"backend": "aot_eager"}))


def test_inductor() -> None:
    """Code that was really compiled, on one rank and on two: the same numbers on both. Of kept graphs: below."""
    case = {**CASES["gpt"], "batches": 8}
    one = worlds.run(1, train_both, case, ["petra"], True, timeout=200)
    two = worlds.run(2, train_both, case, ["petra"], True, timeout=200)
    assert_same([*one, *two])
    whole = {name: value for result in two for name, value in result["states"]["petra"][1].items()}
    assert all(torch.equal(value, whole[name]) for name, value in one[0]["states"]["petra"][1].items())


def test_sequences_of_different_lengths() -> None:
    """The second length compiles for any length."""
    assert_same(worlds.run(1, train_both, {**CASES["gpt"], "varied": True}, ["petra", "delayed"], {"backend": "aot_eager"}))


def test_resume_with_kept_graphs(tmp_path: Any) -> None:
    """Compiled graphs in flight come back from a checkpoint."""
    case = {**CASES["gpt"], "method": "delayed", "stop": 3, "block": {"compile": {"backend": "aot_eager"}}}
    whole = engine_cases.merged(worlds.run(1, engine_cases.train, case))
    worlds.run(1, engine_cases.train_and_stop, case, str(tmp_path))
    resumed = engine_cases.merged(worlds.run(1, engine_cases.resume, case, str(tmp_path)))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


# -- what a kept graph uses -----------------------------------------------------------------------------------------------


class Mixed(nn.Module):
    """What a compiler likes to cut elsewhere: cheap work with a weight before a function that saves its input."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(8)
        self.linear = nn.Linear(8, 8)
        self.scale = nn.Parameter(torch.rand(8) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.gelu(self.linear(self.norm(x)) * self.scale)


class Derived(nn.Module):
    """Multiplies by a value computed from the weight alone."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return x @ torch.tanh(self.weight)


def gradients(layer: nn.Module, settings: CompileSettings | None, by_reference: bool = True) -> list[Tensor]:
    """Forward, change every weight, backward: the gradients of the input and of the weights."""
    layer = copy.deepcopy(layer)
    if settings is not None:
        compile_layers([layer], settings, by_reference)
    weights = Weights(unique_parameters([layer]), stashed=False)
    run = GraphSegment(Layers([layer], 0, LayerSeeds(0, 0, torch.device("cpu"))), weights, need_input_grad=True)
    generator = torch.Generator().manual_seed(1)
    x, dy = (torch.randn(4, 8, generator=generator) for _ in range(2))
    run.forward(0, x)
    for parameter in weights.parameters:
        parameter.data.add_(torch.randn(parameter.shape, generator=generator))
    _, (dx,) = run.backward(0, None, (dy,))
    assert dx is not None
    return [dx, *(p.grad for p in weights.parameters if p.grad is not None)]


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_kept_graphs_use_current_weights_and_their_own_activations(backend: str) -> None:
    torch.manual_seed(0)
    layer = Mixed()
    expected = gradients(layer, None)
    for found, wanted in zip(gradients(layer, CompileSettings(backend=backend)), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    # The compiler's own cut computes gelu's input again, with a scale that has changed by then.
    own = gradients(layer, CompileSettings(backend=backend), by_reference=False)
    assert any(not torch.allclose(found, wanted, rtol=1e-2) for found, wanted in zip(own, expected, strict=True))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_what_comes_from_weights_alone_is_computed_again(backend: str) -> None:
    """The gradient of ``x @ g(w)`` with respect to x is ``dy @ g(w)^T`` of the weight as it is now."""
    torch.manual_seed(0)
    layer = Derived()
    dx = gradients(layer, CompileSettings(backend=backend))[0]
    generator = torch.Generator().manual_seed(1)
    _, dy = (torch.randn(4, 8, generator=generator) for _ in range(2))
    now = layer.weight.detach() + torch.randn(8, 8, generator=generator)
    torch.testing.assert_close(dx, dy @ torch.tanh(now).T, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("mode", "tunes"), [("default", False), ("max-autotune-no-cudagraphs", True)])
@pytest.mark.parametrize("by_reference", [False, True])
def test_inductor_works_in_its_mode(mode: Any, tunes: bool, by_reference: bool) -> None:
    """Both passes are compiled with the mode's options, and with eager's random numbers; the numbers are eager's."""
    from torch._inductor import config
    from torch._inductor.custom_graph_pass import CustomGraphPass

    seen = []

    class Look(CustomGraphPass):
        def __call__(self, graph: Any) -> None:
            seen.append((config.max_autotune, config.coordinate_descent_tuning, config.fallback_random))

        def uuid(self) -> Any:
            return None  # no code from a cache, which nobody would compile

    torch.manual_seed(0)
    layer, x = nn.Sequential(nn.Linear(8, 8), nn.GELU()), torch.randn(4, 8)
    expected = torch.autograd.grad(layer(x).sum(), list(layer.parameters()))
    compile_layers([layer], CompileSettings(mode=mode), by_reference)
    with config.patch(post_grad_custom_post_pass=Look()):
        found = torch.autograd.grad(layer(x).sum(), list(layer.parameters()))
    assert seen == [(tunes, tunes, True)] * 2
    for ours, eager in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, eager, rtol=1e-5, atol=1e-6)


# -- settings ---------------------------------------------------------------------------------------------------------------


def parse(**block: Any) -> CompileSettings | None:
    config = parse_block({"decoupled": {"method": "petra", **block}})
    assert config is not None
    return config.compile_settings()


def test_settings() -> None:
    assert parse() is None and parse(compile=False) is None
    assert parse(compile=True) == CompileSettings(backend="inductor", mode="default", dynamic=None)
    assert parse(compile={"dynamic": True, "mode": "max-autotune-no-cudagraphs"}) == \
        CompileSettings(backend="inductor", mode="max-autotune-no-cudagraphs", dynamic=True)


@pytest.mark.parametrize(("block", "setting", "text"), [
    ({"compile": {"mod": "default"}}, "decoupled.compile.mod", "Did you mean 'mode'?"),
    ({"compile": {"mode": "reduce-overhead"}}, "decoupled.compile.mode", "CUDA graphs write every output to the same place"),
    ({"compile": {"mode": "fast"}}, "decoupled.compile.mode", "'default'"),
    ({"compile": {"backend": "eager"}}, "decoupled.compile.backend", "'inductor', 'aot_eager'"),
    ({"compile": {"dynamic": "yes"}}, "decoupled.compile.dynamic", "true, false"),
    ({"compile": {"backend": "aot_eager", "mode": "max-autotune-no-cudagraphs"}}, "decoupled.compile.mode", "inductor's"),
    ({"compile": True, "split_backward": True}, "decoupled.compile", '"split_backward"'),
    ({"compile": True, "method": "backprop"}, "decoupled.compile", "engine.compile()"),
    ({"compile": "yes"}, "decoupled.compile", "boolean"),
    ({"compile": 1}, "decoupled.compile", "boolean"),
    ({"compile": {"mode": 3}}, "decoupled.compile.mode", "in quotes"),
])
def test_wrong_settings(block: dict[str, Any], setting: str, text: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse_block({"decoupled": {"method": "petra", **block}})
    assert error.value.setting == setting and text in str(error.value)


def test_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import config

    monkeypatch.setattr(config.cpp, "cxx", ("no-such-compiler",))
    with pytest.raises(ConfigError, match="no C\\+\\+ compiler was found. Install g\\+\\+"):
        check_compiler(CompileSettings(), torch.device("cpu"))
    check_compiler(CompileSettings(backend="aot_eager"), torch.device("cpu"))


