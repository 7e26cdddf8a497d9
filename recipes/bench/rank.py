"""What one process of a benchmark's world does: build, warm up, then time itself whenever it is told to.

Between two timings it sleeps in a pipe's read and costs nothing, so that many worlds can take turns.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn

from bench.held import watch_activations
from bench.models import Model
from bench.plan import Configuration
from bench.runner import Runner, build
from ds_decoupled.nn.blocks import block_starts
from ds_decoupled.profile import layer_times
from ds_decoupled.stages.heads import WholeModel, make_head
from ds_decoupled.tensors import Form, Tensors
from run.results import peak_memory_bytes
from run.worlds import Parent


class Meter:
    """Seconds waited for messages and bytes sent, below every engine alike: all of torch.distributed passes here."""

    def __init__(self) -> None:
        self.reset()
        wait, send = dist.Work.wait, dist.ProcessGroup.send

        def timed_wait(work: Any, *args: Any, **kwargs: Any) -> Any:
            if threading.current_thread() is not threading.main_thread():
                return wait(work, *args, **kwargs)  # a link's thread, which lets buffers go: nobody is idle meanwhile
            start = time.perf_counter()
            try:
                return wait(work, *args, **kwargs)
            finally:
                self.waited += time.perf_counter() - start

        def counted_send(group: Any, tensors: list[Tensor], *args: Any, **kwargs: Any) -> Any:
            self.bytes_sent += sum(t.nbytes for t in tensors)
            return send(group, tensors, *args, **kwargs)

        dist.Work.wait, dist.ProcessGroup.send = timed_wait, counted_send  # type: ignore[method-assign, assignment]

    def reset(self) -> None:
        self.waited = 0.0
        self.bytes_sent = 0


def time_calls(runner: Runner, meter: Meter, calls: int) -> dict[str, float]:
    """Run so many calls from a common start; when they began and ended (one clock for all processes), and the counters."""
    runner.pause()
    if dist.is_initialized():
        dist.barrier()
    meter.reset()
    start, cpu = time.perf_counter(), time.process_time()
    for _ in range(calls):
        runner.call()
    runner.pause()  # threads have the last micro-batches still before them
    end = time.perf_counter()
    return {"start": start, "end": end, "cpu": time.process_time() - cpu, "waited": meter.waited,
            "bytes_sent": float(meter.bytes_sent)}


def serve(parent: Parent, configuration: Configuration, model: Model, bounds: list[int]) -> None:
    """Build, warm up, report, and then obey: ``("time", calls)``, ``("watch", calls)``."""
    meter = Meter()
    before = peak_memory_bytes()
    runner = build(configuration, model, bounds)
    for _ in range(runner.warm_up):
        runner.call()
    parent.tell("ready")
    while True:
        command, calls = parent.told()
        if command == "time":
            parent.tell(time_calls(runner, meter, calls))
        else:
            report: dict[str, Any] = {"peak_memory_bytes": peak_memory_bytes() - before}
            if runner.ours:
                report |= watch_activations(runner, max(calls, runner.warm_up))
                summary = runner.engine.decoupled_summary()
                report |= {name: summary[name] for name in ("threads", "staleness") if name in summary}
                report["delays"] = [runner.engine.plan.ticks.delay(s) for s in runner.engine.stages]
            parent.tell(report)


def profile(parent: Parent, model: Model) -> dict[str, list[float]]:
    """Measured seconds of every layer, by what ``Method.cost`` names, as ``"partition": "profile"`` measures them."""
    deepspeed.init_distributed(dist_backend="gloo")
    sample, _ = next(model.batches())
    specs = model.specs()

    bounds = [*block_starts(specs), len(specs)]

    def head(stage: int, given: Tensors, outputs: int, forms: Sequence[Form]) -> nn.Module:
        return make_head(None, given, outputs, 0, stage, None, torch.device("cpu"), WholeModel(specs, bounds, forms))

    times = layer_times(specs, sample, head, bounds[1:-1])
    last = len(times) - 1  # the last layer's stage goes forward and back at once
    alone = [t._replace(head=0.0) for t in times]
    costs = {cost: [t.cost(cost != "graph" and i < last) for i, t in enumerate(alone)]
             for cost in ("graph", "input", "reconstruct")}
    return {**costs, "local": [t.cost(False) for t in times]}
