"""A method made ready to run: the engine, one of DeepSpeed's own, or a bare loop, all behind one call."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import deepspeed
import torch
from deepspeed.pipe import LayerSpec
from deepspeed.runtime.activation_checkpointing.checkpointing import non_reentrant_checkpoint
from deepspeed.runtime.pipe.dualpipev import DualPipeVModule
from torch import Tensor, nn

import ds_decoupled
from bench.bare import backprop_loop, data_parallel_loop, petra_loop
from bench.models import Model
from bench.plan import METHODS, Configuration

SGD: dict[str, Any] = {"lr": 1e-5, "momentum": 0.9, "nesterov": True, "weight_decay": 5e-4, "fused": True}
"""The update costs what it costs in training; so small a rate keeps random labels from leading anywhere."""

BARE = {"bare-backprop": backprop_loop, "bare-ddp": data_parallel_loop, "bare-petra": petra_loop}
"""Loops without an engine, by a method's runner."""


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

    def pause(self) -> None:
        """Wait for what threads do in the background, if any."""
        if self.ours:
            self.engine.runner.pause()


def build(configuration: Configuration, model: Model, bounds: list[int], *, block: Mapping[str, Any] | None = None,
          optimizer: Mapping[str, Any] = SGD, data: Iterator[tuple[Tensor, Tensor]] | None = None) -> Runner:
    """The runner of one rank.

    Args:
        configuration: method, ranks, k, codec.
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
        loop = BARE[method.runner]
        if method.runner == "bare-ddp":
            deepspeed.init_distributed(dist_backend="gloo")
        warm_up = math.ceil(2 * len(layers) / k) + 1 if method.runner == "bare-petra" else 2
        return Runner(loop(layers, batches, k, partial(torch.optim.SGD, **optimizer), model.loss()), max(2, warm_up))

    override = configuration.links | dict(block or {})
    config: dict[str, Any] = {"train_micro_batch_size_per_gpu": model.micro_batch, "gradient_accumulation_steps": k,
                              "gradient_clipping": 0.0, "optimizer": {"type": "SGD", "params": dict(optimizer)},
                              "steps_per_print": 10**9, "decoupled": {"method": "backprop", **method.block, **override}}
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
