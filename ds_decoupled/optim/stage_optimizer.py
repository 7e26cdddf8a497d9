"""One optimizer and one LR scheduler per stage; a stage steps when it is due and waits for no other stage."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn

from ds_decoupled import compat
from ds_decoupled.errors import ConfigError
from ds_decoupled.optim.lr_by_delay import divided_lr


class StageOptimizer:
    """The optimizer of one stage.

    Args:
        engine: whose settings (clipping, data parallelism) apply.
        parameters: the stage's trainable parameters.
        optimizer: DeepSpeed's wrapped optimizer; None where the stage has nothing to train.
        basic_optimizer: the one inside, whose groups hold the rates.
        lr_divisor: what the scheduled rate is divided by, from the number of updates made so far.
    """

    def __init__(self, engine: compat.PipelineEngineBase, parameters: list[nn.Parameter], optimizer: Any,
                 basic_optimizer: Any, lr_divisor: Callable[[int], float]) -> None:
        self.engine = engine
        self.parameters = parameters
        self.optimizer = optimizer
        self.basic_optimizer = basic_optimizer
        self.lr_divisor = lr_divisor
        self.lr_scheduler: Any = None
        self.updates = 0
        self.grad_norm: float | None = None

    def accumulate(self) -> None:
        """A micro-batch's gradients are in ``.grad``."""
        if self.optimizer is not None:
            compat.accumulate(self.optimizer)

    def step(self) -> None:
        """Average over replicas, clip by the stage's own norm, step, clear; the LR scheduler counts this stage's updates."""
        divisor = self.lr_divisor(self.updates)
        self.updates += 1
        if self.optimizer is None:
            return
        with divided_lr(self.basic_optimizer.param_groups, divisor):
            self.grad_norm = compat.reduce_and_step(self.engine, self.optimizer, self.parameters)
        if self.lr_scheduler is not None:
            self.lr_scheduler.step()

    def state_dict(self) -> dict[str, Any]:
        """Optimizer, scheduler, updates so far, and the gradients of an accumulation that is not complete."""
        state: dict[str, Any] = {"updates": self.updates}
        if self.optimizer is not None:
            state["optimizer"] = self.optimizer.state_dict()
            state["accumulated"] = compat.accumulated(self.optimizer, self.parameters)
        if self.lr_scheduler is not None:
            state["lr_scheduler"] = self.lr_scheduler.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any], load_optimizer: bool = True, load_lr_scheduler: bool = True) -> None:
        """The inverse of :meth:`state_dict`."""
        self.updates = state["updates"]
        if self.optimizer is not None:
            compat.load_optimizer(self.optimizer, state["optimizer"], load_optimizer)
            compat.restore_accumulated(self.optimizer, self.parameters, state["accumulated"])
        if self.lr_scheduler is not None and load_lr_scheduler and "lr_scheduler" in state:
            self.lr_scheduler.load_state_dict(state["lr_scheduler"])

    def weights_replaced(self) -> None:
        """The weights were loaded alone: nothing of the old ones is left, but for the optimizer's moments."""
        if self.optimizer is not None:
            compat.refresh_masters(self.optimizer)
            compat.drop_accumulated(self.optimizer, self.parameters)


class StageOptimizers:
    """What ``initialize`` returns as the optimizer: a view of the stages' optimizers on this rank.

    ``param_groups`` are the optimizers' own groups, so that learning rates can be read and set as usual. It cannot step:
    stages step themselves.
    """

    def __init__(self, by_stage: dict[int, StageOptimizer]) -> None:
        self.by_stage = by_stage

    @property
    def optimizers(self) -> list[Any]:
        """DeepSpeed's wrapped optimizers, in stage order."""
        return [s.optimizer for s in self.by_stage.values() if s.optimizer is not None]

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        return {str(index): stage.state_dict() for index, stage in self.by_stage.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for index, stage in self.by_stage.items():
            stage.load_state_dict(state[str(index)])

    def zero_grad(self, set_to_none: bool = True) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def step(self, closure: Any = None) -> None:
        raise RuntimeError("each stage steps after its own k-th backward, inside train_batch()")

    def destroy(self) -> None:
        for optimizer in self.optimizers:
            if hasattr(optimizer, "destroy"):
                optimizer.destroy()


def restrict(model_parameters: Iterable[Any], wanted: Sequence[nn.Parameter]) -> list[Any]:
    """``model_parameters`` (parameters, or groups of them) without what is not in ``wanted``; empty groups are dropped."""
    ids = {id(p) for p in wanted}
    restricted: list[Any] = []
    for item in model_parameters:
        if isinstance(item, dict):
            params = item["params"]
            kept = [p for p in ([params] if isinstance(params, nn.Parameter) else params) if id(p) in ids]
            if kept:
                restricted.append({**item, "params": kept})
        elif id(item) in ids:
            restricted.append(item)
    return restricted


def client_for_stage(client: Any, parameters: list[Any], local_stages: int) -> Any:
    """The client's optimizer for one stage.

    A callable is called per stage by DeepSpeed. An instance is made again for the stage's parameters with the options of
    its groups, because one optimizer cannot step stage by stage.
    """
    if not isinstance(client, torch.optim.Optimizer) or local_stages == 1:
        return client
    if client.state:
        raise ConfigError("optimizer", type(client).__name__, "an optimizer that has stepped already cannot be cut into stages",
                          "Pass a fresh one, a callable, or the JSON's own optimizer block.")
    groups = restrict(client.param_groups, [p for g in parameters for p in (g["params"] if isinstance(g, dict) else [g])])
    return type(client)(groups, **client.defaults) if groups else None
