"""What one process of a benchmark's world does: build, warm up, then time itself whenever it is told to.

Between two timings it sleeps in a pipe's read and costs nothing, so that many worlds can take turns.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import resource
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from bench_bare import backprop_loop, petra_loop
from bench_models import Model
from bench_plan import METHODS, Configuration
from deepspeed.pipe import LayerSpec
from deepspeed.runtime.activation_checkpointing.checkpointing import non_reentrant_checkpoint
from deepspeed.runtime.pipe.dualpipev import DualPipeVModule
from torch import Tensor, nn

import ds_decoupled
from ds_decoupled.nn.blocks import block_starts
from ds_decoupled.profile import layer_times
from ds_decoupled.stages.heads import make_head
from ds_decoupled.tensors import Tensors

SGD: dict[str, Any] = {"lr": 1e-5, "momentum": 0.9, "nesterov": True, "weight_decay": 5e-4, "fused": True}
"""The update costs what it costs in training; so small a rate keeps random labels from leading anywhere."""


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


class Chain(nn.Module):
    """Several layers as one, so that DeepSpeed's uniform partition cuts where it is told."""

    def __init__(self, specs: list[LayerSpec]) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(spec.build() for spec in specs))

    def forward(self, x: Any) -> Any:
        return self.layers(x)


class Bordered(nn.Module):
    """A layer at a rank's border, between which one tensor travels: both streams of a reversible model, stacked.

    DeepSpeed's backward runs once for every tensor of a tuple, each time through the rank's whole graph; so two streams would
    cost its pipelines two backwards, and the comparison would be unfair to it.
    """

    def __init__(self, spec: LayerSpec, splits: bool, joins: bool) -> None:
        super().__init__()
        self.layer, self.splits, self.joins = spec.build(), splits, joins

    def forward(self, x: Any) -> Any:
        if self.splits:
            x = tuple(x.unbind())
        y = self.layer(x)
        return torch.stack(y) if self.joins else y


def one_tensor_borders(model: Model, bounds: list[int]) -> list[LayerSpec]:
    """The model's layers, with :class:`Bordered` ones on both sides of every inner bound where two streams cross it."""
    specs = model.specs()
    inner = bounds[1:-1] if model.streams else []
    return [LayerSpec(Bordered, spec, i in inner, i + 1 in inner) if i in inner or i + 1 in inner else spec
            for i, spec in enumerate(specs)]


@dataclass
class Runner:
    """A method, ready to run.

    Attributes:
        call: k micro-batches, as ``train_batch`` does.
        warm_up: calls until the pipeline is full and everything has been allocated.
        engine: ours or DeepSpeed's; None for a bare loop.
    """

    call: Callable[[], Any]
    warm_up: int = 2
    engine: Any = None

    @property
    def ours(self) -> bool:
        return isinstance(self.engine, ds_decoupled.DecoupledPipelineEngine)


def build(configuration: Configuration, model: Model, bounds: list[int], *, block: Mapping[str, Any] | None = None,
          optimizer: Mapping[str, Any] = SGD, data: Iterator[tuple[Tensor, Tensor]] | None = None) -> Runner:
    """The runner of one rank.

    Args:
        configuration: method, ranks, k.
        model: what is trained.
        bounds: the layers at which ranks (DualPipeV: its 2P stages) begin.
        block: overrides settings of the method's ``decoupled`` block.
        optimizer: SGD's parameters.
        data: micro-batches, if not the model's own.
    """
    method, k = METHODS[configuration.method], configuration.k
    specs, batches = model.specs(), data or model.batches()
    if method.runner.startswith("bare"):
        torch.manual_seed(0)
        layers = [spec.build() for spec in specs]
        loop = petra_loop if method.runner == "bare-petra" else backprop_loop
        warm_up = math.ceil(2 * len(layers) / k) + 1 if method.runner == "bare-petra" else 2
        return Runner(loop(layers, batches, k, partial(torch.optim.SGD, **optimizer), model.loss()), max(2, warm_up))

    config: dict[str, Any] = {"train_micro_batch_size_per_gpu": model.micro_batch, "gradient_accumulation_steps": k,
                              "gradient_clipping": 0.0, "optimizer": {"type": "SGD", "params": dict(optimizer)},
                              "steps_per_print": 10**9, "decoupled": {"method": "backprop", **method.block, **(block or {})}}
    if method.runner != "engine":
        specs = one_tensor_borders(model, bounds)
    common: dict[str, Any] = {"num_stages": configuration.ranks, "loss_fn": model.loss()}
    if method.runner == "dualpipev":
        del config["decoupled"]
        deepspeed.init_distributed()
        chains = [LayerSpec(Chain, specs[a:b]) for a, b in itertools.pairwise(bounds)]
        pipeline: Any = DualPipeVModule(layers=chains, partition_method="uniform", **common)
    else:
        if configuration.method == "1f1b-checkpoint":
            common |= {"activation_checkpoint_interval": 1, "activation_checkpoint_func": non_reentrant_checkpoint}
        pipeline = ds_decoupled.DecoupledPipelineModule(specs, config=config, partition=bounds,
                                                         sample_input=next(model.batches())[0], **common)
    engine, *_ = ds_decoupled.initialize(model=pipeline, config=config, model_parameters=list(pipeline.parameters()))
    call = partial(engine.train_batch, batches)
    if method.runner != "engine":
        return Runner(call, engine=engine)
    return Runner(call, max(2, math.ceil(engine.plan.ticks.drain / k) + 1), engine)


