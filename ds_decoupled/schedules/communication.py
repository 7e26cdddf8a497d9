"""Sends and receives, derived from the computation by one pass over what the table says that actions take and give."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from ds_decoupled.schedules.actions import Action
from ds_decoupled.schedules.kinds import Kind, Slot, matching


def every_gradient(action: Action) -> bool:
    """Global methods: what goes back through a stage goes on to the stage below."""
    return True


def gradient_alone(below: int, action: Action) -> Kind:
    """A gradient travels by itself."""
    return Kind.SEND_GRADIENT


def add_communication(actions: Iterable[Action], rank_of_stage: tuple[int, ...], split_backward: bool = False,
                      sends_gradient: Callable[[Action], bool] = every_gradient,
                      gradient_kind: Callable[[int, Action], Kind] = gradient_alone) -> Iterator[Action]:
    """Put each receive right before the action that needs it and each send right behind the one that made it.

    Args:
        actions: computation of one rank, in its order.
        rank_of_stage: the rank of every stage.
        split_backward: a stage that sends a gradient to another rank computes its weights' gradients behind the send.
        sends_gradient: whether an action that can give the stage below a gradient does.
        gradient_kind: how a gradient is sent to stage ``below``: the one that an action there takes, or one above it gives.
    """
    last = len(rank_of_stage) - 1

    def crosses(link: int) -> bool:
        """Whether the link between stages ``link`` and ``link + 1`` joins two ranks."""
        return 0 <= link < last and rank_of_stage[link] != rank_of_stage[link + 1]

    for action in actions:
        stage, kind, m = action.stage, action.kind, action.micro_batch
        if kind.takes is Slot.INPUT and crosses(stage - 1):
            yield Action(stage, Kind.RECV_ACTIVATION, m)
        if kind.takes is Slot.OUTPUT_GRADIENT and crosses(stage):
            yield Action(stage, matching(gradient_kind(stage, action)), m)
        yield action
        if Slot.OUTPUT in kind.gives and crosses(stage):
            yield Action(stage, Kind.SEND_ACTIVATION, m)
        if Slot.INPUT_GRADIENT in kind.gives and crosses(stage - 1) and sends_gradient(action):
            yield Action(stage, gradient_kind(stage - 1, action), m)
            if split_backward and Slot.PUT_OFF in kind.gives:
                yield Action(stage, Kind.WEIGHTS, m)
