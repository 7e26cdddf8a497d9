"""One optimizer and one LR scheduler per stage; a stage steps when it is due and waits for no other stage."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from ds_decoupled.collectives import gather
from ds_decoupled.compat import PipelineEngineBase
from ds_decoupled.errors import ConfigError
from ds_decoupled.optim import sparse, wrapped
from ds_decoupled.optim.client import ClientOptimizer
from ds_decoupled.optim.groups import Group, GroupsView, Lesson, scaled_lr
from ds_decoupled.optim.scheduler import advance, bound_copy, check_scheduler, show


class StageOptimizer:
    """The optimizer of one stage.

    Args:
        engine: whose settings (clipping, data parallelism) apply.
        parameters: the stage's trainable parameters.
        optimizer: DeepSpeed's wrapped optimizer; None where the stage has nothing to train.
        basic_optimizer: the one inside, whose groups hold the rates.
        lr_divisor: what the scheduled rate is divided by, from the number of updates made so far.
        of: the rank's optimizers, of which this is one.

    Attributes:
        lesson: rates of the first updates, where the stage has a part in teaching heads.
    """

    def __init__(self, engine: PipelineEngineBase, parameters: list[nn.Parameter], optimizer: Any,
                 basic_optimizer: Any, lr_divisor: Callable[[int], float], of: StageOptimizers) -> None:
        self.engine, self.of = engine, of
        self.parameters = parameters
        self.optimizer = optimizer
        self.basic_optimizer = basic_optimizer
        self.lr_divisor = lr_divisor
        self.lr_scheduler: Any = None
        self.lesson: Lesson | None = None
        self.updates = 0
        self.grad_norm: float | None = None

    def accumulate(self) -> None:
        """A micro-batch's gradients are in ``.grad``."""
        if self.optimizer is not None:
            wrapped.accumulate(self.optimizer)

    def step(self) -> None:
        """Average over replicas, clip by the stage's own norm, step, clear; the LR scheduler counts this stage's updates."""
        divisor = self.lr_divisor(self.updates)
        if self.optimizer is None:
            self.updates += 1
            return
        lesson = self.lesson if self.lesson is not None and self.lesson.lasts(self.updates) else None
        if lesson is not None and lesson.still and not lesson.has_head:  # no gradient is there
            self.stepped()
            return
        self.of.before_step()
        rows = [p for p in self.parameters if p.grad is not None and p.grad.is_sparse]
        if rows and self.engine.is_data_parallel and self.of.average is None:
            sparse.average(rows, self.engine.mpu.get_data_parallel_group())
        with scaled_lr(self.basic_optimizer.param_groups, divisor, lesson, self.updates):
            clip = sparse.clip if rows else None
            self.grad_norm = wrapped.reduce_and_step(self.engine, self.optimizer, self.parameters, clip,
                                                     self.of.average)
        self.stepped()

    def stepped(self) -> None:
        """An update was made, here or by another hand on the same weights."""
        self.updates += 1
        if self.lr_scheduler is not None and not getattr(self.optimizer, "overflow", False):  # as DeepSpeed counts
            advance(self.lr_scheduler, self.engine.train_batch_size())
        self.of.moved(self)

    def part_of_peak(self) -> float:
        """Where the schedule is: the first group's rate as a part of the one that it was given."""
        if self.basic_optimizer is None:
            return 1.0
        group = self.basic_optimizer.param_groups[0]
        peak = float(group.get("initial_lr", self.basic_optimizer.defaults.get("lr", 0.0)))
        return float(group["lr"]) / peak if peak else 1.0

    def state_dict(self) -> dict[str, Any]:
        """Optimizer, scheduler, updates so far, and the gradients of an accumulation that is not complete."""
        state: dict[str, Any] = {"updates": self.updates}
        if self.optimizer is not None:
            state["optimizer"] = self.optimizer.state_dict()
            state["accumulated"] = wrapped.accumulated(self.optimizer, self.parameters)
        if self.lr_scheduler is not None:
            state["lr_scheduler"] = self.lr_scheduler.state_dict()
            if isinstance(view := getattr(self.lr_scheduler, "optimizer", None), GroupsView):
                state["stand_ins"] = view.stand_ins()
        return state

    def load_state_dict(self, state: dict[str, Any], load_optimizer: bool = True, load_lr_scheduler: bool = True) -> None:
        """The inverse of :meth:`state_dict`."""
        self.updates = state["updates"]
        if self.optimizer is not None:
            wrapped.load_optimizer(self.optimizer, state["optimizer"], load_optimizer)
            wrapped.restore_accumulated(self.optimizer, self.parameters, state["accumulated"])
        if self.lr_scheduler is not None and load_lr_scheduler and "lr_scheduler" in state:
            self.lr_scheduler.load_state_dict(state["lr_scheduler"])
            if isinstance(view := getattr(self.lr_scheduler, "optimizer", None), GroupsView):
                view.load_stand_ins(state.get("stand_ins", ()))
        self.of.moved(self)

    def weights_replaced(self) -> None:
        """The weights were loaded alone: nothing of the old ones is left, but for the optimizer's moments."""
        if self.optimizer is not None:
            wrapped.refresh_masters(self.optimizer)
            wrapped.drop_accumulated(self.optimizer, self.parameters)


