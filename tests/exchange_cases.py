"""What the ranks of a world of replicas do in the tests, whose threads run free."""

from __future__ import annotations

import os
import signal
import threading
import time
from itertools import cycle, islice
from typing import Any

import engine_cases
import torch
from deepspeed.pipe import LayerSpec
from nets import NETS, batches
from threaded_cases import numbered, weighted
from torch import nn
from torch.nn.functional import cross_entropy

import ds_decoupled
from ds_decoupled.errors import LinkError


def build(case: dict[str, Any]) -> Any:
    return engine_cases.build({"method": "pd_asgd", "net": "reversible", "stages": 7, "pipe_ranks": 1, **case})


def adding(exchange: Any, threads: dict[str, Any], net: str = "adding", k: int = 1, method: str = "pd_asgd") -> Any:
    """An engine for nets that add up their gradients, at a rate of 1."""
    config = engine_cases.config_of({"method": method, "size": 1, "k": k, "block": {"threads": threads, "exchange": exchange},
                                     "optimizer": {"type": "SGD", "params": {"lr": 1.0}}})
    model = ds_decoupled.DecoupledPipelineModule(NETS[net](), num_stages=1, config=config, loss_fn=weighted)
    engine, *_ = ds_decoupled.initialize(model=model, config=config, model_parameters=list(model.parameters()))
    return engine


def shifts(engine: Any) -> list[torch.Tensor]:
    return [layer.shift.detach().double().clone() for layer in engine.module.forward_funcs]


def count_updates(exchange: Any, threads: dict[str, Any], counts: list[int], k: int = 1, method: str = "pd_asgd") -> Any:
    """Sums of all gradients while replicas go as fast as they can, each with micro-batches of its own number; before the drain
    and after it."""
    engine = adding(exchange, threads, k=k, method=method)
    count = counts[engine.network.replica]
    data, sums = numbered(count), []
    for call in range(count // k):
        engine.train_batch(data)
        if call % 50 == 49 and engine.network.replica == 0:
            time.sleep(0.002)
    engine.runner.pause()
    before = shifts(engine)
    engine.drain()
    for own, mean in zip(before, shifts(engine)):
        sums.append((own.tolist(), mean.tolist()))
    return {"sums": sums, "summary": engine.decoupled_summary(), "told": engine.runner.told(),
            "running": [t.name for t in threading.enumerate() if t.name.startswith(("forward ", "backward ", "gradients"))]}


def lock_step(case: dict[str, Any]) -> dict[str, Any]:
    """Nothing in flight after every call; and the same, written out for all replicas, whose gradients are averaged."""
    engine = build(case)
    initial, replica = engine_cases.state_of(engine), engine.network.replica
    data = engine_cases.data_of(case, engine)
    for _ in range(case["batches"]):
        engine.train_batch(data)
        engine.runner.pause()
    bounds = engine.decoupled_summary()["stage_layers"]
    replicas = [batches(case["batches"], 4, replica=r, replicas=2) for r in range(2)]
    models = [nn.Sequential(*engine_cases.stages_from(initial, {"net": "reversible", **case}, bounds)) for _ in range(2)]
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9) for model in models]
    for step in range(case["batches"]):
        for model, optimizer, own in zip(models, optimizers, replicas):
            optimizer.zero_grad()
            cross_entropy(model(own[step][0]), own[step][1]).backward()
        for a, b in zip(*(model.parameters() for model in models)):
            a.grad = b.grad = (a.grad + b.grad) / 2
        for optimizer in optimizers:
            optimizer.step()
    return {"state": engine_cases.state_of(engine),
            "expected": {f"{index}.{n}": value for index, layer in
                         zip([i for stage in bounds for i in stage], [part for stage in models[replica] for part in stage])
                         for n, value in layer.named_parameters()},
            "counts": engine.decoupled_summary()["exchange"]}


def in_the_middle(case: dict[str, Any], folder: str) -> dict[str, Any]:
    """Evaluation, a checkpoint, a drain; then resume, in the same engine and in a new one; each replica's data end."""
    engine = build(case)
    replica, k = engine.network.replica, case.get("k", 1)
    data, values = cycle(batches(8, replica=replica, replicas=2)), []
    for _ in range(2):
        for _ in range(5):
            engine.train_batch(data)
        values.append(engine.eval_batch(iter(batches(2, seed=99)), num_micro_batches=2).item())
    engine.train_batch(data)
    engine.save_checkpoint(folder)
    saved = engine_cases.state_of(engine)
    for _ in range(3):
        engine.train_batch(data)
    engine.load_checkpoint(folder)
    loaded = engine_cases.state_of(engine)
    other = build({**case, "seed": 5})
    other.load_checkpoint(folder)
    resumed = engine_cases.state_of(other)
    counts = [stage.updates for stage in other.stage_optimizers.values()]
    third = build({**case, "seed": 6})
    third.load_checkpoint(folder, load_module_only=True)
    written = engine_cases.state_of(third)
    calls, told, few = 0, "", islice(cycle(batches(8)), (4 + 3 * replica) * k)
    while not told:
        try:
            other.train_batch(few)
            calls += 1
        except StopIteration as end:
            told = str(end)
    other.drain()
    first = engine_cases.state_of(other)
    other.train_batch(cycle(batches(8)))
    other.drain()
    return {"values": values, "saved": saved, "loaded": loaded, "resumed": resumed, "counts": counts, "written": written,
            "calls": calls, "told": told, "drained": first, "after": engine_cases.state_of(other),
            "updates": [stage.updates for stage in other.stage_optimizers.values()]}


