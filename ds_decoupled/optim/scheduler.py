"""LR schedulers: a copy of the user's for each stage, which counts that stage's updates."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable
from typing import Any

from torch.optim.lr_scheduler import ReduceLROnPlateau

from ds_decoupled.errors import ConfigError
from ds_decoupled.optim.groups import GroupsView


def check_scheduler(scheduler: Any) -> Any:
    """``scheduler``, if it can be stepped once an update.

    Raises:
        ConfigError: if it cannot.
    """
    name = type(scheduler).__name__
    if isinstance(scheduler, ReduceLROnPlateau):
        raise ConfigError("lr_scheduler", name, "an update of a stage knows no metric to step it with",
                          "Keep it out of the engine: make it for engine.optimizer and call its step(metric) yourself, after "
                          "train_batch or eval_batch; the rates that it sets hold for every stage from its next update on.")
    if not callable(getattr(scheduler, "step", None)):
        raise ConfigError("lr_scheduler", name, "a scheduler has a method step()")
    return scheduler


def bound_copy(scheduler: Any, whole: Any, view: GroupsView, shared: Iterable[Any] = ()) -> Any:
    """A copy of ``scheduler`` that finds ``view`` wherever it has ``whole``, at any depth (SequentialLR has schedulers inside).

    Args:
        scheduler: the user's.
        whole: the optimizer that it was made for.
        view: one stage's groups of it.
        shared: what is not to be copied with it.
    """
    memo: dict[int, Any] = {id(item): item for item in shared}
    memo[id(whole)] = view
    return copy.deepcopy(scheduler, memo)


def advance(scheduler: Any, samples: int) -> None:
    """One update was made. Schedulers that must be told by how much (Megatron's) get the samples, as DeepSpeed does."""
    needed = [p for p in inspect.signature(scheduler.step).parameters.values()
              if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if needed:
        scheduler.step(samples)
    else:
        scheduler.step()


def show(face: Any, scheduler: Any) -> None:
    """Bring the user's scheduler to where a stage's copy of it is."""
    if face is not scheduler and hasattr(face, "load_state_dict"):
        face.load_state_dict(scheduler.state_dict())