class StageOptimizers(Optimizer):
    """What ``initialize`` returns as the optimizer: a view of the stages' optimizers on this rank.

    ``param_groups`` are the optimizers' own groups, stage after stage, so that learning rates can be read and set as usual, by
    hand or by a scheduler that is made for it. It cannot step: stages step themselves.

    Args:
        by_stage: filled while the engine is built.
        shared: what a copy of a scheduler does not copy with it (the engine, its module).

    Attributes:
        client: the user's own instance, if there is one.
        missing: what keeps ``train_batch`` from training, in words.
        average: of a stage's gradients over replicas, in place; None for DeepSpeed's own.
    """

    _opt_called = True  # torch's schedulers warn where they are stepped first, as is right while the pipeline fills

    def __init__(self, by_stage: dict[int, StageOptimizer], shared: Sequence[Any] = ()) -> None:
        # Not Optimizer's own: the groups are the stages'.
        self.by_stage = by_stage
        self.shared = shared
        self.client: ClientOptimizer | None = None
        self.missing = ""
        self.average: Callable[[Sequence[nn.Parameter]], None] | None = None
        self._scheduler: Any = None
        self._taken_out: tuple[Any, dict[int, Any]] = None, {}

    @property
    def optimizers(self) -> list[Any]:
        """DeepSpeed's wrapped optimizers, in stage order."""
        return [stage.optimizer for stage in self.trained.values()]

    @property
    def trained(self) -> dict[int, StageOptimizer]:
        """The stages that have something to train."""
        return {index: stage for index, stage in sorted(self.by_stage.items()) if stage.optimizer is not None}

    @property
    def param_groups(self) -> list[Group]:  # type: ignore[override]
        if self.client is not None:
            self.client.push()
        return [group for stage in self.trained.values() for group in stage.basic_optimizer.param_groups]

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        """Of the first stage's optimizer: schedulers ask whether there is a momentum to cycle."""
        return next((stage.basic_optimizer.defaults for stage in self.trained.values()), {})

    @property
    def state(self) -> dict[Any, Any]:  # type: ignore[override]
        """What the optimizers know of their parameters."""
        return {p: known for stage in self.trained.values() for p, known in stage.basic_optimizer.state.items()}

    # -- the LR scheduler ---------------------------------------------------------------------------------------------------

    @property
    def lr_scheduler(self) -> Any:
        """What the user gave, brought to where the topmost stage is; or the topmost stage's own."""
        return self._scheduler

    def set_lr_scheduler(self, scheduler: Any) -> None:
        """From now on every stage follows ``scheduler``, by its own updates; None: rates stay as they are.

        Args:
            scheduler: made for this object, or for the optimizer that was given to ``initialize``; each stage that is not the
                only one gets a copy. One that was taken out before goes on where each stage was.

        Raises:
            ConfigError: if it was made for another optimizer, or cannot be stepped once an update.
        """
        old = self._scheduler, {index: stage.lr_scheduler for index, stage in self.trained.items()}
        back, theirs = self._taken_out
        if scheduler is None:
            made = dict.fromkeys(self.trained)
        elif scheduler is self._scheduler:
            return
        elif scheduler is back:
            made = theirs
        else:
            made = self._for_stages(check_scheduler(scheduler))
        for index, stage in self.trained.items():
            stage.lr_scheduler = made[index]
        self._scheduler = scheduler
        if old[0] is not None:
            self._taken_out = old

    def _for_stages(self, scheduler: Any) -> dict[int, Any]:
        stages, of = self.trained, getattr(scheduler, "optimizer", None)
        if self.client is not None:
            self.client.push()
        alone = next(iter(stages.values())) if len(stages) == 1 else None
        if alone is not None and (of is self or of is alone.basic_optimizer or of is alone.optimizer):
            return dict.fromkeys(stages, scheduler)
        if of is self:
            views = self._views()
        elif self.client is not None and of is self.client.optimizer:
            views = self.client.views
        else:
            raise ConfigError("lr_scheduler", type(scheduler).__name__, "it was made for another optimizer than the stages', "
                              "and would change nothing", "Make it for engine.optimizer and assign it to engine.lr_scheduler, "
                              "or pass initialize a callable that takes an optimizer, or an optimizer and a scheduler for it.")
        return {index: bound_copy(scheduler, of, views[index], self.shared) for index in stages}

    def _views(self) -> dict[int, GroupsView]:
        """All groups, as each stage sees them."""
        groups, views, start = self.param_groups, {}, 0
        for index, stage in self.trained.items():
            own = len(stage.basic_optimizer.param_groups)
            positions = [i - start if start <= i < start + own else None for i in range(len(groups))]
            views[index] = GroupsView(stage.basic_optimizer, positions, groups, self.defaults)
            start += own
        return views

    def built(self, schedulers: dict[int, Any]) -> None:
        """The stages' schedulers as they were built, from the JSON or by the user's callable."""
        for index, scheduler in schedulers.items():
            self.by_stage[index].lr_scheduler = None if scheduler is None else check_scheduler(scheduler)
        self._scheduler = self.by_stage[max(schedulers)].lr_scheduler if schedulers else None

    # -- told by the stages -------------------------------------------------------------------------------------------------

    def find_out(self) -> None:
        """Whether any rank has something to train. A collective call."""
        if not any(gather(bool(self.trained))) and not self.missing:
            self.missing = ("train_batch has nothing to train: no parameter that the optimizer was given requires a gradient; "
                            "eval_batch works all the same")

    def before_batch(self) -> None:
        """A call of ``train_batch`` begins.

        Raises:
            RuntimeError: on every rank, where there is nothing to train, or the user's optimizer is not what it was.
        """
        if self.missing:
            raise RuntimeError(self.missing)
        if self.client is not None:
            self.client.check()

    def before_step(self) -> None:
        """A stage is about to step."""
        if self.client is not None:
            self.client.push()

    def moved(self, stage: StageOptimizer) -> None:
        """A stage has stepped, or was loaded: what the user holds shows where the topmost one is."""
        trained = self.trained
        if not trained or stage is not trained[max(trained)]:
            return
        if self.client is not None:
            self.client.reflect()
        if self._scheduler is not None and stage.lr_scheduler is not None:
            show(self._scheduler, stage.lr_scheduler)

    # -- as an optimizer ----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        return {str(index): stage.state_dict() for index, stage in self.by_stage.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for index, stage in self.by_stage.items():
            stage.load_state_dict(state[str(index)])

    def zero_grad(self, set_to_none: bool = True) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        raise RuntimeError("each stage steps after its own k-th backward, inside train_batch()")

    def add_param_group(self, param_group: Group) -> None:
        raise RuntimeError("which stage steps these parameters is settled when the engine is built: give initialize all groups")

    def register_step_pre_hook(self, hook: Any) -> Any:
        raise RuntimeError("each stage steps an optimizer of its own: register the hook with each of optimizer.optimizers")

    register_step_post_hook = register_step_pre_hook

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
