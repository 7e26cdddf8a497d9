"""What ranks run with a ``loss_fn`` that has parameters."""

from __future__ import annotations

from typing import Any

import torch
from engine_cases import config_of, data_of, state_of
from nets import NETS, batches
from torch import Tensor, nn

import ds_decoupled


class LearnedLoss(nn.Module):
    """Cross entropy of logits with a learned temperature, beside learned class centres; counts its calls by mode."""

    calls: Tensor

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.tensor([1.5]))
        self.centres = nn.Parameter(torch.linspace(-1, 1, classes))
        self.register_buffer("calls", torch.zeros(2, dtype=torch.long))

    def forward(self, outputs: Tensor, labels: Tensor) -> Tensor:
        self.calls[int(self.training)] += 1
        return nn.functional.cross_entropy(outputs.float() * self.temperature.float() + self.centres.float(), labels)


def make(case: dict[str, Any], shared: bool = False) -> Any:
    """The engine; ``shared``: the loss uses a parameter of the first layer."""
    config = config_of({"net": "norm_free", **case})
    layers = NETS["norm_free"]()
    loss_fn = LearnedLoss()
    if shared:
        layers[0] = layers[0].build()
        loss_fn.extra = nn.ParameterList([next(layers[0].parameters())])
    model = ds_decoupled.DecoupledPipelineModule(layers, config=config, loss_fn=loss_fn, base_seed=1234)
    engine, *_ = ds_decoupled.initialize(model=model, config=config, model_parameters=list(model.parameters()))
    return engine


def loss_state(engine: Any) -> dict[str, Tensor]:
    """The loss's parameters where the last stage is, and those of the stages' own copies."""
    state = {}
    if engine.is_last_stage():
        state = {f"last.{name}": value.detach().clone() for name, value in engine.module.loss_fn.named_parameters()}
    for index, stage in getattr(engine, "stages", {}).items():
        if getattr(stage, "own_loss", None) is not None:
            state.update({f"{index}.{name}": value.detach().clone() for name, value in stage.own_loss.named_parameters()})
    return state


def learn(case: dict[str, Any], folder: str = "") -> dict[str, Any]:
    """Train, save on the way if asked, drain."""
    engine = make(case)
    data = data_of({**case, "net": "norm_free"}, engine)
    start = loss_state(engine)
    for call in range(case["batches"] // case.get("k", 1)):
        if folder and call == case.get("stop"):
            engine.save_checkpoint(folder)
        engine.train_batch(data)
    engine.drain()
    state = {**state_of(engine), **loss_state(engine)}
    held = engine.module.loss_fn
    trained, evaluated = int(held.calls[1]), int(held.calls[0])
    engine.eval_batch(iter(batches(1)), num_micro_batches=1)
    modes = int(held.calls[1]) - trained, int(held.calls[0]) - evaluated
    return {"start": start, "state": state, "modes": modes, "last": engine.is_last_stage(), "replica": 0}


def learn_many(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Several cases, one after the other."""
    return [learn(case) for case in cases]


def go_on(case: dict[str, Any], folder: str) -> dict[str, Any]:
    """Resume; and, in another engine, the weights alone."""
    engine = make(case)
    engine.load_checkpoint(folder)
    data = data_of({**case, "net": "norm_free"}, engine)
    for _ in range(case["stop"] * case["k"] if data else 0):
        next(data)
    loaded = loss_state(engine)
    for _ in range(case["batches"] // case["k"] - case["stop"]):
        engine.train_batch(data)
    engine.drain()
    other = make(case)
    other.load_checkpoint(folder, load_module_only=True)
    return {"state": {**state_of(engine), **loss_state(engine)}, "loaded": loaded, "alone": loss_state(other), "replica": 0}


def share(case: dict[str, Any]) -> None:
    make(case, shared=True)
