"""Building the optimizers and LR schedulers of one rank's stages, by DeepSpeed from the JSON or from what the user gave."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

from deepspeed.runtime.config import MUON_OPTIMIZER
from torch import nn
from torch.optim import Optimizer

from ds_decoupled.compat import PipelineEngineBase
from ds_decoupled.errors import ConfigError
from ds_decoupled.optim.client import ClientOptimizer
from ds_decoupled.optim.groups import groups_with_heads
from ds_decoupled.optim.stage_optimizer import StageOptimizer, StageOptimizers, restrict

Divisor = Callable[[int, int], float]
"""What a stage's rate is divided by, from the stage and the number of updates that it has made."""


class Trained(Protocol):
    """What is asked of a stage here: its parameters that get gradients, and those of them that are its head's."""

    @property
    def trainable(self) -> list[nn.Parameter]: ...

    @property
    def head_parameters(self) -> list[nn.Parameter]: ...


def build_optimizers(engine: PipelineEngineBase, stages: Mapping[int, Trained], optimizers: StageOptimizers, client: Any,
                     parameters: list[Any], divisor: Divisor, head_lr: float | None = None) -> None:
    """One optimizer for each stage.

    Args:
        engine: builds them, from its settings.
        stages: this rank's, by number.
        optimizers: gets them.
        client: the user's instance or callable; None for the JSON's.
        parameters: to train, or groups of them; an instance has its own.
        divisor: of the stages' rates.
        head_lr: heads' rates, as a factor of their stages'; None where heads have no rates of their own.

    Raises:
        ConfigError: for ``head_lr`` where heads cannot have groups of their own.
    """
    if head_lr is not None and (isinstance(client, Optimizer) or engine.optimizer_name() == MUON_OPTIMIZER and client is None):
        which = "the optimizer that was given" if isinstance(client, Optimizer) else "DeepSpeed's Muon"
        name = "head_lr" if head_lr != 1 else "head_teaching"
        raise ConfigError(f"decoupled.{name}", head_lr, f"heads join the groups of {which}, and have their rates",
                          "Leave it out, or take an optimizer of the JSON such as AdamW.")
    for index, stage in stages.items():  # DeepSpeed's bf16 asks every parameter for its name
        engine.param_names.update({p: f"stage_{index}.head.{i}" for i, p in enumerate(stage.head_parameters)})
    if isinstance(client, Optimizer):
        parts: dict[int, tuple[Sequence[nn.Parameter], Sequence[nn.Parameter]]] = {
            index: (stage.trainable, stage.head_parameters) for index, stage in stages.items()}
        optimizers.client = ClientOptimizer(client, parts)
    for index, stage in stages.items():
        optimizer = basic = None
        if optimizers.client is None:
            own = groups_with_heads(restrict(parameters, stage.trainable), stage.head_parameters, head_lr)
            if own:
                optimizer, basic = engine.build_optimizer(client, own)
        # A stage of which the user's instance has no parameter does not learn.
        elif index in optimizers.client.basic:
            optimizer, basic = engine.build_optimizer(optimizers.client.basic[index], [])
            optimizers.client.built(index, basic)
        optimizers.by_stage[index] = StageOptimizer(engine, stage.trainable, optimizer, basic, partial(divisor, index),
                                                    optimizers)


def without_optimizers(engine: PipelineEngineBase, stages: Mapping[int, Trained], optimizers: StageOptimizers,
                       divisor: Divisor) -> None:
    """The engine was given none, and evaluates alone."""
    for index in stages:
        optimizers.by_stage[index] = StageOptimizer(engine, [], None, None, partial(divisor, index), optimizers)
    optimizers.missing = ('train_batch needs an optimizer: give one to initialize, or the configuration an "optimizer" block; '
                          "eval_batch works without")


def build_schedulers(engine: PipelineEngineBase, optimizers: StageOptimizers,
                     blocks: Sequence[dict[str, Any] | None] | None) -> None:
    """One LR scheduler for each stage: of its own entry in ``blocks``, the user's, or the JSON's."""
    given = engine.client_lr_scheduler
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
