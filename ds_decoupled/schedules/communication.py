"""Sends and receives, derived from the computation by one pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Set

from ds_decoupled.schedules.actions import Action, Kind


def every_backward(action: Action) -> bool:
    """Global methods: what goes back through a stage goes on to the stage below."""
    return action.kind.is_backward or action.kind is Kind.LOSS


def add_communication(actions: Iterable[Action], rank_of_stage: tuple[int, ...],
                      wants_output: Set[int] = frozenset(), split_backward: bool = False,
                      sends_gradient: Callable[[Action], bool] = every_backward) -> Iterator[Action]:
    """Put each receive right before the action that needs it and each send right behind the one that made it.

    Args:
        actions: computation of one rank, in its order.
        rank_of_stage: the rank of every stage.
        wants_output: stages that need their own output back, with its gradient, because they reconstruct from it.
        split_backward: a stage that sends a gradient to another rank computes its weights' gradients behind the send.
        sends_gradient: whether an action gives the stage below a gradient.
    """
    last = len(rank_of_stage) - 1

    def crosses(stage: int) -> bool:
        """Whether the link between ``stage`` and ``stage + 1`` joins two ranks."""
        return 0 <= stage < last and rank_of_stage[stage] != rank_of_stage[stage + 1]

    for action in actions:
        stage, kind, m = action.stage, action.kind, action.micro_batch
        forward = kind in (Kind.FORWARD, Kind.LOSS, Kind.HEAD)
        if forward and crosses(stage - 1):
            yield Action(stage, Kind.RECV_ACTIVATION, m)
        if (kind.is_backward or kind is Kind.RELAY) and crosses(stage):
            yield Action(stage, Kind.RECV_RECONSTRUCTION if stage in wants_output else Kind.RECV_GRADIENT, m)
        yield action
        if forward and crosses(stage):
            yield Action(stage, Kind.SEND_ACTIVATION, m)
        if crosses(stage - 1) and sends_gradient(action):
            yield Action(stage, Kind.SEND_RECONSTRUCTION if stage - 1 in wants_output else Kind.SEND_GRADIENT, m)
            if split_backward:
                yield Action(stage, Kind.WEIGHTS, m)
