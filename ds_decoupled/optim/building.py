"""Building the optimizers and LR schedulers of one rank's stages, by DeepSpeed from the JSON or from what the user gave."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from torch.optim import Optimizer

from ds_decoupled.optim.client import ClientOptimizer
from ds_decoupled.optim.stage_optimizer import StageOptimizer, StageOptimizers, restrict

if TYPE_CHECKING:
    from ds_decoupled.engine import DecoupledPipelineEngine


def build_optimizers(engine: DecoupledPipelineEngine, optimizers: StageOptimizers, client: Any, parameters: list[Any]) -> None:
    """One optimizer for each stage.

    Args:
        engine: whose stages have been built.
        optimizers: gets them.
        client: the user's instance or callable; None for the JSON's.
        parameters: to train, or groups of them; an instance has its own.
    """
    from ds_decoupled.stages.heads import groups_with_heads

    heads = {index: getattr(stage, "head_parameters", []) for index, stage in engine.stages.items()}
    for index, head in heads.items():  # DeepSpeed's bf16 asks every parameter for its name
        engine.param_names.update({p: f"stage_{index}.head.{i}" for i, p in enumerate(head)})
    if isinstance(client, Optimizer):
        optimizers.client = ClientOptimizer(client, {s: (stage.trainable, heads[s]) for s, stage in engine.stages.items()})
    for index, stage in engine.stages.items():
        optimizer = basic = None
        if optimizers.client is None:
            own = groups_with_heads(restrict(parameters, stage.trainable), heads[index])
            if own:
                optimizer, basic = engine.build_optimizer(client, own)
        elif index in optimizers.client.basic:
            optimizer, basic = engine.build_optimizer(optimizers.client.basic[index], [])
            optimizers.client.built(index, basic)
        optimizers.by_stage[index] = StageOptimizer(engine, stage.trainable, optimizer, basic,
                                                    partial(engine.lr_divisor, index), optimizers)


def without_optimizers(engine: DecoupledPipelineEngine, optimizers: StageOptimizers) -> None:
    """The engine was given none, and evaluates alone."""
    for index in engine.stages:
        optimizers.by_stage[index] = StageOptimizer(engine, [], None, None, partial(engine.lr_divisor, index), optimizers)
    optimizers.missing = ('train_batch needs an optimizer: give one to initialize, or the configuration an "optimizer" block; '
                          "eval_batch works without")


def build_schedulers(engine: DecoupledPipelineEngine, optimizers: StageOptimizers) -> None:
    """One LR scheduler for each stage: its own block's, the user's, or the JSON's."""
    given, blocks = engine.client_lr_scheduler, engine.decoupled.stage_schedulers
    instance = given is not None and not callable(given)
    if instance:
        optimizers.set_lr_scheduler(given)
    made = {}
    for index, stage in optimizers.trained.items():
        block = None if blocks is None else blocks[index]
        keeps = instance and block is None
        made[index] = stage.lr_scheduler if keeps else engine.build_lr_scheduler(stage.basic_optimizer, block)
    if not instance or blocks is not None:
        optimizers.built(made)