def interrupted(exchange: Any) -> dict[str, Any]:
    """Ctrl-C on both replicas, at two moments: what was fed is done, and training can go on."""
    engine = adding(exchange, {"backward": 1}, net="slow")
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    # A signal, as Ctrl-C sends one: interrupt_main() would not wake a thread that waits for a lock.
    timer = threading.Timer(0.2 + 0.05 * engine.network.replica, signal.pthread_kill,
                            (threading.main_thread().ident, signal.SIGINT))
    told, data = "", numbered(1000)
    timer.start()
    try:
        for _ in range(1000):
            engine.train_batch(data)
    except KeyboardInterrupt:
        told = "interrupted"
    signal.signal(signal.SIGINT, handler)
    engine.drain()
    fed = engine.runner.next_micro_batch
    state = shifts(engine)
    engine.train_batch(numbered(1))
    engine.drain()
    return {"told": told, "fed": fed, "sums": [shift.tolist() for shift in state],
            "after": [shift.tolist() for shift in shifts(engine)]}


def breaks(exchange: Any) -> str:
    """A layer of replica 1 raises in a thread; what each replica's call says."""
    engine = adding(exchange, {"backward": 2}, net="fragile")
    bad = engine.network.replica == 1
    data = cycle([(torch.full((1, 8), 7.0 if bad and m == 5 else 0.0), torch.ones(1, 8)) for m in range(6)])
    try:
        for _ in range(100_000):
            engine.train_batch(data)
    except (ValueError, LinkError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def waits_for_one_that_breaks(exchange: Any) -> str:
    """The same, where replica 0 waits in a drain."""
    engine = adding(exchange, {"backward": 2}, net="fragile")
    bad = engine.network.replica == 1
    try:
        for m in range(3):
            engine.train_batch(iter([(torch.full((1, 8), 7.0 if bad and m == 2 else 0.0), torch.ones(1, 8))]))
            time.sleep(0.5 * bad)
        engine.drain()
    except (ValueError, LinkError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def killed(exchange: Any) -> str:
    """Replica 1 is gone without a word."""
    engine = adding(exchange, {"backward": 2})
    data = numbered(1_000_000)
    try:
        for m in range(1_000_000):
            engine.train_batch(data)
            if m == 5 and engine.network.replica == 1:
                os._exit(1)
    except LinkError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def leaves_early(exchange: Any) -> dict[str, Any]:
    """Replica 1 is done after three calls and leaves; the other goes on."""
    engine = adding(exchange, {"backward": 2})
    data = numbered(1000)
    for _ in range(3):
        engine.train_batch(data)
    if engine.network.replica == 1:
        engine.network.leave()
        return {}
    while engine.network.there:
        time.sleep(0.01)
    for _ in range(30):
        engine.train_batch(data)
    engine.runner.crew.finish()
    told = ""
    try:
        engine.drain()
    except LinkError as error:
        told = str(error)
    return {"told": told, "counts": engine.runner.exchange.report(), "updates": engine.stage_optimizers[0].updates}


def lapsgd() -> dict[str, Any]:
    """The preset."""
    # A small rate: workers' updates are stale, and more so on a busy machine.
    engine = build({"method": "lapsgd", "stages": 1, "lr": 0.005, "block": {"threads": {"lock": "none"}}})
    data = cycle(batches(8, replica=engine.network.replica, replicas=2))
    initial = engine_cases.state_of(engine)
    losses = [engine.train_batch(data).item() for _ in range(40)]
    engine.drain()
    return {"initial": initial, "state": engine_cases.state_of(engine), "losses": losses, "summary": engine.decoupled_summary()}


def refusals(cases: list[dict[str, Any]]) -> list[str]:
    """What building each engine says."""
    found = []
    for case in cases:
        try:
            build(case)
            found.append("nothing")
        except ds_decoupled.ConfigError as error:
            found.append(str(error))
    return found


def many(jobs: list[tuple[str, list[Any]]]) -> list[Any]:
    """One after the other, in the same processes."""
    return [globals()[name](*args) for name, args in jobs]


NETS["sparse"] = lambda: [LayerSpec(nn.Embedding, 8, 4, sparse=True), LayerSpec(nn.Linear, 4, 2)]
