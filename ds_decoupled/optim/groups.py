"""Groups of parameters: the values in them, and an optimizer's groups as one stage sees them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

Group = dict[str, Any]


def own_value(value: Any) -> Any:
    """``value``, where it is a tensor (a capturable learning rate) as one of its own: schedulers write into such in place."""
    return value.clone() if isinstance(value, Tensor) else value


def settings_of(group: Mapping[str, Any]) -> Group:
    """What a group says, without its parameters."""
    return {key: own_value(value) for key, value in group.items() if key != "params"}


def same_value(a: Any, b: Any) -> bool:
    """Whether two settings are equal."""
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return bool(torch.as_tensor(a).eq(torch.as_tensor(b)).all())
    return bool(a == b)


def write(group: Group, settings: Mapping[str, Any]) -> None:
    """Put ``settings`` into ``group``; a tensor that is there is filled, as torch's schedulers do."""
    for key, value in settings.items():
        if isinstance(group.get(key), Tensor) and group[key].numel() == 1:
            group[key].fill_(float(value))
        else:
            group[key] = own_value(value)


class GroupsView(torch.optim.Optimizer):
    """All groups of an optimizer, for one stage: its own where it has parameters of a group, a stand-in elsewhere.

    What a stage's copy of the user's scheduler is bound to. The scheduler then finds as many groups as it was made for, in the
    same order, and writes into those that the stage steps with.

    Args:
        basic: the stage's optimizer, which has the groups.
        positions: for each group of the whole, its place among the stage's; None where the stage has no parameter of it.
        whole: the whole's groups, for the stand-ins and the defaults.
        defaults: the whole's.
    """

    _opt_called = True  # torch's schedulers warn where the optimizer has not stepped; a stage's has

    def __init__(self, basic: Any, positions: Sequence[int | None], whole: Sequence[Group], defaults: dict[str, Any]) -> None:
        self.basic, self.positions = basic, list(positions)
        self.defaults = dict(defaults)
        self._stand_ins = [{**settings_of(group), "params": []} for group in whole]

    @property
    def param_groups(self) -> list[Group]:  # type: ignore[override]
        """Looked up every time: loading a checkpoint makes new ones."""
        return [stand_in if position is None else self.basic.param_groups[position]
                for position, stand_in in zip(self.positions, self._stand_ins)]

    def stand_ins(self) -> list[Group]:
        """What the stand-ins say, for a checkpoint: schedules go on from the rate that they find."""
        return [settings_of(group) for group in self._stand_ins]

    def load_stand_ins(self, saved: Sequence[Group]) -> None:
        """The inverse of :meth:`stand_ins`."""
        for group, settings in zip(self._stand_ins, saved):
            write(group, settings)

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        raise RuntimeError("each stage steps after its own k-th backward, inside train_batch()")

    step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]


HEAD_LR = "head_lr"
"""Of a group that is a head's: its rate as a factor of the stage's."""


class Lesson(Protocol):
    """What is asked here of a lesson (:mod:`ds_decoupled.stages.lesson`): rates while a head is taught."""

    @property
    def still(self) -> bool:
        """Whether the stage holds still."""

    @property
    def has_head(self) -> bool:
        """Whether the stage has a head that is taught."""

    def lasts(self, update: int) -> bool:
        """Whether ``update`` belongs to it."""

    def rate(self, update: int) -> float:
        """The head's, in ``update``."""


def groups_with_heads(own: Sequence[Any], head: Sequence[nn.Parameter], factor: float | None = None) -> list[Any]:
    """A stage's parameters (or groups) for its optimizer, with the head's: where there are groups, a head's biases and norms
    do not decay.

    Args:
        own, head: of the stage and of its head.
        factor: the head's rate as one of the stage's, which makes groups; None where it has no rate of its own.
    """
    if not head:
        return list(own)
    grouped = any(isinstance(item, Mapping) for item in own) or not own
    if not grouped and factor is None:
        return [*own, *head]
    marked = {} if factor is None else {HEAD_LR: factor}
    if not grouped:
        return [{"params": list(own)}, {"params": list(head), **marked}]
    flat = [p for p in head if p.ndim <= 1]
    grown = [p for p in head if p.ndim > 1]
    return [*own, *([{"params": grown, **marked}] if grown else []),
            *([{"params": flat, "weight_decay": 0.0, **marked}] if flat else [])]


@contextmanager
def scaled_lr(groups: Sequence[Group], divisor: float, lesson: Lesson | None = None, update: int = 0) -> Iterator[None]:
    """Within, the groups' rates are divided, and heads' times their factor; behind, a scheduler finds what it left.

    Args:
        groups: an optimizer's.
        divisor: of the stage's rate.
        lesson: what the head's rate is instead in ``update``, and whether the stage's is 0.
        update: the stage's, from 0.
    """
    scheduled = [group["lr"] for group in groups]
    try:
        for group, lr in zip(groups, scheduled):
            if lesson is not None and HEAD_LR in group:
                group["lr"] = lesson.rate(update)
            elif lesson is not None and lesson.still:
                group["lr"] = 0.0
            elif divisor != 1 or HEAD_LR in group:
                group["lr"] = lr * group.get(HEAD_LR, 1.0) / divisor
        yield
    finally:
        for group, lr in zip(groups, scheduled):
            group["lr"] = lr
