"""What the rank of a world of threads does in the tests."""

from __future__ import annotations

import _thread
import signal
import tempfile
import threading
import traceback
from collections import Counter
from itertools import cycle, islice
from typing import Any

import engine_cases
import torch
from deepspeed.pipe import LayerSpec
from layerwise_cases import refused
from nets import NETS, batches
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import ds_decoupled
from ds_decoupled.nn import mark_block
from ds_decoupled.schedules import Action
from ds_decoupled.stages import Outcome
from ds_decoupled.watchers import Watcher


class Adds(nn.Module):
    """Its gradient does not depend on weights: what it has added up tells which micro-batches it has learned from."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(width))
        self.unused = nn.Parameter(torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.shift


class Boom(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        raise ValueError("a layer broke on its way back")


class Fragile(nn.Module):
    """Breaks at an input of 7 forward, at one of 9 back."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        if (x == 7).any():
            raise ValueError("a layer broke")
        return Boom.apply(x + self.shift) if (x == 9).any() else x + self.shift


NETS["adding"] = lambda width=8: [mark_block(LayerSpec(Adds, width)) for _ in range(4)]
NETS["fragile"] = lambda: [mark_block(LayerSpec(Fragile)), *(mark_block(LayerSpec(Adds, 8)) for _ in range(2))]


def weighted(outputs: Tensor, labels: Tensor) -> Tensor:
    return (outputs * labels).sum()


def adding(threads: dict[str, Any], net: str = "adding", k: int = 1, layers: dict[str, Any] | None = None) -> Any:
    """An engine for nets that add up their gradients, at a rate of 1."""
    case = {"method": "pd_asgd", "net": net, "size": 1, "k": k, "block": {"threads": threads},
            "optimizer": {"type": "SGD", "params": {"lr": 1.0}}}
    config = engine_cases.config_of(case)
    model = ds_decoupled.DecoupledPipelineModule(NETS[net](**(layers or {})), config=config, loss_fn=weighted)
    engine, *_ = ds_decoupled.initialize(model=model, config=config, model_parameters=list(model.parameters()))
    return engine


def numbered(count: int, first: int = 0, width: int = 8) -> Any:
    """Micro-batch m has the gradient m + 1, in every layer."""
    return iter([(torch.zeros(1, width), torch.full((1, width), float(m + 1))) for m in range(first, first + count)])


class Told(Watcher):
    """Counts what it is told, by action kind."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def before(self, action: Action) -> None:
        self.counts[f"before {action.kind.letter}"] += 1

    def acted(self, action: Action, outcome: Outcome) -> None:
        self.counts[f"acted {action.kind.letter}"] += 1

    def after(self, action: Action) -> None:
        self.counts[f"after {action.kind.letter}"] += 1


def watched(threads: dict[str, Any], count: int) -> dict[str, int]:
    engine, told = adding(threads), Told()
    engine.watch(told)
    data = numbered(count)
    for _ in range(count):
        engine.train_batch(data)
    engine.drain()
    return dict(told.counts)


def count_updates(threads: dict[str, Any], count: int, k: int = 1, width: int = 8) -> dict[str, Any]:
    """Each layer's sum of all gradients, by value."""
    engine = adding(threads, k=k, layers={"width": width})
    data = numbered(count, width=width)
    for _ in range(count // k):
        engine.train_batch(data)
    before = engine.in_flight
    engine.drain()
    sums = [p.detach().tolist() for layer in engine.module.forward_funcs for name, p in layer.named_parameters()
            if name == "shift"]
    return {"sums": sums, "summary": engine.decoupled_summary(), "before": before, "running": running()}


def running() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith(("forward ", "backward "))]


def lock_step(case: dict[str, Any]) -> dict[str, Any]:
    """A drain after every call; and plain SGD, written out."""
    engine = engine_cases.build(case)
    initial = engine_cases.state_of(engine)
    data, losses = engine_cases.data_of(case, engine), []
    for _ in range(case["batches"]):
        told = engine.train_batch(data)
        drained = engine.drain()
        losses.append((drained if told.isnan() else told).item())
    bounds = engine.decoupled_summary()["stage_layers"]
    model = nn.Sequential(*engine_cases.stages_from(initial, case, bounds))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    plain = []
    for x, y in batches(case["batches"], 4):
        loss = cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        plain.append(loss.item())
    return {"losses": losses, "plain": plain, "state": engine_cases.state_of(engine),
            "expected": {f"{index}.{n}": value for index, layer in
                         zip([i for stage in bounds for i in stage], [part for stage in model for part in stage])
                         for n, value in layer.state_dict().items()},
            "summary": engine.decoupled_summary()}


