"""Optimizers against delay: Muon by DeepSpeed's name, any by its import path, learning rates by delay."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import engine_cases
import pytest
import torch
import worlds
from oracle import Oracle
from test_oracle import compare

import ds_decoupled
from ds_decoupled.config import parse_block
from ds_decoupled.errors import ConfigError
from ds_decoupled.models import next_token_loss
from ds_decoupled.optim import client_from_json, lr_divisor
from ds_decoupled.optim.groups import scaled_lr

MUON: dict[str, Any] = {"type": "Muon", "params": {"lr": 1e-3, "muon_lr": 2e-3, "torch_adam": True, "weight_decay": 0.01}}
NADAM: dict[str, Any] = {"type": "torch.optim.NAdam", "params": {"lr": 0.01, "betas": [0.9, 0.99]}}
GPT: dict[str, Any] = {"net": "gpt", "batches": 12, "k": 2}


def with_optimizers(kind: Any, decay: float = 1.0, **params: Any) -> Any:
    """Gives an oracle other optimizers, one a stage."""
    def prepare(oracle: Oracle) -> None:
        oracle.optimizers = [kind(stage.parameters(), **params) for stage in oracle.stages]
        oracle.schedulers = [torch.optim.lr_scheduler.ExponentialLR(o, decay) for o in oracle.optimizers]

    return prepare


# -- by import path --------------------------------------------------------------------------------------------------------


def test_import_path() -> None:
    """Any optimizer that can be imported, one a stage."""
    compare({"method": "petra", "k": 2, "batches": 16, "optimizer": NADAM, "decay": 0.9},
            prepare=with_optimizers(torch.optim.NAdam, 0.9, lr=0.01, betas=(0.9, 0.99)))


def test_import_path_in_deepspeeds_own_engine() -> None:
    """``backprop`` is DeepSpeed's engine; it trains as the reversible flush does, with the same optimizer."""
    case = {"net": "gpt", "batches": 8, "k": 2, "optimizer": NADAM}
    states = [engine_cases.merged(worlds.run(1, engine_cases.train, {**case, **method}))
              for method in ({"method": "backprop", "stages": "ranks"}, {"method": "reversible"})]
    for name, value in states[0].items():
        torch.testing.assert_close(value, states[1][name], rtol=1e-3, atol=1e-4)


BF16, ZERO = {"bf16": {"enabled": True}}, {"zero_optimization": {"stage": 1}}
WRONG: list[tuple[str, dict[str, Any], str, list[str]]] = [
    ("SOPA", {}, "optimizer.type", ["neither DeepSpeed nor torch.optim", "pytorch_optimizer.SOAP"]),
    ("no_such_package.SOAP", {}, "optimizer.type", ["cannot be imported", "pip install no-such-package"]),
    ("torch.optim.NAdamm", {}, "optimizer.type", ["torch.optim has no 'NAdamm'", 'Did you mean "torch.optim.NAdam"?']),
    ("torch.nn.Linear", {}, "optimizer.type", ["a subclass of torch.optim.Optimizer"]),
    (".NAdam", {}, "optimizer.type", ["package.module.Class"]),
    ("Muon", BF16, "bf16.enabled", ["Muon needs them as matrices", "AdamW"]),
    ("pytorch_optimizer.SOAP", BF16, "bf16.enabled", ["SOAP needs them as matrices"]),
    ("pytorch_optimizer.SOAP", {**ZERO, "zero_allow_untested_optimizer": True}, "zero_optimization.stage", ["as matrices"]),
    ("torch.optim.Muon", ZERO, "zero_optimization.stage", ["as matrices"]),
    ("my.own.Optimizer", ZERO, "zero_optimization.stage", ["not known here", "zero_allow_untested_optimizer"]),
]


