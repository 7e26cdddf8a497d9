"""Sends and receives, derived from the computation by one pass over what the table says that actions take and give."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Set

from ds_decoupled.schedules.actions import Action
from ds_decoupled.schedules.kinds import Kind, Slot


def every_gradient(action: Action) -> bool:
    """Global methods: what goes back through a stage goes on to the stage below."""
    return True


def add_communication(actions: Iterable[Action], rank_of_stage: tuple[int, ...],
                      wants_output: Set[int] = frozenset(), split_backward: bool = False,
                      sends_gradient: Callable[[Action], bool] = every_gradient) -> Iterator[Action]:
    """Put each receive right before the action that needs it and each send right behind the one that made it.

    Args:
        actions: computation of one rank, in its order.
        rank_of_stage: the rank of every stage.
        wants_output: stages that need their own output back, with its gradient, because they reconstruct from it.
        split_backward: a stage that sends a gradient to another rank computes its weights' gradients behind the send.
        sends_gradient: whether an action that can give the stage below a gradient does.
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
            yield Action(stage, Kind.RECV_RECONSTRUCTION if stage in wants_output else Kind.RECV_GRADIENT, m)
        yield action
        if Slot.OUTPUT in kind.gives and crosses(stage):
            yield Action(stage, Kind.SEND_ACTIVATION, m)
        if Slot.INPUT_GRADIENT in kind.gives and crosses(stage - 1) and sends_gradient(action):
            yield Action(stage, Kind.SEND_RECONSTRUCTION if stage - 1 in wants_output else Kind.SEND_GRADIENT, m)
            if split_backward and Slot.PUT_OFF in kind.gives:
                yield Action(stage, Kind.WEIGHTS, m)