def _resident_bytes() -> int:
    """The most that this process has held in main memory so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def time_calls(runner: Runner, meter: Meter, calls: int) -> dict[str, float]:
    """Run so many calls from a common start; when they began and ended (one clock for all processes), and the counters."""
    if dist.is_initialized():
        dist.barrier()
    meter.reset()
    start, cpu = time.perf_counter(), time.process_time()
    for _ in range(calls):
        runner.call()
    end = time.perf_counter()
    return {"start": start, "end": end, "cpu": time.process_time() - cpu, "waited": meter.waited,
            "bytes_sent": float(meter.bytes_sent)}


def distinct_bytes(tensors: Iterator[Tensor]) -> int:
    """Bytes of the storages behind ``tensors``, each once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def _tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors_in(item)


def watch_activations(runner: Runner, calls: int) -> dict[str, int]:
    """Run so many calls of ours and look after every forward and backward at what the rank holds (peaks, in bytes).

    ``kept`` is what stages keep for their backward passes, ``with_messages`` that and what waits between stages,
    ``stashed`` old versions of weights.
    """
    engine = runner.engine
    peaks = {"kept": 0, "with_messages": 0, "stashed": 0}
    originals = {s: (stage.forward, stage.backward) for s, stage in engine.stages.items()}

    def look() -> None:
        kept = [t for stage in engine.stages.values() for t in stage.kept()]
        queues = (*engine.network.activations.values(), *engine.network.gradients.values())
        waiting = [t for link in queues for message in link.queue for t in _tensors_in(message.parts)]
        stashed = [t for stage in engine.stages.values() for values in stage.weights.stash.values() for t in values]
        for name, tensors in (("kept", kept), ("with_messages", kept + waiting), ("stashed", stashed)):
            peaks[name] = max(peaks[name], distinct_bytes(iter(tensors)))

    def and_look(function: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*args: Any) -> Any:
            result = function(*args)
            look()
            return result
        return watched

    for s, stage in engine.stages.items():
        stage.forward, stage.backward = (and_look(function) for function in originals[s])
    for _ in range(calls):
        runner.call()
    for s, stage in engine.stages.items():
        stage.forward, stage.backward = originals[s]
    return peaks


def serve(pipe: Connection, configuration: Configuration, model: Model, bounds: list[int]) -> None:
    """Build, warm up, report, and then obey: ``("time", calls)``, ``("watch", calls)``."""
    meter = Meter()
    before = _resident_bytes()
    runner = build(configuration, model, bounds)
    for _ in range(runner.warm_up):
        runner.call()
    pipe.send(("ready", {}))
    while True:
        command, calls = pipe.recv()
        if command == "time":
            pipe.send(("timed", time_calls(runner, meter, calls)))
        else:
            report: dict[str, Any] = {"peak_memory_bytes": _resident_bytes() - before}
            if runner.ours:
                report |= watch_activations(runner, max(calls, runner.warm_up))
                report["delays"] = [runner.engine.plan.ticks.delay(s) for s in runner.engine.stages]
            pipe.send(("watched", report))


def profile(pipe: Connection, model: Model) -> None:
    """Measured seconds of every layer, by what ``Method.cost`` names, as ``"partition": "profile"`` measures them."""
    deepspeed.init_distributed(dist_backend="gloo")
    sample, _ = next(model.batches())
    specs = model.specs()

    def head(stage: int, given: Tensors, outputs: int) -> nn.Module:
        return make_head(None, given, outputs, 0, stage, None, torch.device("cpu"), specs)

    times = layer_times(specs, sample, head, block_starts(specs)[1:])
    last = len(times) - 1  # the last layer's stage goes forward and back at once
    alone = [t._replace(head=0.0) for t in times]
    costs = {cost: [t.cost(cost != "graph" and i < last) for i, t in enumerate(alone)]
             for cost in ("graph", "input", "reconstruct")}
    pipe.send(("profiled", {**costs, "local": [t.cost(False) for t in times]}))


def rank_main(pipe: Connection, rank: int, world: int, port: int, log: str, task: Callable[..., None],
              args: tuple[Any, ...]) -> None:
    """Entry of the process: one core, one thread, its own log; errors go to the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its children
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=str(port))
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        if world <= len(cores):
            os.sched_setaffinity(0, {cores[rank]})
    torch.set_num_threads(1)
    try:
        task(pipe, *args)
    except EOFError:  # the parent has let go
        pass
    except BaseException as error:
        with_trace = f"{type(error).__name__}: {error}\n{traceback.format_exc()}"
        with contextlib.suppress(OSError):
            pipe.send(("error", with_trace))
    os._exit(0)  # no destructor waits for the other ranks