def in_the_middle(case: dict[str, Any], folder: str) -> dict[str, Any]:
    """Evaluation, a checkpoint, a drain; then resume, in the same engine and in a new one; the data end."""
    engine = engine_cases.build(case)
    data, k = cycle(batches(8)), case.get("k", 1)
    values = []
    for _ in range(3):
        for _ in range(4):
            engine.train_batch(data)
        values.append(engine.eval_batch(iter(batches(2, seed=99)), num_micro_batches=2).item())
        at_rest = engine.in_flight
    engine.train_batch(data)
    engine.save_checkpoint(folder)
    saved = engine_cases.state_of(engine)
    expected = engine.eval_batch(iter(batches(2, seed=99)), num_micro_batches=2).item()
    for _ in range(4):
        engine.train_batch(data)
    engine.load_checkpoint(folder)
    loaded = engine_cases.state_of(engine)
    again = engine.eval_batch(iter(batches(2, seed=99)), num_micro_batches=2).item()
    other = engine_cases.build({**case, "seed": 5})
    other.load_checkpoint(folder)
    third = other.eval_batch(iter(batches(2, seed=99)), num_micro_batches=2).item()
    counts = [stage.updates for stage in other.stage_optimizers.values()]
    calls, told, few = 0, "", islice(cycle(batches(8)), 5 * k)
    while not told:
        try:
            other.train_batch(few)
            calls += 1
        except StopIteration as end:
            told = str(end)
    other.drain()
    lrs = [stage.optimizer.param_groups[0]["lr"] for stage in other.stage_optimizers.values()]
    tracked = {int(value) for name, value in engine_cases.state_of(other).items() if name.endswith("num_batches_tracked")}
    after = [stage.updates for stage in other.stage_optimizers.values()]
    other.train_batch(cycle(batches(8)))
    other.drain()
    return {"values": values, "at_rest": at_rest, "expected": expected, "again": again, "third": third, "counts": counts,
            "same": all(torch.equal(saved[name], loaded[name]) for name in saved), "calls": calls, "told": told, "lrs": lrs,
            "tracked": tracked, "after": after, "summary": other.decoupled_summary()}


def breaks(at: float) -> dict[str, Any]:
    """A layer raises in a thread; then a checkpoint of before is loaded, and training goes on."""
    engine = adding({"backward": 2, "queue": 1}, net="fragile")
    with tempfile.TemporaryDirectory() as folder:
        engine.train_batch(numbered(1))
        engine.drain()
        engine.save_checkpoint(folder)
        inputs = [(torch.full((1, 8), at if m == 5 else 0.0), torch.ones(1, 8)) for m in range(40)]
        data, told, words = iter(inputs), "", ""
        try:
            for _ in range(40):
                engine.train_batch(data)
            engine.drain()
        except ValueError as error:
            told, words = str(error), "".join(traceback.format_exception(error))
        second = ""
        try:
            engine.train_batch(iter(inputs[:1]))
        except ValueError as error:
            second = str(error)
        ended = running()
        engine.load_checkpoint(folder)
    for _ in range(3):
        engine.train_batch(numbered(1, first=2))
    engine.drain()
    shift = engine.module.forward_funcs[1].shift.detach().tolist()
    return {"told": told, "words": words, "second": second, "ended": ended, "shift": shift}


class Slow(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        threading.Event().wait(0.02)
        return x + self.shift


NETS["slow"] = lambda: [mark_block(LayerSpec(Slow)), mark_block(LayerSpec(Adds, 8))]


def interrupted() -> dict[str, Any]:
    """Ctrl-C while calls wait for the threads: what was fed is done, and training can go on."""
    engine = adding({"backward": 1}, net="slow")
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    timer = threading.Timer(0.3, _thread.interrupt_main)
    told = ""
    timer.start()
    data, calls = numbered(1000), 0
    try:
        for _ in range(1000):
            engine.train_batch(data)
            calls += 1
    except KeyboardInterrupt:
        told = "interrupted"
    signal.signal(signal.SIGINT, handler)
    engine.drain()
    fed = engine.runner.next_micro_batch
    return {"told": told, "calls": calls, "fed": fed, "running": running(),
            "sums": [layer.shift.detach().tolist() for layer in engine.module.forward_funcs]}


def trains(case: dict[str, Any]) -> dict[str, Any]:
    """Some calls, and what came of them."""
    engine = engine_cases.build(case)
    initial = engine_cases.state_of(engine)
    data = engine_cases.data_of(case, engine)
    losses = [engine.train_batch(data).item() for _ in range(case["batches"] // case.get("k", 1))]
    losses.append(engine.drain().item())
    return {"initial": initial, "state": engine_cases.state_of(engine), "losses": losses,
            "summary": engine.decoupled_summary()}


def refusals(cases: list[dict[str, Any]]) -> list[str]:
    """What building each engine says."""
    return [refused(case) for case in cases]


def many(jobs: list[tuple[str, list[Any]]]) -> list[Any]:
    """One after the other, in the same process."""
    return [globals()[name](*args) for name, args in jobs]