@pytest.mark.parametrize(("name", "config", "setting", "words"), WRONG, ids=[f"{w[0]}-{'-'.join(w[1])}" for w in WRONG])
def test_errors_say_what_to_do(name: str, config: dict[str, Any], setting: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        client_from_json({"optimizer": {"type": name}, **config})
    assert error.value.setting == setting
    for word in words:
        assert word in str(error.value)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the extra that brings it, where it is ours."""
    import importlib

    def without(name: str) -> Any:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(importlib, "import_module", without)
    with pytest.raises(ConfigError, match=r"pip install 'ds-decoupled\[soap\]'"):
        client_from_json({"optimizer": {"type": "pytorch_optimizer.SOAP"}})


def test_parameters_that_an_optimizer_does_not_take() -> None:
    make = client_from_json({"optimizer": {"type": "torch.optim.NAdam", "params": {"speed": 3}}})
    assert make is not None
    with pytest.raises(ConfigError, match=r'"optimizer.params": .*speed.*torch.optim.NAdam does not take them'):
        make([torch.nn.Parameter(torch.zeros(2))])


@pytest.mark.parametrize("config", [{}, {"optimizer": {"type": "AdamW"}}, {"optimizer": {"type": "NAdam"}},
                                    {"optimizer": {"type": "muon"}, **ZERO}, {"optimizer": {"type": "SGD"}, **BF16}])
def test_what_deepspeed_knows_is_left_to_it(config: dict[str, Any]) -> None:
    assert client_from_json(config) is None


# -- Muon ------------------------------------------------------------------------------------------------------------------


def muon_halves(case: dict[str, Any]) -> dict[str, Any]:
    """Which half of Muon every parameter of this rank went to, and with which settings."""
    config = engine_cases.config_of(case)
    model = ds_decoupled.DecoupledPipelineModule(engine_cases.NETS["gpt"](), config=config, loss_fn=next_token_loss,
                                                 base_seed=1234)
    groups = [{"params": [p for p in model.parameters() if p.ndim > 1]},
              {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0}]
    engine, *_ = ds_decoupled.initialize(model=model, config=config, model_parameters=groups)
    names = {id(p): f"{stage}.{name}" for stage, layer in enumerate(engine.module.forward_funcs)
             for name, p in layer.named_parameters()}
    return {names[id(p)]: (group["use_muon"], group["lr"], group["weight_decay"]) for group in engine.optimizer.param_groups
            for p in group["params"]}


def test_muon_takes_the_matrices() -> None:
    """Embedding, head and norms go to the AdamW half; groups keep what they set."""
    [halves] = worlds.run(1, muon_halves, {**GPT, "method": "petra", "optimizer": MUON})
    assert len(halves) == 1 + 4 * 3 + 2
    for name, (muon, lr, decay) in halves.items():
        assert muon == (not any(part in name for part in ("embedding", "norm"))), name
        assert (lr, decay) == (2e-3 if muon else 1e-3, 0.0 if "norm" in name else 0.01)


@pytest.mark.parametrize("method", ["petra", "delayed"])
def test_muon_is_the_same_on_any_number_of_ranks(method: str) -> None:
    case = {**GPT, "method": method, "optimizer": MUON, "decay": 0.9}
    one, two = (engine_cases.merged(worlds.run(ranks, engine_cases.train, case)) for ranks in (1, 2))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_muon_resumes(tmp_path: Path) -> None:
    case = {**GPT, "method": "petra", "optimizer": MUON, "stop": 2, "decay": 0.9, "block": {"lr_by_delay": 4}}
    whole = engine_cases.merged(worlds.run(1, engine_cases.train, case))
    worlds.run(1, engine_cases.train_and_stop, case, str(tmp_path))
    resumed = engine_cases.merged(worlds.run(1, engine_cases.resume, case, str(tmp_path)))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


# -- learning rates by delay ----------------------------------------------------------------------------------------------


def test_damping_fades() -> None:
    assert [lr_divisor(16, updates, fade=4) for updates in range(6)] == [16, 8, 4, 2, 1, 1]
    assert lr_divisor(16, 0, fade=0) == 1  # off
    assert lr_divisor(0.25, 0, fade=4) == 1  # never faster than scheduled


def test_a_scheduler_finds_its_own_rates() -> None:
    parameter = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([{"params": [parameter], "lr": 0.5}], lr=0.1)
    with pytest.raises(RuntimeError, match="inside"), scaled_lr(optimizer.param_groups, 4.0):
        assert optimizer.param_groups[0]["lr"] == 0.125
        raise RuntimeError("inside")
    assert optimizer.param_groups[0]["lr"] == 0.5


class DampedOracle(Oracle):
    """PipeMare's T1 as it is defined: rate / tau^p, p = 1 - min(u/K, 1)."""

    fade = 1

    def _update_if_due(self, s: int) -> None:
        u = self._done[s] // self.k
        tau = max(1.0, sum(self.hops) * (len(self.stages) - 1 - s) / self.k)
        groups, scheduler = self.optimizers[s].param_groups, self.schedulers[s]
        scheduled = [group["lr"] for group in groups]

        def schedule() -> None:
            for group, lr in zip(groups, scheduled):
                group["lr"] = lr
            scheduler.step()

        for group, lr in zip(groups, scheduled):
            group["lr"] = lr / tau ** (1 - min(u / self.fade, 1))
        due = (self._done[s] + 1) % self.k == 0
        self.schedulers[s] = SimpleNamespace(step=schedule)  # it goes on from its own rates
        super()._update_if_due(s)
        self.schedulers[s] = scheduler
        if not due:
            for group, lr in zip(groups, scheduled):
                group["lr"] = lr


@pytest.mark.parametrize(("k", "hops"), [(1, [1, 1]), (3, [0, 1])])
def test_exact_rates(k: int, hops: list[int]) -> None:
    """With a schedule that goes on from the rate it finds."""
    def damp(oracle: Oracle) -> None:
        oracle.__class__ = DampedOracle
        oracle.fade = 6

    compare({"method": "petra", "k": k, "batches": 24, "decay": 0.9, "block": {"lr_by_delay": 6, "hops": hops}}, prepare=damp)


@pytest.mark.parametrize(("block", "words"), [
    ({"method": "petra", "lr_by_delay": -1}, ["-1", "0 (off)"]),
    ({"method": "petra", "lr_by_delay": 2.5}, ["2.5", "integer"]),
    ({"method": "reversible", "lr_by_delay": 10}, ["10", "no gradient comes late"]),
    ({"method": "backprop", "lr_by_delay": 10}, ["10", "no gradient comes late"]),
])
def test_bad_lr_by_delay(block: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        parse_block({"decoupled": block})
    assert error.value.setting == "decoupled.lr_by_delay"
    assert all(word in str(error.value) for word in words)


def test_shipped_configuration() -> None:
    config = json.loads((Path(__file__).parent.parent / "ds_configs" / "petra_lm.json").read_text())
    block = parse_block(config)
    assert block is not None and (block.method, block.stages, block.axes().hops) == ("petra", "blocks", (0, 1))
    assert config["optimizer"]["type"] == "Muon" and client_from_json(config) is None
