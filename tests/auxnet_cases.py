"""What ranks do in ``test_auxnet.py``."""

from __future__ import annotations

import copy
import time
from typing import Any

import engine_cases
import torch
from nets import CLASSES, batches
from torch import Tensor, nn

from ds_decoupled.tensors import as_tuple
from ds_decoupled.watchers import Watcher


def steps_of(engine: Any) -> dict[int, tuple[nn.Module, nn.Module | None]]:
    """Copies of the AuxNet's steps of this rank's stages, and of what predicts multipliers."""
    return {s: (copy.deepcopy(stage.step), copy.deepcopy(stage.adjoint)) for s, stage in engine.stages.items()
            if stage.step is not None}


def train(case: dict[str, Any]) -> dict[str, Any]:
    """As in ``engine_cases``, with the steps before and after."""
    engine = engine_cases.build(case)
    initial, steps = engine_cases.state_of(engine), steps_of(engine)
    data = engine_cases.data_of(case, engine)
    losses = [engine.train_batch(data).item() for _ in range(case["batches"] // case.get("k", 1))]
    engine.drain()
    return {"initial": initial, "initial_steps": steps, "state": engine_cases.state_of(engine), "steps": steps_of(engine),
            "losses": losses, "summary": engine.decoupled_summary(), "metrics": engine.stage_metrics(), "replica": 0}


def train_all(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One after the other, in the same processes."""
    return [train(case) for case in cases]


class Grads(Watcher):
    """Every micro-batch's gradients by stage, as a stage leaves them."""

    def __init__(self, stages: Any) -> None:
        self.stages = stages
        self.found: dict[int, list[Tensor]] = {}

    def acted(self, action: Any, outcome: Any) -> None:
        if outcome.complete:
            self.found[action.stage] = [p.grad.clone() for p in self.stages[action.stage].trainable]


def with_exact_inputs(case: dict[str, Any]) -> dict[str, list[Tensor]]:
    """The gradients of a micro-batch where every step is a copy of its stage's own layers, and backpropagation's."""
    engine = engine_cases.build(case)
    for stage in engine.stages.values():
        if stage.step is not None:
            stage.step = nn.Sequential(*copy.deepcopy(list(stage.layers)))
    whole = nn.Sequential(*copy.deepcopy([layer for stage in engine.stages.values() for layer in stage.layers])).train()
    seen = Grads(engine.stages)
    engine.watch(seen)
    x, y = batches(1)[0]
    engine.train_batch(iter([(x, y)]))
    engine.drain()
    nn.functional.cross_entropy(whole(x.clone()), y).backward()
    return {"used": [g for s in sorted(seen.found) for g in seen.found[s]], "exact": [p.grad for p in whole.parameters()],
            "counts": [torch.tensor(len(seen.found[s])) for s in sorted(seen.found)]}


def all_exact(cases: list[dict[str, Any]]) -> list[dict[str, list[Tensor]]]:
    return [with_exact_inputs(case) for case in cases]


def evaluate(case: dict[str, Any]) -> dict[str, Any]:
    """After some training: the serial network's logits in evaluation, and those from each stage on; beside the same by hand."""
    engine = engine_cases.build(case)
    data = engine_cases.data_of(case, engine)
    for _ in range(case["batches"] - 1):
        engine.train_batch(data)
    test = batches(1, seed=99)

    def ask(stage: int) -> Any:
        given = iter(test) if engine.is_first_stage() else None
        return engine.eval_batch(given, return_logits=True, num_micro_batches=1, from_stage=stage)[1]

    logits = [ask(stage) for stage in range(engine.placement.stages)]
    engine.train_batch(data)  # it goes on
    errors = []
    for stage in (-1, engine.placement.stages):
        try:
            ask(stage)
        except ValueError as error:
            errors.append(str(error))
    return {"logits": logits, "layers": {s: copy.deepcopy(list(stage.layers)) for s, stage in engine.stages.items()},
            "steps": steps_of(engine), "errors": errors, "replica": 0}


class LabelPeek(nn.Module):
    """A step of the user's own: a picture of another number of channels, by one convolution."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


def one_convolution(inputs: Any, outputs: Any) -> nn.Module:
    """``auxnet_cases:one_convolution``."""
    return LabelPeek(as_tuple(inputs)[0].shape[1], as_tuple(outputs)[0].shape[1])


def wrong_shape(inputs: Any, outputs: Any) -> nn.Module:
    """``auxnet_cases:wrong_shape``."""
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(CLASSES))


def told(cases: list[dict[str, Any]]) -> list[str]:
    """The first line of what each case is refused with."""
    from settings_cases import told as one

    return [one(case, {}) for case in cases]


def statistics(case: dict[str, Any]) -> dict[str, Any]:
    """The layers after some training, and the logits of the evaluation that follows."""
    engine = engine_cases.build(case)
    data = engine_cases.data_of(case, engine)
    for _ in range(case["batches"]):
        engine.train_batch(data)
    layers = copy.deepcopy([layer for stage in engine.stages.values() for layer in stage.layers])
    trained = layers[1].norm.running_mean.clone()
    _, logits = engine.eval_batch(iter(batches(1, seed=99)), return_logits=True, num_micro_batches=1)
    return {"layers": layers, "logits": logits, "trained": trained}


class Times(Watcher):
    """When each forward and backward pass of this rank began and ended."""

    def __init__(self) -> None:
        self.found: list[tuple[float, float]] = []
        self._start = 0.0

    def before(self, action: Any) -> None:
        self._start = time.time()

    def after(self, action: Any) -> None:
        if action.kind.begins:
            self.found.append((self._start, time.time()))


def times(case: dict[str, Any]) -> list[tuple[float, float]]:
    """Of every micro-batch, with layers that take 50 ms a stage each way."""
    engine = engine_cases.build(case)
    for stage in engine.stages.values():
        stage.layers[0].register_forward_hook(lambda layer, given, made: time.sleep(0.05))
        stage.layers[-1].register_full_backward_hook(lambda layer, given, made: time.sleep(0.05))
    seen = Times()
    engine.watch(seen)
    data = engine_cases.data_of(case, engine)
    for _ in range(case["batches"]):
        engine.train_batch(data)
    engine.drain()
    return seen.found
