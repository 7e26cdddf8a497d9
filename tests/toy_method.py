"""A method that the package does not know, added by naming rows and classes of this file alone.

Each stage sends down the sign of a gradient in place of the gradient, and after every update mixes its weights into an average,
by an action kind of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import engine_cases
import torch
from torch import Tensor

from ds_decoupled.axes import PRESETS, Axes
from ds_decoupled.schedules import Action, Kind, global_gradient
from ds_decoupled.schedules.families import FAMILIES
from ds_decoupled.schedules.kinds import KINDS, add_kind
from ds_decoupled.schedules.outline import Outline
from ds_decoupled.stages import Outcome, Stage
from ds_decoupled.stages.building import STAGES
from ds_decoupled.watchers import Watcher

# An action: one row ...
AVERAGE = Kind("A", "AverageWeights", "mix the weights into their average", cost=0.5, colour="#123456", per_update=True)


# ... its place in the order ...
class SignFamily:
    """As a global gradient, with an average behind each update."""

    @staticmethod
    def compute(plan: Outline, rank: int, tick: int, micro_batches: int) -> Iterator[Action]:
        for action in global_gradient.compute(plan, rank, tick, micro_batches):
            yield action
            if action.kind is Kind.UPDATE:
                yield Action(action.stage, AVERAGE, action.micro_batch)

    sends_gradient = staticmethod(global_gradient.sends_gradient)
    gradient_kind = staticmethod(global_gradient.gradient_kind)


# ... and a stage with its handler.
class SignStage(Stage):
    """Sends signs down, and keeps an average of its weights."""

    handlers = {**Stage.handlers, AVERAGE: "on_average"}

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.average = [p.detach().clone() for p in self.parameters]

    def down(self, grads: Any, inputs: Any, loss: Tensor) -> Any:
        return super().down(None if grads is None else tuple(g if g is None else g.sign() for g in grads), inputs, loss)

    def on_average(self, update: int) -> Outcome:
        for average, parameter in zip(self.average, self.parameters):
            average.lerp_(parameter.detach(), 0.5)
        return Outcome()


def register() -> None:
    """Name all of it. A package would do so where it is imported; here other tests share the process."""
    add_kind(AVERAGE)
    PRESETS["sign"] = Axes("sign", "input", "current", "delayed", "stream", (0, 1))  # type: ignore[arg-type]
    FAMILIES["sign"] = SignFamily()
    STAGES["sign"] = SignStage


@contextmanager
def registered() -> Iterator[None]:
    """Within, the package knows the method."""
    register()
    try:
        yield
    finally:
        for table, name in ((KINDS, "A"), (PRESETS, "sign"), (FAMILIES, "sign"), (STAGES, "sign")):
            del table[name]  # type: ignore[attr-defined]


# A watcher, too.
class Counter(Watcher):
    """Counts actions by kind, over all ranks."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}

    def after(self, action: Action) -> None:
        self.counts[action.kind.letter] = self.counts.get(action.kind.letter, 0) + 1

    def report(self) -> dict[str, int]:
        return self.counts

    def merge(self, reports: list[dict[str, int]]) -> dict[str, Any]:
        letters = sorted({letter for counts in reports for letter in counts})
        return {"counts": {letter: sum(counts.get(letter, 0) for counts in reports) for letter in letters}}


def train(case: dict[str, Any]) -> dict[str, Any]:
    """Train and drain, watched, in a process of its own."""
    register()
    engine = engine_cases.build(case)
    engine.watch(Counter())
    initial = engine_cases.state_of(engine)
    data = engine_cases.data_of(case, engine)
    for _ in range(case["batches"] // case["k"]):
        engine.train_batch(data)
    engine.drain()
    summary = engine.decoupled_summary()
    return {"initial": initial, "state": engine_cases.state_of(engine), "replica": 0, "counts": summary["counts"],
            "layers": summary["stage_layers"], "averages": {s: stage.average for s, stage in engine.stages.items()}}


def by_definition(stages: list[torch.nn.Sequential], batches: list[tuple[Tensor, Tensor]], k: int) -> list[list[Tensor]]:
    """The same in a plain loop of ticks; returns the averages."""
    optimizers = [torch.optim.SGD(stage.parameters(), lr=0.1, momentum=0.9) for stage in stages]
    averages = [[p.detach().clone() for p in stage.parameters()] for stage in stages]
    inputs: dict[tuple[int, int], Tensor] = {}
    grads: dict[tuple[int, int], Tensor] = {}
    top = len(stages) - 1

    def back(s: int, m: int, outputs: Tensor, gradient: Tensor | None, x: Tensor) -> None:
        outputs.backward(gradient)
        if s:
            grads[s - 1, m] = x.grad.sign()  # type: ignore[union-attr]
        if (m + 1) % k == 0:
            optimizers[s].step()
            optimizers[s].zero_grad()
            for average, parameter in zip(averages[s], stages[s].parameters()):
                average.lerp_(parameter.detach(), 0.5)

    for tick in range(len(batches) + top):
        if tick < len(batches):
            x, labels = batches[tick]
            for s in range(top):
                inputs[s, tick] = x
                with torch.no_grad():
                    x = stages[s](x.clone())
            x = x.detach().requires_grad_()
            back(top, tick, torch.nn.functional.cross_entropy(stages[top](x), labels) * (1 / k), None, x)
        for s in range(top):
            m = tick - (top - s)
            if 0 <= m < len(batches):
                x = inputs.pop((s, m)).detach().requires_grad_(s > 0)
                back(s, m, stages[s](x.clone()), grads.pop((s, m)), x)
    return averages
